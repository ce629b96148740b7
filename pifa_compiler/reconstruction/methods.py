"""M: low-rank weights from calibration statistics, in closed form, without training.

For a linear with dense weight W [out, in], X_u is its input when everything before it is compressed already, and X_o
its input in the dense model (columns are tokens). All that a method needs are sums over tokens, `Statistics`.

A method maps statistics to a function from (W, rank) to `LowRank` factors U [out, r], V [r, in]; `METHODS` names them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .regression import Regression
from .roots import Root, gram_root
from .statistics import Statistics


@dataclass(frozen=True)
class MethodOptions:
    """Knobs of the methods.

    Attributes:
        mix: f in the target Y = (1 - f) W X_u + f W X_o; the paper's recipe takes 0.25. With a drift the target is
            (1 - f) W X_u + f (W X_o + H_o - H_u): what brings the sum closer to that of the dense model.
        damping: multiple of the Gram matrix's mean diagonal that `optimal` adds to it.
        gradient_damping: the same of the Gram matrix of the output gradients.
    """

    mix: float = 0.25
    damping: float = 1e-3
    gradient_damping: float = 1e-2


@dataclass(frozen=True)
class LowRank:
    """W' = U V of rank r: u [out, r], v [r, in], float64; `notes` say what was out of the ordinary."""

    u: Tensor
    v: Tensor
    notes: tuple[str, ...] = ()


Solve = Callable[..., LowRank]
"""(weight [out, in] float64, rank) -> factors.

Of a method with `drift` also with the keyword output_cross [out, in], one of `Statistics`; of a method with `gradients`
with gradient_gram [out, out], of any scale.
"""


@dataclass(frozen=True)
class Method:
    """One way to make a weight low-rank.

    Attributes:
        prepare: (statistics, options) -> `Solve`; what linears on one input share is computed once, here.
        two_flows: whether it looks at the inputs of the compressed model too; if not, the sweep runs the dense only.
        dense_gram: whether a method of two flows wants the dense model's Gram matrix as well.
        drift: whether it makes up for what the values lack that outputs are added to (see `Statistics`).
        gradients: whether output errors are weighted by output gradients (see `optimal`).
        allocator: how ranks are shared out unless asked otherwise, a name in `allocators.ALLOCATORS`.
    """

    prepare: Callable[[Statistics, MethodOptions], Solve]
    two_flows: bool = False
    dense_gram: bool = False
    drift: bool = False
    gradients: bool = False
    allocator: str = "uniform"


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation (Eckart-Young) as left [m, r] times right [r, n].

    Taken from an eigendecomposition of the smaller of M M^T and M^T M, which is several times cheaper than an SVD; in
    float64 singular values down to 1e-8 of the largest stay accurate, and a truncation needs no more.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
        return left, left.T @ matrix
    right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
    return matrix @ right, right.T


def svd(statistics: Statistics, options: MethodOptions) -> Solve:
    """Truncated SVD of the weight: no look at the data."""
    return lambda weight, rank: LowRank(*truncate(weight, rank))


def asvd(statistics: Statistics, options: MethodOptions) -> Solve:
    """ASVD (arXiv 2312.05821, eq. 6): SVD of W diag(s), s the mean |x| of each input channel to the power 0.5."""
    scale = statistics.mean_abs.sqrt()
    dead = scale <= 1e-6 * scale.max()
    scale = torch.where(dead, torch.ones_like(scale), scale)
    notes = (f"{int(dead.sum())} dead input channels",) if bool(dead.any()) else ()

    def solve(weight: Tensor, rank: int) -> LowRank:
        u, v = truncate(weight * scale, rank)
        return LowRank(u, v / scale, notes)

    return solve


def svd_llm(statistics: Statistics, options: MethodOptions) -> Solve:
    """SVD-LLM (arXiv 2403.07378, section 3.1): SVD of W S with S S^T the dense model's Gram matrix."""
    whitening = gram_root(statistics.dense_gram, statistics.tokens)

    def solve(weight: Tensor, rank: int) -> LowRank:
        u, v = truncate(whitening.times(weight), rank)
        return LowRank(u, whitening.divided(v), whitening.notes)

    return solve


def fwsvd(statistics: Statistics, options: MethodOptions) -> Solve:
    """FWSVD (arXiv 2207.00112, section 4): SVD of D W, D^2 the Fisher information of each row of the weight.

    A row's Fisher information, summed over its numbers, is the sum of g^2 |x|^2 over tokens, g the gradient at its
    output. Here it is G's diagonal, for tokens of one norm |x|, which a norm layer in front makes them.
    """

    def solve(weight: Tensor, rank: int, gradient_gram: Tensor | None = None) -> LowRank:
        if gradient_gram is None:
            return LowRank(*truncate(weight, rank), ("no gradients: rows of one weight",))
        fisher = gradient_gram.diagonal().double().clamp(min=0)
        importance = (fisher + options.gradient_damping * fisher.mean()).sqrt()
        if not bool((importance > 0).all()):  # nothing depends on this output
            return LowRank(*truncate(weight, rank))
        u, v = truncate(importance[:, None] * weight, rank)
        return LowRank(u / importance[:, None], v)

    return solve


def lord(statistics: Statistics, options: MethodOptions) -> Solve:
    """LoRD (arXiv 2309.14021), as AFM and LLM-ROM (2312.07046): outputs projected onto their principal directions.

    Q Q^T W, Q the leading eigenvectors of the outputs' Gram matrix W A W^T in the model that is compressed up to here
    (as LLM-ROM has it). Without AFM's means, which take a bias that most layers have not.
    """

    def solve(weight: Tensor, rank: int) -> LowRank:
        outputs = weight @ statistics.gram @ weight.T
        leading = torch.linalg.eigh((outputs + outputs.T) / 2).eigenvectors[:, -rank:]
        return LowRank(leading, leading.T @ weight)

    return solve


def mpifa(statistics: Statistics, options: MethodOptions) -> Solve:
    """M as published (arXiv 2501.19090, section 4): SVD-LLM's start, then U once, then V once.

    U <- T V^T (V A V^T)^-1 and V <- U^+ (T + a W) (A + a I)^-1 with T = W (f B + (1 - f) A). The ridge a = 1e-3 is
    absolute on the summed statistics, as in the authors' code.
    """
    ridge = 1e-3
    gram, cross = statistics.gram, statistics.cross
    assert cross is not None  # noqa: S101  no sums of outputs are asked for, which could stand in for it
    mixed = options.mix * cross + (1 - options.mix) * gram  # W times this is sum y x_u^T for the target y
    start = svd_llm(statistics, options)
    ridged = gram.clone()
    ridged.diagonal().add_(ridge)
    regularised = gram_root(ridged, statistics.tokens)

    def divide(numerator: Tensor, root: Root) -> Tensor:
        return root.divided(root.divided_transposed(numerator))

    def solve(weight: Tensor, rank: int) -> LowRank:
        first = start(weight, rank)
        target = weight @ mixed
        u = divide(target @ first.v.T, gram_root(first.v @ gram @ first.v.T, statistics.tokens))
        full = divide(target + ridge * weight, regularised)
        return LowRank(u, torch.linalg.pinv(u) @ full, first.notes)

    return solve


def optimal(statistics: Statistics, options: MethodOptions) -> Solve:
    """The exact minimiser of M's objective at this rank (reduced-rank regression; SAES-SVD, arXiv 2602.03051).

    With L L^T = A + eps I and T = W (f B + (1 - f) A + eps I), the rank-r truncation of T L^-T, times L^-1. The
    regulariser, eps = damping * mean diagonal of A, pulls towards W and not towards 0. Where the statistics have a sum
    of outputs, it takes the place of W B.

    Where an error e at the output costs e^T G e, it is the rank-r truncation of R T L^-T, R^T R = G, between R^-1 and
    L^-1. With G the Gram matrix of the gradients at the output, `gradient_damping` of its mean diagonal added to it,
    that is to second order and in K-FAC's form how far predictions move; see `gradients`.
    """
    regression = Regression(statistics, mix=options.mix, damping=options.damping)

    def solve(
        weight: Tensor, rank: int, output_cross: Tensor | None = None, gradient_gram: Tensor | None = None
    ) -> LowRank:
        u, v, notes = regression.solve(weight, rank, output_cross, gradient_gram, options.gradient_damping)
        return LowRank(u, v, notes)

    return solve


METHODS: Mapping[str, Method] = {
    "two-sided": Method(optimal, two_flows=True, drift=True, gradients=True, allocator="global"),
    "optimal": Method(optimal, two_flows=True),
    "mpifa": Method(mpifa, two_flows=True, dense_gram=True),
    "svd-llm": Method(svd_llm),
    "lord": Method(lord, two_flows=True),
    "fwsvd": Method(fwsvd, gradients=True),
    "asvd": Method(asvd),
    "svd": Method(svd),
}
"""By the name that `CompressConfig(method=...)` and `pifa compress --method` take."""

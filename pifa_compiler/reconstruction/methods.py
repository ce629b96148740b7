"""M: low-rank weights from calibration statistics, in closed form, without training.

For a linear with dense weight W [out, in], X_u is its input when everything before it is compressed already, and X_o
its input in the dense model (columns are tokens). All that a method needs are sums over tokens, `Statistics`.

A method maps statistics to a function from (W, rank) to `LowRank` factors U [out, r], V [r, in]; `METHODS` names them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import Statistics


@dataclass(frozen=True)
class MethodOptions:
    """Knobs of the methods.

    Attributes:
        mix: f in the target Y = (1 - f) W X_u + f W X_o; the paper's recipe takes 0.25. With a drift the target is
            (1 - f) W X_u + f (W X_o + H_o - H_u): what brings the sum closer to that of the dense model.
        damping: multiple of the Gram matrix's mean diagonal that `optimal` adds to it.
        gradient_damping: the same of the Gram matrix of the output gradients, in `solve_weighted`.
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
"""(weight [out, in] float64, rank) -> factors; of a method with `drift` also (weight, rank, output_cross [out, in])."""


@dataclass(frozen=True)
class Method:
    """One way to make a weight low-rank.

    Attributes:
        prepare: (statistics, options) -> `Solve`; what linears on one input share is computed once, here.
        two_flows: whether it looks at the inputs of the compressed model too; if not, the sweep runs the dense only.
        dense_gram: whether a method of two flows wants the dense model's Gram matrix as well.
        drift: whether it makes up for what the values lack that outputs are added to (see `Statistics`).
        gradients: whether output errors are weighted by output gradients (see `solve_weighted`).
        allocator: how ranks are shared out unless asked otherwise, a name in `allocators.ALLOCATORS`.
    """

    prepare: Callable[[Statistics, MethodOptions], Solve]
    two_flows: bool = False
    dense_gram: bool = False
    drift: bool = False
    gradients: bool = False
    allocator: str = "uniform"


@dataclass(frozen=True)
class Root:
    """S [n, n] with S S^T = A, and its (pseudo-)inverse; `notes` say if A had no Cholesky factor."""

    root: Tensor
    inverse: Tensor
    notes: tuple[str, ...] = ()


def gram_root(gram: Tensor, tokens: int) -> Root:
    """A square root of a positive semidefinite [n, n] matrix: Cholesky, or an eigendecomposition where that fails.

    A singular Gram matrix (fewer tokens than channels, a dead channel) is no error: on the directions that the
    calibration never saw the inverse is 0.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not bool(failed) and bool((diagonal.abs() > 1e-7 * diagonal.abs().max()).all()):
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return Root(factor, torch.linalg.solve_triangular(factor, eye, upper=False))
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values[-1].clamp(min=0) * len(gram) * torch.finfo(gram.dtype).eps
    scale = torch.where(seen, values, 0).sqrt()
    inverse = torch.where(seen, 1 / torch.where(seen, scale, 1), 0)
    note = f"singular Gram matrix: rank {int(seen.sum())} of {len(gram)} channels from {tokens} tokens"
    return Root(vectors * scale, inverse[:, None] * vectors.T, (note,))


def _divide(numerator: Tensor, root: Root) -> Tensor:
    """numerator [m, n] times the (pseudo-)inverse of the matrix [n, n] whose root this is."""
    return numerator @ root.inverse.T @ root.inverse


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
        u, v = truncate(weight @ whitening.root, rank)
        return LowRank(u, v @ whitening.inverse, whitening.notes)

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
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    start = svd_llm(statistics, options)
    regularised = gram_root(gram + ridge * eye, statistics.tokens)

    def solve(weight: Tensor, rank: int) -> LowRank:
        first = start(weight, rank)
        target = weight @ mixed
        u = _divide(target @ first.v.T, gram_root(first.v @ gram @ first.v.T, statistics.tokens))
        full = _divide(target + ridge * weight, regularised)
        return LowRank(u, torch.linalg.pinv(u) @ full, first.notes)

    return solve


def optimal(statistics: Statistics, options: MethodOptions) -> Solve:
    """The exact minimiser of M's objective at this rank (reduced-rank regression; SAES-SVD, arXiv 2602.03051).

    With L L^T = A + eps I and T = W (f B + (1 - f) A + eps I), the rank-r truncation of T L^-T, times L^-1. The
    regulariser, eps = damping * mean diagonal of A, pulls towards W and not towards 0. Where the statistics have a sum
    of outputs, it takes the place of W B.
    """
    gram, f = statistics.gram, options.mix
    eps = options.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whitening = gram_root(gram + eps, statistics.tokens)
    kept = ((1 - f) * gram + eps) @ whitening.inverse.T
    whitened = None if statistics.cross is None else kept + f * statistics.cross @ whitening.inverse.T
    few = statistics.tokens < len(gram)
    notes = (*whitening.notes, *((f"{statistics.tokens} tokens for {len(gram)} channels",) if few else ()))

    def solve(weight: Tensor, rank: int, output_cross: Tensor | None = None) -> LowRank:
        if output_cross is not None:
            target = weight @ kept + f * output_cross @ whitening.inverse.T
        else:
            assert whitened is not None  # noqa: S101  B is missing only where all linears have sums of outputs
            target = weight @ whitened
        u, v = truncate(target, rank)
        return LowRank(u, v @ whitening.inverse, notes)

    return solve


def solve_weighted(
    solve: Solve, weight: Tensor, rank: int, gradient_gram: Tensor, options: MethodOptions, *output_cross: Tensor
) -> LowRank:
    """A method's answer where an error e at the output costs e^T G e instead of e^T e.

    The weight R W with R^T R = G is made low-rank, and R taken off again: for `optimal` that is the exact minimiser,
    the rank-r truncation of R T L^-T, between R^-1 and L^-1. With G the Gram matrix of the gradients at the output
    this is, to second order and in K-FAC's form, how far predictions move; see `output_gradients`.

    Args:
        solve: what the method's `prepare` gave.
        weight: [out, in], float64.
        rank: of the result.
        gradient_gram: G, [out, out], any scale; `options.gradient_damping` of its mean diagonal is added to it.
        options: of the method.
        output_cross: [out, in], float64, where a method asks for it and there is one.
    """
    gram = gradient_gram.double()
    scale = float(gram.diagonal().mean())
    if scale <= 0:  # nothing downstream reads this output, so no error matters more than another
        return solve(weight, rank, *output_cross)
    root = damped_root(gram / scale, options.gradient_damping)
    found = solve(root.root.T @ weight, rank, *(root.root.T @ each for each in output_cross))
    return LowRank(root.inverse.T @ found.u, found.v, (*found.notes, *root.notes))


def damped_root(gram: Tensor, damping: float) -> Root:
    """A square root of gram + damping I, both of it positive semidefinite but for rounding, gram [n, n].

    Sums in float32 have small negative eigenvalues, which a small damping does not make up for: they count as 0.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + damping * eye)
    # A factor that rounding alone kept from failing has columns without meaning.
    if not bool(failed) and bool((factor.diagonal().square() >= damping / 2).all()):
        return Root(factor, torch.linalg.solve_triangular(factor, eye, upper=False))
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    scale = (values.clamp(min=0) + damping).sqrt()
    note = f"Gram matrix of the output gradients is not positive definite at damping {damping:g}: eigenvalues clamped"
    return Root(vectors * scale, (vectors / scale).T, (note,))


METHODS: Mapping[str, Method] = {
    "two-sided": Method(optimal, two_flows=True, drift=True, gradients=True, allocator="global"),
    "optimal": Method(optimal, two_flows=True),
    "mpifa": Method(mpifa, two_flows=True, dense_gram=True),
    "svd-llm": Method(svd_llm),
    "asvd": Method(asvd),
    "svd": Method(svd),
}
"""By the name that `CompressConfig(method=...)` and `pifa compress --method` take."""

"""Factorization: a low-rank weight as pivot rows and coefficients.

`factorize` makes `PifaFactors` from a weight or from a pair of low-rank factors; `rank_for_density` says which rank a
budget of stored numbers allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .errors import RankError

Pivoting = Literal["lu", "qr"]

MAXVOL_BOUND = 1.02
"""Swaps go on until no coefficient exceeds this; at 1 the pivot rows span a locally maximal volume.

A stored coefficient is above it by its rounding at most.
"""

PIVOT_NOISE = 32
"""An LU's smallest pivot, relative to its largest, means independent columns above this times size * eps of its dtype.

Of products one rank short the smallest pivot was at most 7.5 size eps, of random matrices of full rank at least 0.03
(64 to 2048 rows, nearly square and twice as high, float32 and float64). To be in doubt costs time, and to be wrong
costs a superfluous rank: the factors represent the weight in either case.
"""

REFIT_DAMPING = 1e-6
"""Share of their mean diagonal that is added to the normal equations which make coefficients fit rounded pivot rows.

Above the noise of float32 products in these equations, so that it is not amplified. In directions of less weight there
is nothing to gain: rounding the coefficients, which comes after, loses a million times what is left there.
"""

PROBES = 16
"""Random vectors that a norm is estimated by, to one part in sqrt(2 * 16) or better."""

_SAFE_EXPONENT = 200
"""Weights beyond 2 to plus or minus this (1e60) are scaled first, so that squares of U V stay within float64."""

_CONTINUOUS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FactorQuality:
    """How good a factorization is, as numbers to put into a report.

    Attributes:
        max_coeff: largest |coefficient|; rounding errors of the pivot rows grow by about this much.
        condition: of the pivot rows of an orthonormal basis of the column space, in the 2-norm: a bound, estimated by
            power iteration on the coefficients.
        error: relative Frobenius error of the stored factors against the given weight, estimated by `PROBES` vectors.
    """

    max_coeff: float
    condition: float
    error: float


@dataclass(frozen=True)
class PifaFactors:
    """A weight [out, in] of rank r in PIFA form.

    Attributes:
        w_pivot: the pivot rows, [r, in].
        coeff: the other rows as combinations of the pivot rows, [out - r, r].
        pivots: which output rows the pivot rows are, [r], int64, ascending; the other rows follow in ascending order.
        quality: how well they represent the weight that they were made from.
    """

    w_pivot: Tensor
    coeff: Tensor
    pivots: Tensor
    quality: FactorQuality

    @property
    def rank(self) -> int:
        """Number of pivot rows."""
        return self.w_pivot.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight they represent."""
        return self.rank + self.coeff.shape[0], self.w_pivot.shape[1]

    def order(self) -> Tensor:
        """The gather index of `pifa::linear`, [out], int64."""
        return row_order(self.pivots, self.shape[0])

    def dense(self) -> Tensor:
        """The weight they represent, [out, in]."""
        return torch.cat((self.w_pivot, self.coeff @ self.w_pivot))[self.order()]


def factors_of_zero(out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> PifaFactors:
    """A weight of zeros at rank 1, which `factorize` refuses, as there is nothing to choose pivot rows by."""
    w_pivot = torch.zeros(1, in_features, dtype=dtype, device=device)
    coeff = torch.zeros(out_features - 1, 1, dtype=dtype, device=device)
    pivots = torch.zeros(1, dtype=torch.int64, device=device)
    return PifaFactors(w_pivot, coeff, pivots, FactorQuality(max_coeff=0.0, condition=1.0, error=0.0))


def row_order(pivots: Tensor, d_out: int) -> Tensor:
    """The gather index that puts rows stored as [pivots, others] back: [..., out], int64.

    Args:
        pivots: the pivot rows' places in the output, [..., r], any integer dtype.
        d_out: number of rows.
    """
    pivots = pivots.long()
    is_pivot = torch.zeros(*pivots.shape[:-1], d_out, dtype=torch.bool, device=pivots.device).scatter(-1, pivots, True)
    others = is_pivot.argsort(dim=-1, stable=True)[..., : d_out - pivots.shape[-1]]
    return torch.argsort(torch.cat((pivots, others), dim=-1), dim=-1)


def stored_numbers(d_out: int, d_in: int, rank: int) -> int:
    """Numbers that the PIFA form of a [d_out, d_in] weight stores at `rank`, the row order's indices included."""
    return rank * (d_out + d_in - rank) + rank


def with_rank(factors: PifaFactors, rank: int) -> PifaFactors:
    """The same weight stored with `rank` rows, more than it needs: its first other rows become pivot rows too.

    Raises:
        RankError: it has more pivot rows, or fewer rows in all.
    """
    more = rank - factors.rank
    if not 0 <= more <= len(factors.coeff):
        raise RankError(f"{factors.rank} pivot rows of {factors.shape[0]} were made, and {rank} are wanted")
    if more == 0:
        return factors
    others = factors.order().argsort()[factors.rank :]
    pivots, at = torch.cat((factors.pivots, others[:more])).sort()
    rows = torch.cat((factors.w_pivot, factors.coeff[:more] @ factors.w_pivot))
    coeff = torch.nn.functional.pad(factors.coeff[more:], (0, more))
    return replace(factors, w_pivot=rows[at], coeff=coeff[:, at], pivots=pivots)


def rank_for_density(d_out: int, d_in: int, density: float, *, multiple: int = 1) -> int:
    """Largest rank whose PIFA form stores at most a share `density` of a dense weight's numbers.

    Rank r stores r * (d_out + d_in - r) weights and r indices (Zhao et al., ICML 2025; see `stored_numbers`).

    Args:
        d_out, d_in: rows and columns of the weight, [d_out, d_in].
        density: stored numbers / (d_out * d_in), in (0, 1]; a share, not a percentage.
        multiple: the rank is rounded down to a multiple of this (matrix units are faster there), unless that leaves 0.

    Raises:
        RankError: `density` is outside (0, 1], or leaves no room for rank 1.
    """
    if not 0 < density <= 1:
        raise RankError(f"density must lie in (0, 1], got {density}; 0.5 halves the stored numbers")
    if multiple < 1:
        raise RankError(f"the rank multiple must be 1 or more, got {multiple}")
    total, budget = d_out + d_in + 1, int(density * d_out * d_in)
    # r (total - r) <= budget, by the exact integer root; past total / 2 the cost falls again and is of no use.
    rank = min((total - math.isqrt(max(total * total - 4 * budget, 0))) // 2, d_out, d_in)
    while rank > 0 and stored_numbers(d_out, d_in, rank) > budget:
        rank -= 1
    if rank < 1:
        raise RankError(f"density {density} of a {d_out}x{d_in} weight leaves no room for rank 1; raise it")
    return rank - rank % multiple if rank >= multiple else rank


def factorize(
    weight: Tensor | tuple[Tensor, Tensor],
    *,
    rank: int | None = None,
    pivoting: Pivoting = "lu",
    gram: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> PifaFactors:
    """Writes a low-rank weight as pivot rows and coefficients (arXiv 2501.19090, section 3).

    The pivot rows are chosen from the column space alone: rows of U are independent exactly where rows of U V are. They
    are rounded to the storage dtype first, and the coefficients are then solved against the *rounded* rows, so that the
    other rows make up for the rounding.

    Args:
        weight: the weight [out, in], or its factors (U [out, r], V [r, in]) with weight = U V; any floating dtype.
        rank: rank to keep. None keeps the numerical rank. Below that rank the nearest weight of this rank is taken
            (Eckart-Young), above it the rank is lowered to it: there are no more independent rows.
        pivoting: "lu" (row-pivoted LU, then maxvol swaps until no coefficient exceeds `MAXVOL_BOUND`) or "qr" (QR with
            column pivoting of U^T).
        gram: input Gram matrix sum x x^T, [in, in]; the rounding loss is made small on these inputs instead of on
            white noise. Used where the storage dtype is a half precision.
        dtype: storage dtype of the result; None keeps the dtype of `weight`.

    Raises:
        RankError: the weight is not finite, is zero, `rank` is outside 1..min(out, in), or the storage dtype
            has no room for the pivot rows: these are rows of the weight, so that their scale is not free to choose.
    """
    given = _Given.of(weight)
    _check_rank(given.shape, rank)
    space = _column_space(given, rank, orthonormal=pivoting == "qr")
    pivots = _choose_pivots(space, pivoting)
    return _with_pivots(given, space, pivots, gram, dtype or given.dtype)


def factorize_losslessly(weight: Tensor | tuple[Tensor, Tensor], *, rank: int | None = None) -> PifaFactors:
    """As `factorize`, in the weight's own dtype, where nothing but rounding may be lost: of no row either.

    What factors lose is small beside the weight as a whole. Where single numbers are larger than others by more orders
    of magnitude than can be told from noise, rows without them could be lost in that altogether.

    Args:
        weight: as in `factorize`.
        rank: the numerical rank, if it is known.

    Raises:
        RankError: as in `factorize`, or more than half of a row would be lost.
    """
    factors, given = factorize(weight, rank=rank), _Given.of(weight)
    w_pivot = _times_power_of_two(factors.w_pivot.double(), -given.exponent)
    x = _probes(w_pivot)
    got = torch.cat((w_pivot @ x, factors.coeff.double() @ (w_pivot @ x)))[factors.order()]
    u, v = given.u.double(), None if given.v is None else given.v.double()
    wanted, of_columns = (u @ x, 1) if v is None else (u @ (v @ x), v.norm(dim=1))
    sizes, lost = (u * of_columns).norm(dim=1), (got - wanted).norm(dim=1) / math.sqrt(PROBES)
    if bool(((lost > sizes / 2) & (sizes > 0)).any()):  # of rows that are zero, the noise of float64 is left
        raise RankError(
            f"rows of this weight {list(given.shape)} would be lost beside others that are larger by orders of "
            "magnitude; leave it as it is"
        )
    return factors


def factorize_jointly(
    weights: Sequence[Tensor | tuple[Tensor, Tensor]],
    *,
    gram: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[PifaFactors]:
    """Factorizes weights whose outputs meet (gate and up of an MLP) with the *same* pivot rows, so with one row order.

    Swaps go on until no exchange of a row enlarges the product of the volumes that the pivot rows span in each weight.
    Single coefficients are not bounded by that as they are in `factorize`; on random and on real weights the largest
    was below 4.

    Args:
        weights: each as in `factorize`, all with as many rows. All get the smallest of their numerical ranks.
        gram, dtype: as in `factorize`; `gram` is that of the input they share.

    Raises:
        RankError: as in `factorize`, the weights differ in their number of rows, or no rows were found that are
            independent in all of them.
    """
    all_given = [_Given.of(weight) for weight in weights]
    if len({given.shape[0] for given in all_given}) != 1:
        shapes = [list(given.u.shape) for given in all_given]
        raise RankError(f"weights whose outputs meet must have as many rows, got U or W of {shapes}")
    spaces = [_column_space(given, None) for given in all_given]
    rank = min(space.rank for space in spaces)
    spaces = [
        space if space.rank == rank else _column_space(given, rank)
        for given, space in zip(all_given, spaces, strict=True)
    ]
    try:
        pivots = _maxvol([space.basis for space in spaces], spaces[0].independent_rows()).sort().values
    except LinAlgError as error:
        raise RankError(
            f"independent rows of one weight depend on each other in another ({error}); factorize them one by one"
        ) from error
    return [
        _with_pivots(given, space, pivots, gram, dtype or given.dtype)
        for given, space in zip(all_given, spaces, strict=True)
    ]


@dataclass(frozen=True)
class _Given:
    """A weight u v, or u where v is None, times 2^-exponent, so that squares of its numbers stay within float64.

    Attributes:
        u, v: [out, r] and [r, in], as they came unless they were too large or too small.
        exponent: 0 unless they were.
        dtype: that u came in.
    """

    u: Tensor
    v: Tensor | None
    exponent: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor | tuple[Tensor, Tensor]) -> "_Given":
        u, v = (weight, None) if isinstance(weight, Tensor) else weight
        _check(u, v)
        scaled, exponent = _within_range(u)
        if v is None:
            return cls(scaled, None, exponent, u.dtype)
        right, exponent_of_v = _within_range(v)
        return cls(scaled, right, exponent + exponent_of_v, u.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.u.shape[0], (self.u if self.v is None else self.v).shape[1]


def _within_range(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix times 2^-exponent and the exponent: 0 unless its numbers lie beyond 2^+-`_SAFE_EXPONENT`."""
    exponent = _exponent(matrix)
    if abs(exponent) <= _SAFE_EXPONENT:
        return matrix, 0
    return _times_power_of_two(matrix.double(), -exponent), exponent


def _exponent(matrix: Tensor) -> int:
    """e, so that the largest number is below 2^e in size, and not below half of that; 0 for zeros."""
    return math.frexp(float(matrix.abs().max()))[1] if matrix.numel() else 0


def _times_power_of_two(matrix: Tensor, exponent: int) -> Tensor:
    """Exact but for over- and underflow; in two steps, since 2^exponent itself may be outside of float64."""
    bounded = max(-2000, min(exponent, 2000))  # that many binary orders lie outside of it whatever they are times
    return matrix if exponent == 0 else matrix * 2.0 ** (bounded // 2) * 2.0 ** (bounded - bounded // 2)


@dataclass(frozen=True)
class _Space:
    """A weight [out, in] of rank r as a product, and a well-conditioned basis of its column space; float64.

    Attributes:
        left, right: [out, r] and [r, in], the weight is left right.
        basis: [out, r], spans what `left` spans.
        rows: r independent rows of the basis, if they are known.
    """

    left: Tensor
    right: Tensor
    basis: Tensor
    rows: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def independent_rows(self) -> Tensor:
        """r independent rows, as an LU with row pivoting takes them: [r], int64."""
        return _lu_basis(self.basis)[1] if self.rows is None else self.rows


def _with_pivots(
    given: _Given,
    space: _Space,
    pivots: Tensor,
    gram: Tensor | None,
    storage: torch.dtype,
) -> PifaFactors:
    """The factors of a weight once its pivot rows are chosen.

    Raises:
        RankError: they over- or underflow in the storage dtype.
    """
    others = torch.ones(space.basis.shape[0], dtype=torch.bool, device=pivots.device)
    others[pivots] = False
    rows = space.left[pivots] @ space.right
    w_pivot = _times_power_of_two(rows, given.exponent).to(storage)
    rounded = _times_power_of_two(w_pivot.double(), -given.exponent)
    _check_stored(rows, rounded, given.exponent, storage)
    exact = torch.linalg.solve(space.basis[pivots], space.basis[others], left=False)
    coeff = exact if storage in (torch.float64, torch.float32) else _fit_to_rounded(exact, rows, rounded, gram)
    coeff = coeff.to(storage)
    if not bool(torch.isfinite(coeff).all()):
        raise RankError(f"the coefficients are not finite in {storage}: the pivot rows depend on each other")
    quality = FactorQuality(
        max_coeff=float(coeff.abs().max()) if coeff.numel() else 0.0,
        condition=_condition(exact),
        error=_probe_error(given, rounded, coeff, pivots, others),
    )
    return PifaFactors(w_pivot.contiguous(), coeff.contiguous(), pivots, quality)


def _check_stored(rows: Tensor, stored: Tensor, exponent: int, dtype: torch.dtype) -> None:
    """Refuses pivot rows that are not finite in `dtype`, or lost more than rounding costs.

    To round a number of a dtype's normal range costs eps / 2 of it at most, so that many numbers lose no more together.
    Twice that is allowed: what a few numbers below the normal range lose beyond it can hardly be told from rounding.

    Args:
        rows, stored: before and after rounding, [r, in], float64, times 2^-exponent.
    """
    if bool((stored - rows).norm() <= torch.finfo(dtype).eps * rows.norm()):  # never true of NaN and Inf
        return
    largest, info = float(_times_power_of_two(rows.abs().max(), exponent)), torch.finfo(dtype)
    raise RankError(
        f"the pivot rows, of numbers up to {largest:.3g}, do not fit into {dtype}: it holds numbers up to "
        f"{info.max:.3g}, and those below {info.tiny:.3g} without full precision; ask for a wider dtype, scale the "
        "weight, or leave it as it is"
    )


def _condition(coeff: Tensor, steps: int = 10) -> float:
    """How ill-conditioned the pivot rows Q_p of an orthonormal basis are, from the coefficients C [out - r, r] alone.

    Q = [I; C] Q_p has orthonormal columns, so (Q_p Q_p^T)^-1 = I + C^T C and |Q_p^-1| = sqrt(1 + |C|^2), which bounds
    the condition number since |Q_p| <= 1. |C| is estimated by power iteration, from below.
    """
    if coeff.numel() == 0:
        return 1.0
    generator = torch.Generator(device="cpu").manual_seed(0)
    vector = torch.randn(coeff.shape[1], generator=generator, dtype=coeff.dtype).to(coeff.device)
    norm = 0.0
    for _ in range(steps):
        image = coeff @ (vector / vector.norm().clamp(min=torch.finfo(coeff.dtype).tiny))
        norm, vector = float(image.norm()), coeff.T @ image
    return math.sqrt(1 + norm**2)


def numerical_rank(weight: Tensor) -> int:
    """Rank of a stored weight [out, in], up to the rounding of its own dtype.

    Rounding adds noise of standard deviation eps * rms / (2 sqrt 3) at most to every entry, whose largest singular
    value is that times (sqrt out + sqrt in). Singular values below twice this are noise; in float32 and float64 those
    below eight times this, since there the sums that made the weight were rounded along the way too.
    """
    dtype = weight.dtype
    weight, _ = _within_range(weight)
    singular = torch.linalg.svdvals(weight.double())
    return int((singular > _noise_level(weight, float(singular[0]), dtype)).sum())


def _noise_level(weight: Tensor, largest: float, dtype: torch.dtype) -> float:
    """The singular value below which there is only noise, of a weight that came in `dtype`; `largest` is its first."""
    rms = float(weight.double().square().mean().sqrt())
    spread = math.sqrt(weight.shape[0]) + math.sqrt(weight.shape[1])
    factor = 8 if dtype in (torch.float32, torch.float64) else 2
    stored = factor * torch.finfo(dtype).eps * rms * spread / (2 * math.sqrt(3))
    computed = largest * max(weight.shape) * torch.finfo(torch.float64).eps
    return max(stored, computed)


def _check(u: Tensor, v: Tensor | None) -> None:
    for name, matrix in (("weight" if v is None else "U", u), ("V", v)):
        if matrix is None:
            continue
        if matrix.ndim != 2 or matrix.dtype not in _CONTINUOUS:
            raise RankError(f"{name} must be a floating-point matrix, got {matrix.dtype} {list(matrix.shape)}")
        if matrix.numel() == 0:
            raise RankError(f"{name} {list(matrix.shape)} is empty: nothing to factorize")
        if not bool(torch.isfinite(matrix).all()):
            raise RankError(f"{name} {list(matrix.shape)} holds NaN or Inf; repair or skip this layer")
    if v is not None and u.shape[1] != v.shape[0]:
        raise RankError(f"U {list(u.shape)} and V {list(v.shape)} do not chain: U's columns must be V's rows")


def _check_rank(shape: tuple[int, int], rank: int | None) -> None:
    limit = min(shape)
    if rank is not None and not 1 <= rank <= limit:
        raise RankError(f"rank must lie in 1..{limit} for this weight, got {rank}")


def _column_space(given: _Given, rank: int | None, *, orthonormal: bool = False) -> _Space:
    """The weight at the rank to keep; its basis orthonormal if asked for."""
    u, v = given.u, given.v
    if v is None:
        left, singular, right = torch.linalg.svd(u.double(), full_matrices=False)
        available = int((singular > _noise_level(u, float(singular[0]), given.dtype)).sum())
        mixed = singular[:, None] * right
    else:
        if not orthonormal and rank in (None, u.shape[1]) and (space := _space_of_full_pair(u, v)) is not None:
            return space
        left, triangle = torch.linalg.qr(u.double())
        mixed = triangle @ v.double()
        # Only a small product needs an SVD: the pair's numerical rank shows in [r, in], and usually it is full.
        wanted = min(*mixed.shape, rank or mixed.shape[0])
        available = _full_row_rank(mixed) if wanted == mixed.shape[0] else -1
        if available < wanted:
            rotation, singular, right = torch.linalg.svd(mixed, full_matrices=False)
            available = int((singular > singular[:1] * max(mixed.shape) * torch.finfo(torch.float64).eps).sum())
            left, mixed = left @ rotation, singular[:, None] * right
    keep = available if rank is None else min(rank, available)
    if keep < 1:
        raise RankError(f"the weight {[u.shape[0], mixed.shape[1]]} is zero: nothing to factorize; leave it dense")
    return _Space(left[:, :keep], mixed[:keep], left[:, :keep])


def _space_of_full_pair(u: Tensor, v: Tensor) -> _Space | None:
    """A pair whose columns of U and rows of V are clearly independent, by LUs alone; None if that is not sure.

    The triangle L of U's LU spans what U spans and is well conditioned whatever U is. A third of the work of QRs.
    """
    if u.shape[1] > min(u.shape[0], v.shape[1]):
        return None
    left, right = u.double(), v.double()
    basis, rows, smallest = _lu_basis(left)
    if not smallest > PIVOT_NOISE * max(u.shape) * torch.finfo(torch.float64).eps:
        return None
    unit = torch.nn.functional.normalize(right, dim=1, eps=torch.finfo(torch.float64).tiny)
    # In float32 first, for half the time; what its rounding noise leaves in doubt is looked at in float64.
    for dtype in (torch.float32, torch.float64):
        smallest = _smallest_pivot(_lu_factor(unit.T.to(dtype))[0])
        if smallest > PIVOT_NOISE * max(v.shape) * torch.finfo(dtype).eps:
            return _Space(left, right, basis, rows)
    return None


def _lu_basis(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """L [m, n] of an LU with row pivoting, its rows as the matrix has them; the pivot rows [n]; the smallest pivot."""
    lu, swaps = _lu_factor(matrix)
    rows = list(range(matrix.shape[0]))
    for i, j in enumerate((swaps - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    triangle = lu.tril(-1)
    triangle.diagonal().fill_(1)
    order = torch.tensor(rows, device=matrix.device)
    basis = torch.empty_like(triangle)
    basis[order] = triangle
    return basis, order[: matrix.shape[1]], _smallest_pivot(lu)


def _lu_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The LU of [m, n], m >= n, with row pivoting, packed as LAPACK packs it, and its n swaps, which count from 1.

    On GPUs torch gives matrices that are not square to a batched routine of MAGMA's, which prints a warning where they
    are large. Square ones go to cuSOLVER, and columns of zeros change nothing.
    """
    rows, columns = matrix.shape
    if matrix.is_cuda:
        matrix = torch.nn.functional.pad(matrix, (0, rows - columns))
    lu, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    return lu[:, :columns], swaps[:columns]


def _smallest_pivot(lu: Tensor) -> float:
    """Of an LU decomposition, relative to the largest; 0 for a zero matrix."""
    pivots = lu.diagonal().abs()
    return float(pivots.min() / pivots.max()) if float(pivots.max()) > 0 else 0.0


def _full_row_rank(mixed: Tensor) -> int:
    """Number of rows of `mixed` [r, in] if they are independent in float64, else -1; a QR costs less than an SVD."""
    diagonal = torch.linalg.qr(mixed.T, mode="r").R.diagonal().abs()
    threshold = max(mixed.shape) * torch.finfo(torch.float64).eps
    full = mixed.shape[0] <= mixed.shape[1] and bool((diagonal > threshold * diagonal.max()).all())
    return mixed.shape[0] if full else -1


def _choose_pivots(space: _Space, pivoting: Pivoting) -> Tensor:
    """The rows of the weight to keep, [r], int64, ascending."""
    if pivoting == "qr":
        return _greedy_rows(space.basis).sort().values
    if pivoting != "lu":
        raise RankError(f'pivoting must be "lu" or "qr", got {pivoting!r}')
    return _maxvol([space.basis], space.independent_rows()).sort().values


def _greedy_rows(basis: Tensor) -> Tensor:
    """QR with column pivoting of basis^T: each row is the one farthest from the span of those before it."""
    residual = basis.clone()
    chosen = torch.empty(basis.shape[1], dtype=torch.int64, device=basis.device)
    for k in range(basis.shape[1]):
        row = int(residual.square().sum(dim=1).argmax())
        direction = residual[row] / residual[row].norm()
        residual -= torch.outer(residual @ direction, direction)
        residual[row] = 0
        chosen[k] = row
    return chosen


def _maxvol(bases: Sequence[Tensor], pivots: Tensor) -> Tensor:
    """Swaps pivot rows for others as long as that enlarges the volume the pivots span (Goreinov et al., 2010).

    With several bases [out, r], the product of their volumes. Swaps are made in blocks, each one update by a matrix
    product: with C the coefficients of the other rows, exchanging rows I of them for the pivots J gives

        C' = C - C[:, J] S^-1 (C[I, :] - E_J)        S = C[I, J]

    where rows I, which now stand for the old pivots, start from E_J instead of C. The volume grows by |det S|, of which
    every factor is made sure to be MAXVOL_BOUND or more. C is kept transposed, [r, out - r]: its columns are what is
    searched, and so are contiguous.
    """
    pivots = pivots.clone()
    is_other = torch.ones(bases[0].shape[0], dtype=torch.bool, device=pivots.device)
    is_other[pivots] = False
    others = torch.nonzero(is_other).squeeze(-1)
    if len(others) == 0:
        return pivots
    # float32 will do: these coefficients only choose rows, and those in the result are solved for anew.
    coeffs = [
        torch.linalg.solve(basis[pivots].T.float(), basis[others].T.float()).contiguous()  # solve gives columns
        for basis in bases
    ]
    budget = 4 * len(pivots)  # each swap grows the volume by MAXVOL_BOUND or more, so this is hardly ever used up
    while budget > 0:
        rows, columns = _growing_swaps(coeffs)
        if len(rows) == 0:
            break
        for coeff in coeffs:
            change, exchanged = coeff[:, rows], coeff[columns]
            change[columns, torch.arange(len(rows))] -= 1
            step = torch.linalg.solve(exchanged[:, rows], change, left=False)
            coeff.addmm_(step, exchanged, alpha=-1)
            coeff[:, rows] = -step
            coeff[columns, rows] += 1
        pivots[columns], others[rows] = others[rows], pivots[columns]
        budget -= len(rows)
    return pivots


def _growing_swaps(coeffs: Sequence[Tensor], most: int = 96) -> tuple[Tensor, Tensor]:
    """Rows and columns of swaps to make together, the best first; none if the volume is locally maximal.

    Args:
        coeffs: coefficients, transposed: [r, out - r].
        most: number of swaps.
    """
    growth = coeffs[0].abs() if len(coeffs) == 1 else torch.stack([coeff.abs() for coeff in coeffs]).prod(dim=0)
    best = growth.amax(dim=1)
    candidates = best.argsort(descending=True)[: 2 * most]
    candidates = candidates[best[candidates] > MAXVOL_BOUND]
    tried: dict[int, int] = {}
    for row, column in zip(growth[candidates].argmax(dim=1).tolist(), candidates.tolist(), strict=True):
        tried.setdefault(row, column)
    rows, columns = torch.tensor(list(tried)[:most]), torch.tensor(list(tried.values())[:most])
    if len(rows) == 0:
        return rows, columns
    blocks = [coeff[columns][:, rows] for coeff in coeffs]
    accepted = []
    for k in range(len(rows)):  # Gaussian elimination; a swap that would not help any more after those before is left
        if math.prod(abs(float(block[k, k])) for block in blocks) <= MAXVOL_BOUND:
            continue
        accepted.append(k)
        for block in blocks:
            block[k + 1 :, k + 1 :] -= torch.outer(block[k + 1 :, k], block[k, k + 1 :]) / block[k, k]
    return rows[accepted], columns[accepted]


def _fit_to_rounded(coeff: Tensor, exact: Tensor, rounded: Tensor, gram: Tensor | None) -> Tensor:
    """Coefficients that map the rounded pivot rows [r, in] to what `coeff` maps the exact ones to, on inputs of `gram`.

    Solves for a correction, so that a singular Gram matrix leaves `coeff` as it is instead of failing. Rows that depend
    on each other but for little have it large where it is of little use: a row of coefficients whose largest would
    exceed `MAXVOL_BOUND` by it goes without.
    """
    if coeff.numel() == 0:
        return coeff
    exponent = -_exponent(exact)  # squares of what bfloat16 holds may lie outside of float32
    rows = _times_power_of_two(rounded, exponent).float()
    lost = _times_power_of_two(exact - rounded, exponent).float()
    if gram is None:
        weighted = rows
    else:
        weighted = rows @ (gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)).float()
    normal = (weighted @ rows.T).double()
    normal.diagonal().add_(REFIT_DAMPING * normal.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex((normal + normal.T) / 2)
    if bool(failed):
        return coeff
    correction = torch.cholesky_solve((weighted @ lost.T).double(), factor).T
    fitted = coeff + (coeff.float() @ correction.float()).double()
    limit = coeff.abs().amax(dim=1, keepdim=True).clamp(min=MAXVOL_BOUND)
    return torch.where(fitted.abs().amax(dim=1, keepdim=True) <= limit, fitted, coeff)


def rounding_error(w_pivot: Tensor, coeff: Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    """What it costs a layer in PIFA form to have its factors rounded to `dtype`, as `model.to(dtype)` does.

    The relative Frobenius error of the dense weight that they represent, estimated by `PROBES` vectors. It is at least
    that of a dense weight, which is rounded once (0.0017 in bfloat16), and grows with the coefficients. `factorize` in
    that dtype does better: its coefficients make up for part of the rounding of the pivot rows.

    Args:
        w_pivot: [r, in], any floating dtype.
        coeff: [out - r, r].
    """
    x = _probes(w_pivot)
    exact, rounded = (
        torch.cat((pivot @ x, other @ (pivot @ x)))
        for pivot, other in (
            (w_pivot.double(), coeff.double()),
            (w_pivot.to(dtype).double(), coeff.to(dtype).double()),
        )
    )
    return float((rounded - exact).norm() / exact.norm()) if bool(exact.any()) else 0.0


def _probe_error(given: _Given, w_pivot: Tensor, coeff: Tensor, pivots: Tensor, others: Tensor) -> float:
    """Relative error of the factors, their pivot rows scaled as what was given is."""
    x = _probes(w_pivot)
    wanted = given.u.double() @ (x if given.v is None else given.v.double() @ x)
    got = torch.empty_like(wanted)
    got[pivots] = w_pivot @ x
    got[others] = coeff.double() @ got[pivots]
    return float((got - wanted).norm() / wanted.norm())


def _probes(w_pivot: Tensor) -> Tensor:
    """[in, PROBES], the same ones every time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(w_pivot.shape[1], PROBES, generator=generator, dtype=torch.float64).to(w_pivot.device)

"""Factorization: a low-rank weight as pivot rows and coefficients.

`factorize` makes `PifaFactors` from a weight or from a pair of low-rank factors; `rank_for_density` says which rank a
budget of stored numbers allows.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import RankError

Pivoting = Literal["lu", "qr"]

MAXVOL_BOUND = 1.02
"""Swaps go on until no coefficient exceeds this; at 1 the pivot rows span a locally maximal volume."""

_CONTINUOUS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FactorQuality:
    """How good a factorization is, as numbers to put into a report.

    Attributes:
        max_coeff: largest |coefficient|; rounding errors of the pivot rows grow by about this much.
        condition: 1-norm condition number of the pivot rows of an orthonormal basis of the column space.
        error: relative Frobenius error of the stored factors against the given weight, estimated by 16 random probes.
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


def row_order(pivots: Tensor, d_out: int) -> Tensor:
    """The gather index that puts rows stored as [pivots, others] back: [d_out], int64.

    Args:
        pivots: the pivot rows' places in the output, [r], any integer dtype.
        d_out: number of rows.
    """
    is_pivot = torch.zeros(d_out, dtype=torch.bool, device=pivots.device)
    is_pivot[pivots.long()] = True
    others = torch.nonzero(~is_pivot).squeeze(-1)
    return torch.argsort(torch.cat((pivots.long(), others)))


def stored_numbers(d_out: int, d_in: int, rank: int) -> int:
    """Numbers that the PIFA form of a [d_out, d_in] weight stores at `rank`, the row order's indices included."""
    return rank * (d_out + d_in - rank) + rank


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
        RankError: the weight is not finite, is zero, or `rank` is outside 1..min(out, in).
    """
    u, v = (weight, None) if isinstance(weight, Tensor) else weight
    storage = dtype or u.dtype
    _check(u, v, rank)
    basis, mixed = _column_space(u, v, rank)
    pivots = _choose_pivots(basis, pivoting)
    others = torch.ones(basis.shape[0], dtype=torch.bool, device=basis.device)
    others[pivots] = False

    w_pivot = (basis[pivots] @ mixed).to(storage)
    lu = torch.linalg.lu_factor(basis[pivots])
    exact = torch.linalg.lu_solve(*lu, basis[others], left=False)
    coeff = _fit_to_rounded(exact, basis[pivots] @ mixed, w_pivot, gram).to(storage)
    inverse = torch.linalg.lu_solve(*lu, torch.eye(len(pivots), dtype=basis.dtype, device=basis.device))
    quality = FactorQuality(
        max_coeff=float(coeff.abs().max()) if coeff.numel() else 0.0,
        condition=float(torch.linalg.matrix_norm(basis[pivots], 1) * torch.linalg.matrix_norm(inverse, 1)),
        error=_probe_error(u, v, w_pivot, coeff, pivots, others),
    )
    return PifaFactors(w_pivot.contiguous(), coeff.contiguous(), pivots, quality)


def numerical_rank(weight: Tensor) -> int:
    """Rank of a stored weight [out, in], up to the rounding of its own dtype.

    Rounding adds noise of standard deviation eps * rms / (2 sqrt 3) at most to every entry, whose largest singular
    value is that times (sqrt out + sqrt in). Singular values below twice this are noise; in float32 and float64 those
    below eight times this, since there the sums that made the weight were rounded along the way too.
    """
    singular = torch.linalg.svdvals(weight.double())
    return int((singular > _noise_level(weight, float(singular[0]))).sum())


def _noise_level(weight: Tensor, largest: float) -> float:
    """The singular value of `weight` below which there is only noise; `largest` is its first."""
    rms = float(weight.double().square().mean().sqrt())
    spread = math.sqrt(weight.shape[0]) + math.sqrt(weight.shape[1])
    factor = 8 if weight.dtype in (torch.float32, torch.float64) else 2
    stored = factor * torch.finfo(weight.dtype).eps * rms * spread / (2 * math.sqrt(3))
    computed = largest * max(weight.shape) * torch.finfo(torch.float64).eps
    return max(stored, computed)


def _check(u: Tensor, v: Tensor | None, rank: int | None) -> None:
    for name, matrix in (("weight" if v is None else "U", u), ("V", v)):
        if matrix is None:
            continue
        if matrix.ndim != 2 or matrix.dtype not in _CONTINUOUS:
            raise RankError(f"{name} must be a floating-point matrix, got {matrix.dtype} {list(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise RankError(f"{name} {list(matrix.shape)} holds NaN or Inf; repair or skip this layer")
    if v is not None and u.shape[1] != v.shape[0]:
        raise RankError(f"U {list(u.shape)} and V {list(v.shape)} do not chain: U's columns must be V's rows")
    limit = min(u.shape) if v is None else min(u.shape[0], v.shape[1])
    if rank is not None and not 1 <= rank <= limit:
        raise RankError(f"rank must lie in 1..{limit} for this weight, got {rank}")


def _column_space(u: Tensor, v: Tensor | None, rank: int | None) -> tuple[Tensor, Tensor]:
    """(Q [out, r] orthonormal, M [r, in]) in float64 with weight = Q M, r the rank to keep."""
    if v is None:
        left, singular, right = torch.linalg.svd(u.double(), full_matrices=False)
        available = int((singular > _noise_level(u, float(singular[0]))).sum())
        mixed = singular[:, None] * right
    else:
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
    return left[:, :keep], mixed[:keep]


def _full_row_rank(mixed: Tensor) -> int:
    """Number of rows of `mixed` [r, in] if they are independent in float64, else -1; a QR costs less than an SVD."""
    diagonal = torch.linalg.qr(mixed.T, mode="r").R.diagonal().abs()
    threshold = max(mixed.shape) * torch.finfo(torch.float64).eps
    full = mixed.shape[0] <= mixed.shape[1] and bool((diagonal > threshold * diagonal.max()).all())
    return mixed.shape[0] if full else -1


def _choose_pivots(basis: Tensor, pivoting: Pivoting) -> Tensor:
    """The rows of `basis` [out, r] to keep, [r], int64, ascending."""
    if pivoting == "qr":
        return _greedy_rows(basis).sort().values
    if pivoting != "lu":
        raise RankError(f'pivoting must be "lu" or "qr", got {pivoting!r}')
    permutation = torch.linalg.lu(basis).P.argmax(dim=0)
    return _maxvol(basis, permutation[: basis.shape[1]]).sort().values


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


def _maxvol(basis: Tensor, pivots: Tensor) -> Tensor:
    """Swaps a pivot row for another as long as that enlarges the volume the pivots span (Goreinov et al., 2010)."""
    pivots = pivots.clone()
    coeff = torch.linalg.solve(basis[pivots], basis, left=False)
    for _ in range(4 * len(pivots)):  # each swap grows the volume by MAXVOL_BOUND or more, so this ends early
        largest = int(coeff.abs().argmax())
        row, column = divmod(largest, coeff.shape[1])
        if float(coeff[row, column].abs()) <= MAXVOL_BOUND:
            break
        change = coeff[row].clone()
        change[column] -= 1
        coeff -= torch.outer(coeff[:, column] / coeff[row, column], change)
        pivots[column] = row
    return pivots


def _fit_to_rounded(coeff: Tensor, exact: Tensor, rounded: Tensor, gram: Tensor | None) -> Tensor:
    """Coefficients that map the rounded pivot rows [r, in] to what `coeff` maps the exact ones to, on inputs of `gram`.

    Solves for a correction, so that a singular Gram matrix leaves `coeff` as it is instead of failing.
    """
    if rounded.dtype in (torch.float64, torch.float32) or coeff.numel() == 0:
        return coeff
    rows = rounded.double()
    weighted = rows if gram is None else rows @ gram.double()
    normal = weighted @ rows.T
    damping = 1e-10 * normal.diagonal().mean()
    normal.diagonal().add_(damping)
    residual = coeff @ ((exact - rows) @ weighted.T)
    factor, failed = torch.linalg.cholesky_ex((normal + normal.T) / 2)
    return coeff if bool(failed) else coeff + torch.cholesky_solve(residual.T, factor).T


def _probe_error(
    u: Tensor, v: Tensor | None, w_pivot: Tensor, coeff: Tensor, pivots: Tensor, others: Tensor, probes: int = 16
) -> float:
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(w_pivot.shape[1], probes, generator=generator, dtype=torch.float64).to(u.device)
    wanted = u.double() @ x if v is None else u.double() @ (v.double() @ x)
    got = torch.empty_like(wanted)
    got[pivots] = w_pivot.double() @ x
    got[others] = coeff.double() @ got[pivots]
    return float((got - wanted).norm() / wanted.norm())


def factorize_jointly(weights, *, ranks=None, gram=None, dtype=None):  # TEMP
    if len(weights) == 1:
        return [factorize(weights[0], gram=gram, dtype=dtype)]
    bases = [_column_space(u, v, None) for u, v in weights]
    res = [b.clone() for b, _ in bases]; chosen = []
    for _ in range(bases[0][0].shape[1]):
        row = int(sum(r.square().sum(1).clamp(min=1e-300).log() for r in res).argmax())
        for r in res:
            d = r[row] / r[row].norm(); r -= torch.outer(r @ d, d); r[row] = 0
        chosen.append(row)
    p = torch.tensor(chosen).sort().values; others = torch.ones(bases[0][0].shape[0], dtype=torch.bool); others[p] = False
    out = []
    for b, m in bases:
        c = torch.linalg.solve(b[p], b[others], left=False)
        out.append(PifaFactors((b[p] @ m).to(dtype or weights[0][0].dtype), c.to(dtype or weights[0][0].dtype), p, FactorQuality(float(c.abs().max()), 0., 0.)))
    return out

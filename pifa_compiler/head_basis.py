"""A basis of inputs for the heads of attention: d inputs that give each head's d outputs independent columns.

With C = W_h[:, inputs] of a head's weight W_h [d, in] and R = C^-1 W_h[:, others], a head is C (x_inputs + R x_others).
Where C can be moved into what reads the head, x_inputs + R x_others is left, d x d numbers less. Heads that have the
same inputs are one product (basis decomposition, arXiv 2510.01718, which takes the first or the last d inputs for all;
here they are chosen so that little precision is lost, and for as many heads as that allows).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RankError

SWAP_GAIN = 1.02
"""Inputs are exchanged as long as that enlarges the volume of a head's C by this factor on the average over heads."""

MOST_GROWTH = {torch.float64: 64.0, torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 4.0}
"""Of the rounding error, over that of a dense weight of this dtype.

A weight in bfloat16 errs by 0.0017; four times that, and as little of float16 with 16, is what is accepted. One head by
itself has a growth of 2, several that share their inputs the more the more they are: 4 heads 5, 32 heads 60.
"""


SMALLEST_SIZE = 1e-3
"""Of an input, relative to the largest: what an example shows as smaller than this may be larger elsewhere."""


@dataclass(frozen=True)
class HeadBasis:
    """Weights [heads, d, in] of heads in a basis of inputs.

    Attributes:
        inputs: the basis, [d], int64, ascending.
        others: the other inputs, [in - d], ascending.
        change: C of each head, [heads, d, d], float64.
        rest: R of each head, [heads, d, in - d], float64.
        growth: the largest of the heads: how much more a weight C [I R] errs, whose R is rounded, than one rounded as
            it is; the root of sum_k |C_k|^2 |R_k|^2 / |W|^2 over columns of C and rows of R, for inputs of their sizes.
        condition: the largest of the changes', in the 2-norm.
    """

    inputs: Tensor
    others: Tensor
    change: Tensor
    rest: Tensor
    growth: float
    condition: float

    @property
    def largest(self) -> float:
        """The largest |number| of the rest."""
        return float(self.rest.abs().max())


def find_bases(weights: Tensor, sizes: Tensor | None = None) -> list[HeadBasis]:
    """As few bases as keep the precision of all heads, each for an equal number of heads that follow each other.

    Args:
        weights, sizes: as of `find_basis`.

    Raises:
        RankError: as of `find_basis`; not even a basis for each head keeps it.
    """
    heads = len(weights)
    counts = [count for count in range(1, heads + 1) if heads % count == 0]
    most = 1
    for count in counts[1:]:  # the first heads show how many can share a basis
        try:
            find_basis(weights[:count], sizes)
        except RankError:
            break
        most = count
    for count in reversed(counts[: counts.index(most) + 1]):
        try:
            return [find_basis(group, sizes) for group in weights.split(count)]
        except RankError:
            if count == 1:
                raise
    raise AssertionError("a head by itself returns or raises")


def find_basis(weights: Tensor, sizes: Tensor | None = None) -> HeadBasis:
    """The basis of inputs that all heads share.

    Inputs are taken one by one, each the one that enlarges the volumes of the heads' C most, by the sum of logarithms,
    then exchanged as long as that helps (as `factorize_jointly` chooses pivot rows).

    Args:
        weights: [heads, d, in] of any floating dtype, d < in.
        sizes: root mean squares of the inputs, [in], which say what an error at each costs; None takes them for equal.

    Raises:
        RankError: there are no d inputs of which every head's columns are independent enough to keep its precision
            (`MOST_GROWTH` of the weights' dtype), or the weights are not finite.
    """
    heads, d, _ = weights.shape
    if not bool(torch.isfinite(weights).all()):
        raise RankError("the weight holds NaN or Inf; repair it")
    exact = weights.double()
    scaled = exact if sizes is None else exact * sizes.double().clamp(min=SMALLEST_SIZE * float(sizes.max()))
    inputs = _exchanged(scaled, _greedy(scaled))
    if inputs is None:
        raise RankError(f"no {d} inputs are a basis of all {heads} heads: the rows of a head depend on each other")
    inputs = inputs.sort().values
    is_other = torch.ones(weights.shape[2], dtype=torch.bool, device=weights.device)
    is_other[inputs] = False
    others = torch.nonzero(is_other).squeeze(-1)
    change = exact[:, :, inputs]
    rest = torch.linalg.solve(change, exact[:, :, others])
    own = scaled[:, :, inputs]
    terms = own.square().sum(1) * torch.linalg.solve(own, scaled[:, :, others]).square().sum(2)
    growth = float((terms.sum(1) / scaled.square().sum((1, 2))).sqrt().max())
    most = MOST_GROWTH[weights.dtype]
    if not growth <= most:
        raise RankError(
            f"a basis of {d} inputs would make rounding errors {growth:.1f} times as large, at most {most:.0f} times "
            f"is accepted in {weights.dtype}"
        )
    return HeadBasis(inputs, others, change, rest, growth, float(torch.linalg.cond(change).max()))


def _greedy(weights: Tensor) -> Tensor:
    """[d] inputs, each the farthest from the span of those before it."""
    # The rows' span is all that counts. In float32, which chooses as well as float64 in half the time.
    rows = torch.linalg.qr(weights.transpose(1, 2).float()).Q.transpose(1, 2).contiguous()
    tiny = torch.finfo(rows.dtype).tiny
    chosen = torch.zeros(rows.shape[2], dtype=torch.bool, device=rows.device)
    inputs = []
    for _ in range(rows.shape[1]):
        volumes = rows.square().sum(1).clamp(min=tiny).log().sum(0).masked_fill(chosen, -math.inf)
        column = int(volumes.argmax())
        direction = torch.nn.functional.normalize(rows[:, :, column], dim=1)
        rows -= direction[:, :, None] * (direction[:, None] @ rows)
        chosen[column] = True
        inputs.append(column)
    return torch.tensor(inputs, device=weights.device)


def _exchanged(weights: Tensor, inputs: Tensor) -> Tensor | None:
    """The basis after the exchanges that enlarge it; None if it is none, for some head."""
    heads, d, _ = weights.shape
    inputs = inputs.clone()
    lu, pivots, failed = torch.linalg.lu_factor_ex(weights[:, :, inputs])
    if bool(failed.any()):
        return None
    # In float32, and each exchange one update: these numbers only choose, what is stored is solved for anew.
    coeff = torch.linalg.lu_solve(lu, pivots, weights).float()
    for _ in range(4 * d):  # each enlarges the volume, so that this is hardly ever used up
        gain = coeff.abs().log().sum(0) / heads
        gain[:, inputs] = -math.inf
        place, column = divmod(int(gain.argmax()), gain.shape[1])
        if not float(gain[place, column]) > math.log(SWAP_GAIN):
            break
        change = coeff[:, :, column].clone()
        change[:, place] -= 1
        row = coeff[:, place] / coeff[:, place, column, None]
        coeff.baddbmm_(change[:, :, None], row[:, None], alpha=-1)
        inputs[place] = column
    return inputs


def in_basis(
    weight: Tensor, bias: Tensor | None, plain: int, bases: Sequence[HeadBasis]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors of a `BasisLinear`: the plain rows, the rests, the order of the inputs, and the bias.

    Args:
        weight: [out, in], float64.
        bias: [out], float64, or None.
        plain: how many rows in front belong to no head.
        bases: of the heads behind them, group by group.

    Returns:
        [plain, in], [heads * d, in - d], [groups, in] (int32) and [out] or None, in float64.
    """
    order = torch.stack([torch.cat((basis.inputs, basis.others)) for basis in bases]).int()
    rest = torch.cat([basis.rest.flatten(0, 1) for basis in bases])
    if bias is not None:
        change = torch.cat([basis.change for basis in bases])
        heads = torch.linalg.solve(change, bias[plain:].unflatten(0, change.shape[:2])[..., None])
        bias = torch.cat((bias[:plain], heads.flatten()))
    return weight[:plain], rest, order, bias


def change_columns(weight: Tensor, places: Sequence[int], change: Tensor) -> None:
    """Writes a head's change [d, d] into the columns of the weight that reads it: C values' are the values."""
    weight[:, list(places)] = weight[:, list(places)] @ change


def change_rows(weight: Tensor, bias: Tensor | None, places: Sequence[int], change: Tensor) -> None:
    """Writes a head's change [d, d] into the rows that make queries: (C^T q) keys' are the products q keys."""
    for held in (weight, bias):
        if held is not None:
            held[list(places)] = change.T @ held[list(places)]

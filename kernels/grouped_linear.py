"""The operator `pifa::grouped_linear`: `pifa::linear` with a weight for every group of rows, as experts have it.

As `pifa::linear` it is registered with its plain subgraph as its body; the products in it are `pifa::grouped_mm`.
"""

import torch
from torch import Tensor

from .grouped_mm import grouped_mm

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
_LIBRARY.define(
    "grouped_linear(Tensor x, Tensor w_pivot, Tensor coeff, Tensor? order, Tensor? bias, Tensor ends) -> Tensor"
)


def _grouped_linear_body(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    y_pivot = grouped_mm(x.to(w_pivot.dtype), w_pivot, ends)  # under autocast x may be of another dtype
    y = torch.cat((y_pivot, grouped_mm(y_pivot, coeff, ends)), dim=-1)
    if order is not None:
        y = undo_order(y, order, ends)
    return y if bias is None else add_bias(y, bias, ends)


_LIBRARY.impl("grouped_linear", _grouped_linear_body, "CompositeImplicitAutograd")


def expert_of_rows(x: Tensor, ends: Tensor) -> Tensor:
    """The expert of every row of `x`, [rows], int64; rows from ends[-1] on have the number of experts."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
    return torch.searchsorted(ends, rows, right=True)


def undo_order(y: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """`y` [rows, out] with every row in the output order of its expert, of [experts, out]."""
    return y.gather(-1, order.index_select(0, expert_of_rows(y, ends).clamp(max=len(order) - 1)))


def add_bias(y: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """`y` [rows, out] plus the bias [experts, out] of every row's expert; rows from ends[-1] on stay as they are."""
    and_none = torch.nn.functional.pad(bias, (0, 0, 0, 1))
    return y + and_none.index_select(0, expert_of_rows(y, ends))


def grouped_linear(
    x: Tensor,
    w_pivot: Tensor,
    coeff: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    ends: Tensor,
) -> Tensor:
    """Applies to every row of `x` the weight of its expert; differentiable in `x`, `w_pivot`, `coeff` and `bias`.

    Args:
        x: [rows, in], sorted by expert.
        w_pivot: the r pivot rows of every expert's weight, [experts, r, in].
        coeff: the other rows as combinations of the pivot rows, [experts, out - r, r], dtype of `w_pivot`.
        order: for every output row the stored row that holds it, [experts, out], int64; None if they agree.
        bias: [experts, out] in output order, dtype of `w_pivot`, or None.
        ends: [experts], int32 or int64, ascending: expert e has the rows ends[e - 1] to ends[e].

    Returns:
        [rows, out], dtype of `w_pivot`; 0 in the rows from ends[-1] on.
    """
    result: Tensor = torch.ops.pifa.grouped_linear.default(x, w_pivot, coeff, order, bias, ends)
    return result


def grouped_linear_ref(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    """What `grouped_linear` computes, as in a textbook: dense weights are put together, experts go one by one."""
    y = x.new_zeros(x.shape[0], w_pivot.shape[1] + coeff.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = torch.cat((w_pivot[expert], coeff[expert] @ w_pivot[expert]))
        weight = rows if order is None else rows[order[expert]]
        y[start:end] = x[start:end] @ weight.T + (0 if bias is None else bias[expert])
        start = end
    return y

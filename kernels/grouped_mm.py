"""The operator `pifa::grouped_mm`: every group of rows times a matrix of its own, as the experts of a mixture have it.

Its rows are sorted by group, and `ends` says where each group ends: no shape depends on how many rows a group has, so
that graphs hold the operator whatever tokens go where. Gradients are products of the same kind.
"""

from typing import Any

import torch
from torch import Tensor

from . import linear as _defines_the_library  # noqa: F401

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
# On GPUs the loop below asks for the ends on the host, which no CUDA graph can hold.
_LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor", tags=torch.Tag.cudagraph_unsafe)
_LIBRARY.define("grouped_outer(Tensor y, Tensor x, Tensor ends) -> Tensor", tags=torch.Tag.cudagraph_unsafe)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[i] = weight[e] x[i] for the rows i of every group e; differentiable in `x` and `weight`.

    Args:
        x: [rows, in], sorted by group.
        weight: [groups, out, in], dtype of `x`.
        ends: [groups], int32 or int64, ascending: group e has the rows ends[e - 1] to ends[e].

    Returns:
        [rows, out], dtype of `x`; 0 in the rows from ends[-1] on.
    """
    result: Tensor = torch.ops.pifa.grouped_mm.default(x, weight, ends)
    return result


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for rows, matrix in zip(_groups(ends), weight, strict=True):
        if rows.start < rows.stop:
            torch.mm(x[rows], matrix.T, out=y[rows])
    return y


def _grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum of y[i] x[i]^T over the rows i of every group: [groups, out, in] for y [rows, out], x [rows, in]."""
    return torch.stack([y[rows].T @ x[rows] for rows in _groups(ends)])


def _groups(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    of_x, of_weight, _ = ctx.needs_input_grad
    return (
        grouped_mm(grad, weight.mT, ends) if of_x else None,
        torch.ops.pifa.grouped_outer.default(grad, x, ends) if of_weight else None,
        None,
    )


def _gradients_of_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, x, ends = ctx.saved_tensors
    return grouped_mm(x, grad, ends), grouped_mm(y, grad.mT, ends), None


for _name, _compute, _fake, _backward in (
    ("grouped_mm", _grouped_mm, lambda x, w, ends: x.new_empty(x.shape[0], w.shape[1]), _gradients),
    (
        "grouped_outer",
        _grouped_outer,
        lambda y, x, ends: x.new_empty(ends.shape[0], y.shape[1], x.shape[1]),
        _gradients_of_outer,
    ),
):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pifa::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"pifa::{_name}", _backward, setup_context=_save, lib=_LIBRARY)

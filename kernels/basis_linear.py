"""The operator `pifa::basis_linear`: a linear layer whose heads are in a basis of inputs (arXiv 2510.01718).

    y_h = x[basis] + x[others] w_h^T + bias_h        y = [x w_plain^T + bias, y_1, y_2, ...]

As `pifa::linear` it is registered with its plain subgraph as its body, which has gradients and every export's form.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from . import linear as _defines_the_library  # noqa: F401

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
_LIBRARY.define("basis_linear(Tensor x, Tensor? w_plain, Tensor w_rest, Tensor order, Tensor? bias) -> Tensor")


def _basis_linear_body(x: Tensor, w_plain: Tensor | None, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    d, size = order.shape[1] - w_rest.shape[1], w_rest.shape[0] // order.shape[0]
    sizes = [0 if w_plain is None else w_plain.shape[0], *[size] * order.shape[0]]
    plain_bias, *biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    parts = [] if w_plain is None else [dense_linear(x, w_plain, plain_bias)]
    for its_order, rest, its_bias in zip(order, w_rest.split(size), biases, strict=True):
        inputs = x.index_select(-1, its_order)
        heads = dense_linear(inputs[..., d:], rest, its_bias).unflatten(-1, (-1, d))
        heads += inputs[..., None, :d]  # in place: another copy of the outputs costs as much as is gained
        parts.append(heads.flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


_LIBRARY.impl("basis_linear", _basis_linear_body, "CompositeImplicitAutograd")


def basis_linear(
    x: Tensor, w_plain: Tensor | None, w_rest: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Applies a weight whose heads are in a basis of inputs (see `head_basis`); differentiable in all but `order`.

    Args:
        x: [..., in], any number of leading dimensions, zero rows allowed.
        w_plain: the rows in front that belong to no head, [plain, in], dtype of `x`, or None.
        w_rest: for each head d rows over the inputs that are not in its basis, [heads * d, in - d], dtype of `x`.
        order: for each group of heads all inputs, the d of the basis first, [groups, in], int32; groups are of equal
            size, one behind the other.
        bias: [plain + heads * d], dtype of `x`, or None.

    Returns:
        [..., plain + heads * d], dtype of `x`.
    """
    result: Tensor = torch.ops.pifa.basis_linear.default(x, w_plain, w_rest, order, bias)
    return result


def basis_linear_ref(
    x: Tensor, w_plain: Tensor | None, w_rest: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What `basis_linear` computes, as in a textbook: the dense weight is put together and multiplied once."""
    y = x @ dense_weight(w_plain, w_rest, order).T
    return y if bias is None else y + bias


def dense_weight(w_plain: Tensor | None, w_rest: Tensor, order: Tensor) -> Tensor:
    """The weight [plain + heads * d, in] that the tensors of `basis_linear` stand for; differentiable."""
    groups, d_in = order.shape
    d = d_in - w_rest.shape[1]
    eye = torch.eye(d, device=w_rest.device, dtype=w_rest.dtype).repeat(w_rest.shape[0] // groups // d, 1)
    parts: list[Tensor] = [] if w_plain is None else [w_plain]
    for its_order, rest in zip(order, w_rest.chunk(groups), strict=True):
        parts.append(torch.cat((eye, rest), dim=1)[:, torch.argsort(its_order)])
    return torch.cat(parts)

"""The operator `pifa::linear`: a linear layer stored as pivot rows and coefficients.

    y_p = x w_pivot^T        y_n = y_p coeff^T        y = [y_p, y_n][order] + bias

(Zhao, Zhang and Cannistraci, ICML 2025, arXiv 2501.19090, section 3). `order` is the *gather* index: `order[j]` is
the stored row that holds output row j. The scatter index is `argsort(order)`.

The operator is registered CompositeImplicitAutograd: its body is the plain subgraph, so gradients and fake tensors need
no registration of their own, `torch.export` and Dynamo keep one node that passes and exporters match, and a backend
that does not know the operator sees the subgraph.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

_LIBRARY = torch.library.Library("pifa", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor w_pivot, Tensor coeff, Tensor? order, Tensor? bias) -> Tensor")


def _linear_body(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    y_pivot = dense_linear(x, w_pivot)
    y = torch.cat((y_pivot, dense_linear(y_pivot, coeff)), dim=-1)
    if order is not None:
        # Within a transform of torch.func Inductor miscompiles the gradient of `index_select` when it is batched
        # (torch 2.13: jacrev of it alone), and not that of an index. Elsewhere `index_select` is faster.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        y = y[..., order] if transformed else y.index_select(-1, order)
    # Under autocast y is of a half precision and the bias is not; a dense layer returns the half precision.
    return y if bias is None else y + bias.to(y.dtype)


_LIBRARY.impl("linear", _linear_body, "CompositeImplicitAutograd")


def linear(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Applies a weight in PIFA form to `x` (arXiv 2501.19090, section 3); differentiable in all but `order`.

    Args:
        x: [..., in], any number of leading dimensions, zero rows allowed.
        w_pivot: the r pivot rows of the weight, [r, in], dtype of `x`.
        coeff: the other rows as combinations of the pivot rows, [out - r, r], dtype of `x`.
        order: for every output row the stored row that holds it, [out], int64; None if stored and output order agree.
        bias: [out] in output order, dtype of `x`, or None.

    Returns:
        [..., out], dtype of `x`.
    """
    result: Tensor = torch.ops.pifa.linear.default(x, w_pivot, coeff, order, bias)
    return result


def linear_ref(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """What `linear` computes, as in a textbook: the dense weight is put together and multiplied once."""
    rows = torch.cat((w_pivot, coeff @ w_pivot))
    weight = rows if order is None else rows[order]
    y = x @ weight.T
    return y if bias is None else y + bias

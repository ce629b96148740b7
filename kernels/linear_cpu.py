"""The operator `pifa::linear_cpu`: both products of a PIFA linear in one output buffer.

    y[:, :r] = x w_pivot^T        y[:, r:] = y[:, :r] coeff^T

The rows come out in stored order; undoing it and adding the bias stay in the graph, where a compiler fuses them with the
consumer. Only the lowering pass emits this operator. It has no gradient: training takes the plain subgraph.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
_LIBRARY.define("linear_cpu(Tensor x, Tensor w_pivot, Tensor coeff) -> Tensor")


def _linear_cpu_kernel(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    rank = w_pivot.shape[0]
    d_out = rank + coeff.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(rows.shape[0], d_out)
    y_pivot, y_other = y[:, :rank], y[:, rank:]
    torch.mm(rows, w_pivot.t(), out=y_pivot)
    torch.mm(y_pivot, coeff.t(), out=y_other)
    return y.view(*x.shape[:-1], d_out)


def _linear_cpu_fake(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_pivot.shape[0] + coeff.shape[0])


def _no_gradient(ctx: Any, grad: Tensor) -> NoReturn:
    raise NotImplementedError("pifa::linear_cpu has no gradient; use pifa::linear where gradients are needed")


_LIBRARY.impl("linear_cpu", _linear_cpu_kernel, "CPU")
torch.library.register_fake("pifa::linear_cpu", _linear_cpu_fake, lib=_LIBRARY)
torch.library.register_autograd("pifa::linear_cpu", _no_gradient, lib=_LIBRARY)


def linear_cpu(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    """Both products of a PIFA linear (see `linear`) in stored row order, on the CPU; not differentiable.

    Args:
        x: [..., in], any number of leading dimensions, zero rows allowed.
        w_pivot: [r, in], dtype of `x`.
        coeff: [out - r, r], dtype of `x`.

    Returns:
        [..., out], contiguous: the r pivot rows' outputs first.
    """
    result: Tensor = torch.ops.pifa.linear_cpu.default(x, w_pivot, coeff)
    return result

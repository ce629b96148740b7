"""The operator `pifa::linear_gemm`: both products of `pifa::linear` by the library's GEMM, into one buffer.

    y[:, :r] = x w_pivot^T        y[:, r:] = y[:, :r] coeff^T

The result is in *stored* order: undoing it, and a bias, are left to whatever elementwise code follows. Unlike in the
plain subgraph nothing is concatenated: a GEMM writes rows with a stride at no cost.

For several tokens it is as fast as our best Triton tile, or faster, on the GPU on which both were timed
(`docs/speed.md`).

float16, bfloat16 and float32 on any device; no gradients.
"""

import torch
from torch import Tensor

from . import linear as _defines_the_library  # noqa: F401
from .form import Case, Form, check_dtypes

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
_LIBRARY.define("linear_gemm(Tensor x, Tensor w_pivot, Tensor coeff) -> Tensor")


def _multiply(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    _check(x, w_pivot, coeff)
    rank, out = w_pivot.shape[0], w_pivot.shape[0] + coeff.shape[0]
    tokens = x.shape[:-1].numel()
    y = x.new_empty(tokens, out)
    y_pivot = y[:, :rank]
    torch.mm(x.reshape(tokens, x.shape[-1]), w_pivot.t(), out=y_pivot)
    if out > rank:
        torch.mm(y_pivot, coeff.t(), out=y[:, rank:])
    return y.view(*x.shape[:-1], out)


def _shape(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    _check(x, w_pivot, coeff)
    return x.new_empty(*x.shape[:-1], w_pivot.shape[0] + coeff.shape[0])


def _check(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> None:
    check_dtypes("linear_gemm", "pifa::linear", DTYPES, (x, w_pivot, coeff))
    if x.dim() == 0 or x.shape[-1] != w_pivot.shape[1] or coeff.shape[1] != w_pivot.shape[0]:
        shapes = [tuple(t.shape) for t in (x, w_pivot, coeff)]
        raise ValueError(f"linear_gemm takes x [..., in], w_pivot [r, in] and coeff [out - r, r], got {shapes}")


# One body for every device, below autograd: `out=` is refused where gradients are recorded.
_LIBRARY.impl("linear_gemm", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("pifa::linear_gemm", _shape, lib=_LIBRARY)


def linear_gemm(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
    """`pifa::linear` without its order and bias (arXiv 2501.19090, section 3).

    Args:
        x: [..., in], float16, bfloat16 or float32; any strides, zero rows allowed.
        w_pivot: [r, in], dtype of `x`.
        coeff: [out - r, r], dtype of `x`; may have no rows.

    Returns:
        [..., out] in stored order, dtype of `x`, contiguous. y_p is rounded to that dtype before it is multiplied.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    result: Tensor = torch.ops.pifa.linear_gemm.default(x, w_pivot, coeff)
    return result


def _reason_against(case: Case) -> str | None:
    """For several tokens, or an unknown number, the GEMMs are as fast as our best tile, or faster (`docs/speed.md`)."""
    from torch._inductor import config

    if config.max_autotune:
        return "under max_autotune our own kernels are tuned instead"
    return "for one token our own kernel is faster" if case.tokens == 1 else None


def _linear(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """Order and bias behind the operator, for Inductor to fuse: kernels that stored columns in order took far longer.

    `benchmarks/results/gpu.csv` has the times.
    """
    y: Tensor = torch.ops.pifa.linear_gemm.default(x, w_pivot, coeff)
    if order is not None:
        y = torch.ops.aten.index_select.default(y, -1, order)
    if bias is not None:
        y = torch.ops.aten.add.Tensor(y, bias)
    return y


FORM = Form("linear_gemm", DTYPES, _reason_against, _linear)

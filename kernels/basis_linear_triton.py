"""The form of `pifa::basis_linear` by our Triton kernel, on NVIDIA's and AMD's GPUs. It was not timed on one.

The operator is in `basis_linear_triton_operator`, which imports triton and is imported where a graph gets it. Rows
in front that belong to no head are a linear of their own, which the compiler sees.
"""

import torch
from torch import Tensor

from .form import Case, Form
from .linear_triton import DTYPES, why_not_here


def _reason_against(case: Case) -> str | None:
    """The plain subgraph writes the outputs, then reads them again to add the basis: one kernel does not."""
    return why_not_here()


def _basis_linear(x: Tensor, w_plain: Tensor | None, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    from . import basis_linear_triton_operator as _registers_the_operator  # noqa: F401  imports triton, so only here

    plain = 0 if w_plain is None else w_plain.shape[0]
    front, of_heads = (None, None) if bias is None else (bias[:plain], bias[plain:])
    heads: Tensor = torch.ops.pifa.basis_linear_triton.default(x, w_rest, order, of_heads)
    return heads if w_plain is None else torch.cat((torch.nn.functional.linear(x, w_plain, front), heads), dim=-1)


FORM = Form("basis_linear_triton", DTYPES, _reason_against, _basis_linear)

"""The form of `pifa::grouped_linear` by our Triton kernels, on NVIDIA's and AMD's GPUs. It was not timed on one.

The operator is in `grouped_linear_triton_operator`, which imports triton and is imported where a graph gets it.
"""

import torch
from torch import Tensor

from .form import Case, Form
from .linear_triton import DTYPES, why_not_here


def _reason_against(case: Case) -> str | None:
    """The plain subgraph asks for the ends on the host, and goes from expert to expert."""
    return why_not_here()


def _grouped_linear(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    from . import grouped_linear_triton_operator as _registers_the_operator  # noqa: F401  imports triton, so only here

    result: Tensor = torch.ops.pifa.grouped_linear_triton.default(x, w_pivot, coeff, order, bias, ends)
    return result


FORM = Form("grouped_linear_triton", DTYPES, _reason_against, _grouped_linear)

"""The operator `pifa::grouped_linear_cpu`: `pifa::grouped_linear` in native code, the experts one by one.

Every expert's rows go the way of `pifa::linear_cpu` (linear_cpu.cpp, where it is built): weights of few rows are
streamed, and the row order is undone while a row is in the cache, where the plain subgraph gathers by an index for
every number. It takes what `pifa::grouped_linear` takes, float32, bfloat16 and float16; no gradients.
"""

import torch
from torch import Tensor

from . import linear_cpu
from .form import Case, Form


def _shape(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    return x.new_empty(x.shape[0], w_pivot.shape[1] + coeff.shape[1])


torch.library.register_fake("pifa::grouped_linear_cpu", _shape, lib=linear_cpu.LIBRARY)


def _reason_against(case: Case) -> str | None:
    return linear_cpu.load()


FORM = Form("grouped_linear_cpu", linear_cpu.DTYPES, _reason_against, torch.ops.pifa.grouped_linear_cpu.default)

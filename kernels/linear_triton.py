"""The form of `pifa::linear` by our Triton kernels, on NVIDIA's and AMD's GPUs.

The operator is in `linear_triton_operator`, which imports triton and is imported where a graph gets it.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from .form import Case, Form

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _reason_against(case: Case) -> str | None:
    """For one token the kernel is ahead of cuBLAS's dense product or even with it (an H200, `docs/speed.md`).

    For several, or an unknown number, only where `torch._inductor.config.max_autotune` is set and tiles are timed.
    """
    from torch._inductor import config

    if case.tokens != 1 and not config.max_autotune:
        return "for several tokens it has to be tuned (max_autotune)"
    return why_not_here()


def why_not_here() -> str | None:
    """Why no Triton kernel of ours can run in this process, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install pifa-compiler[gpu]"
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need compute capability 8.0"
    return None


def _linear(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    from . import linear_triton_operator as _registers_the_operator  # noqa: F401  imports triton, so only here

    result: Tensor = torch.ops.pifa.linear_triton.default(x, w_pivot, coeff, order, bias)
    return result


FORM = Form("linear_triton", DTYPES, _reason_against, _linear)

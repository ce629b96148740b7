"""The operator `pifa::basis_linear_cpu`: `pifa::basis_linear` in native code for CPUs (basis_linear_cpu.cpp).

It takes what `pifa::basis_linear` takes, float32, bfloat16 and float16; no gradients. Built on first use, as
`linear_cpu` is.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from . import linear_cpu
from .form import Case, Form

SOURCE = Path(__file__).with_name("basis_linear_cpu.cpp")
SCHEMA = "basis_linear_cpu(Tensor x, Tensor? w_plain, Tensor w_rest, Tensor order, Tensor? bias) -> Tensor"

linear_cpu.LIBRARY.define(SCHEMA)


def _shape(x: Tensor, w_plain: Tensor | None, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], (0 if w_plain is None else w_plain.shape[0]) + w_rest.shape[0])


torch.library.register_fake("pifa::basis_linear_cpu", _shape, lib=linear_cpu.LIBRARY)


@functools.cache
def load() -> str | None:
    """Loads the native code, as `linear_cpu.load` does its own; None, or why it cannot be had."""
    return linear_cpu.load_source(SOURCE)


def _reason_against(case: Case) -> str | None:
    """What was measured is in `docs/attention.md`."""
    if case.tokens == 1 and case.groups == 1 and torch.get_num_threads() == 1:
        return "for one token, one basis and one thread ATen's product is faster"
    return load()


FORM = Form("basis_linear_cpu", linear_cpu.DTYPES, _reason_against, torch.ops.pifa.basis_linear_cpu.default)

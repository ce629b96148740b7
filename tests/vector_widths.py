"""Native code built for narrower vectors than the machine's, so that the paths for all of them are tested on one."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pifa_compiler.kernels import linear_cpu
from torch._inductor.cpu_vec_isa import VecISA, invalid_vec_isa, pick_vec_isa, valid_vec_isa_list

NARROWER = {isa.bit_width(): isa for isa in valid_vec_isa_list() if isa.bit_width() < pick_vec_isa().bit_width()}

WIDTHS = [
    pytest.param(None, id="widest vectors"),
    *(pytest.param(isa, id=f"{width} bits") for width, isa in NARROWER.items()),
    pytest.param(invalid_vec_isa, id="no vectors", marks=pytest.mark.slow),
]
"""Parameters of fixtures: what to build for, None for what the machine has."""


@functools.cache
def built_for(isa: VecISA, source: Path, schemas: tuple[str, ...]) -> tuple[torch.library.Library, Any]:
    """The operators of `schemas` from a file of native code: what keeps them, and a namespace of their own."""
    namespace = f"pifa_{source.stem}_{isa.bit_width()}"
    library = torch.library.Library(namespace, "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    torch.ops.load_library(str(linear_cpu.build(isa, namespace, source)))
    return library, getattr(torch.ops, namespace)

"""The operator `pifa::linear_cpu`: `pifa::linear` in native code for CPUs (linear_cpu.cpp), built on first use.

It takes what `pifa::linear` takes but a bias: adding one is left to whatever elementwise code follows. float32,
bfloat16 and float16; no gradients.

Why native code, where ATen has GEMMs: for a few tokens ATen streams the weights far below the memory's rate; and in the
plain subgraph Inductor copies y_p into the joint buffer and undoes the row order element by element (`docs/speed.md`).
"""

import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cache import folder_for
from . import linear as _defines_the_library  # noqa: F401
from .form import Case, Form

if TYPE_CHECKING:
    from torch._inductor.cpu_vec_isa import VecISA

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("linear_cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SCHEMAS = (
    "linear_cpu(Tensor x, Tensor w_pivot, Tensor coeff, Tensor? order) -> Tensor",
    "linear_siblings_cpu(Tensor x, Tensor[] w_pivots, Tensor[] coeffs, Tensor?[] orders) -> Tensor[]",
    "grouped_linear_cpu(Tensor x, Tensor w_pivot, Tensor coeff, Tensor? order, Tensor? bias, Tensor ends) -> Tensor",
)

LIBRARY = torch.library.Library("pifa", "FRAGMENT")
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


def _shape(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_pivot.shape[0] + coeff.shape[0])


def _shapes(x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor], orders: list[Tensor | None]) -> list[Tensor]:
    return [_shape(x, *operands) for operands in zip(w_pivots, coeffs, orders, strict=True)]


torch.library.register_fake("pifa::linear_cpu", _shape, lib=LIBRARY)
torch.library.register_fake("pifa::linear_siblings_cpu", _shapes, lib=LIBRARY)


@functools.cache
def load() -> str | None:
    """Loads the native code for this machine's vector units, built unless that was done before.

    Returns:
        None, or why it cannot be had (no compiler, say): `pifa::linear` is then run as the plain subgraph.
    """
    return load_source(SOURCE)


def load_source(source: Path) -> str | None:
    """As `load`, for one of the files of native code."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        torch.ops.load_library(str(build(pick_vec_isa(), source=source)))
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        return f"native code could not be built: {error}".splitlines()[0]
    return None


def build(vec_isa: "VecISA", namespace: str = "pifa", source: Path | None = None) -> Path:
    """The native code as a library, built unless that was done before.

    It is compiled by the C++ compiler that Inductor would use, and kept in a folder whose name says what it was built
    from: source, compiler command, machine and version of torch. Any number of processes may build it at once.

    Args:
        vec_isa: the vector units to build for, as `torch._inductor.cpu_vec_isa` has them.
        namespace: where the operators are defined that the library implements.
        source: of the code; `SOURCE` if None.

    Raises:
        CppCompileError, InvalidCxxCompiler: of torch: there is no compiler, or it fails.
        CacheError: there is no place to keep it.
        OSError: it cannot be kept there.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    source = SOURCE if source is None else source
    options = CppTorchOptions(vec_isa=vec_isa, extra_flags=(f"-DPIFA_NAMESPACE={namespace}",))
    builder = CppBuilder(name=source.stem, sources=str(source), BuildOption=options, output_dir="")
    # The command says -march=native: a home that several machines share needs a library for each kind of them.
    machine = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    key = f"{torch.__version__}\n{machine}\n{builder.get_command_line()}\n{source.read_text(encoding='utf-8')}"
    folder = folder_for(key)
    # A library that a full disk or a crash cut short may take down the process that loads it.
    kept = next((file for file in folder.glob(f"{source.stem}-*") if file.stem == _name(source, file)), None)
    if kept is not None:
        return kept
    log.info("building %s in %s once for this machine; takes some 20 seconds", source.name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        builder = CppBuilder(name=source.stem, sources=str(source), BuildOption=options, output_dir=partial)
        builder.build()
        built = Path(builder.get_target_file_path())
        library = folder / f"{_name(source, built)}{built.suffix}"
        os.replace(built, library)
    return library


def _name(source: Path, library: Path) -> str:
    """What it is called in the cache: says whether its bytes are those that were built."""
    return f"{source.stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}"


def _reason_against(case: Case) -> str | None:
    return load()


def _linear(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.pifa.linear_cpu.default(x, w_pivot, coeff, order)
    return y if bias is None else torch.ops.aten.add.Tensor(y, bias)


FORM = Form("linear_cpu", DTYPES, _reason_against, _linear)

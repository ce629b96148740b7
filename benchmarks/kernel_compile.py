"""Compiles the Triton kernels for chips that are not there, and reads off the machine code what they are made of.

`cases` lists every kernel, product, tile, dtype and chip; `compile_case` compiles one and returns its `Figures`, whose
`faults` says in words what breaks a promise: spills, narrow loads, no tensor cores, more registers or shared memory
than the assumed number of programs a chip can hold. Needs Triton without its interpreter, and no GPU.
"""

import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from pifa_compiler.kernels.basis_linear_triton_operator import basis_kernel
from pifa_compiler.kernels.basis_linear_triton_operator import fixed_tile as fixed_basis_tile
from pifa_compiler.kernels.grouped_linear_triton_operator import fixed_tile, grouped_kernel
from pifa_compiler.kernels.linear_triton_decode import decode_kernel
from pifa_compiler.kernels.linear_triton_prefill import GROUP_M, prefill_kernel
from pifa_compiler.kernels.linear_triton_siblings import siblings_kernel
from pifa_compiler.kernels.linear_triton_siblings_decode import siblings_decode_kernel
from pifa_compiler.kernels.linear_triton_tiles import (
    Tile,
    decode_tiles,
    fixed_decode_tile,
    fixed_prefill_tile,
    fixed_siblings_tile,
    prefill_tiles,
    siblings_tiles,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

D_IN, RANK, OUT = 4096, 2048, 4096
"""Compiled for d = 4096 at half rank: the widths that matter are multiples of 16, as ranks are by default."""

KERNELS = (
    *("prefill", "decode1", "decode16", "siblings_prefill", "siblings_decode1", "siblings_decode16"),
    *("grouped", "basis"),
)

EXPERTS = 128

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor (SM, compute unit) offers; from the makers' programming guides.

    Attributes:
        target: what Triton compiles for.
        shared, shared_per_program: bytes of shared memory of a multiprocessor, and of them for one program at most.
        reserved: bytes of shared memory that the system takes from every program's share.
        registers: 32-bit registers of a multiprocessor; on AMD of a lane of one of its four SIMDs.
        warps: at most so many at a time.
    """

    target: GPUTarget
    shared: int
    shared_per_program: int
    reserved: int
    registers: int
    warps: int

    @property
    def hip(self) -> bool:
        """Whether it is AMD's."""
        return self.target.backend == "hip"

    @property
    def can_overlap(self) -> bool:
        """Whether it has programmatic dependent launch."""
        return not self.hip and int(self.target.arch) >= 90


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 167936, 166912, 1024, 65536, 64),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 233472, 232448, 1024, 65536, 64),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 233472, 232448, 1024, 65536, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, 65536, 0, 512, 32),
}


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        kernel: one of `KERNELS`: "decode1" is for one token, "decode16" for 2 to 16; those of siblings are compiled for
            one weight of the whole size and two of a quarter of it, "grouped" for experts, "basis"
            for heads of 128 at 512 inputs, with one basis for all ("pivots") and for one head ("rest").
        product: "pivots" (x w_pivot^T) or "rest" (y_p coeff^T).
        tile, dtype, chip: what it is compiled with and for.
        precision: of float32 products, "ieee" or "tf32".
        ordered: with order and bias, in decode only; without, all loads that are left are of the matrices.
        dependent: by launches that overlap, in decode in bf16 only and on chips that can.
        counted: with sums that the last of several programs adds up, in decode16 of one linear in bf16, not on AMD; for
            the fixed tile: 16x32x256-w4-s4, which tuning tries as well, then spills 8 bytes on sm_100.
    """

    kernel: str
    product: str
    tile: Tile
    dtype: str
    chip: str
    precision: str
    ordered: bool
    dependent: bool = False
    counted: bool = False

    def __str__(self) -> str:
        precision = self.precision if self.dtype == "fp32" else ""
        epilogue = ("ordered" if self.ordered else "plain") + "-dependent" * self.dependent + "-counted" * self.counted
        return "-".join(
            filter(None, (self.kernel, self.product, str(self.tile), self.dtype, precision, epilogue, self.chip))
        )


@dataclass(frozen=True)
class Figures:
    """What the machine code says.

    Attributes:
        registers: per thread.
        spills: bytes of local memory (stack included) per thread.
        shared: bytes of shared memory of a program.
        tensor_memory: columns of tensor memory of a program (sm_100 has 512).
        tensor_core: such instructions, counted in the code.
        instruction: their name.
        wide, narrow: global loads of 16 bytes and more, and of fewer.
    """

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    instruction: str
    wide: int
    narrow: int


def tiles_of(kernel: str, dtype: str, hip: bool) -> tuple[Tile, ...]:
    """The list that autotuning tries."""
    if kernel.startswith("siblings"):
        return siblings_tiles(ITEMSIZE[dtype], 17 if kernel.endswith("prefill") else _block_m(kernel), hip)
    if kernel in ("grouped", "basis"):
        return fixed_tiles_of(kernel, dtype, hip)  # it has no others
    if kernel.endswith("prefill"):
        return prefill_tiles(ITEMSIZE[dtype], hip)
    return decode_tiles(ITEMSIZE[dtype], _block_m(kernel), hip)


def _block_m(kernel: str) -> int:
    return int(kernel.rpartition("decode")[2])


def fixed_tiles_of(kernel: str, dtype: str, hip: bool) -> tuple[Tile, ...]:
    """The tiles taken without autotuning, over all numbers of tokens and rows."""
    size = ITEMSIZE[dtype]
    if kernel.startswith("siblings"):
        buckets = (128, 1024, 2**31) if kernel.endswith("prefill") else (_block_m(kernel),)
        found = [fixed_siblings_tile(rows, bucket, size, hip) for bucket in buckets for rows in (1, 2**31)]
    elif kernel == "grouped":
        found = [fixed_tile(rows, 1, d, size, hip) for rows in (1, 128, 1024, 2**31) for d in (1, 2**31)]
    elif kernel == "basis":
        found = [fixed_basis_tile(tokens, d, size, hip) for tokens in (1, 128, 1024, 2**31) for d in (1, 2**31)]
    elif kernel == "prefill":
        found = [fixed_prefill_tile(bucket, size, hip) for bucket in (128, 1024, 2**31)]
    else:
        found = [fixed_decode_tile(rows, size, _block_m(kernel), hip) for rows in (1, 2**31)]
    return tuple(dict.fromkeys(found))


def cases(*, fixed_only: bool = False) -> Iterator[Case]:
    """All compilations; with `fixed_only` those of the tiles taken without autotuning, in bf16."""
    for chip, limits in CHIPS.items():
        for kernel in KERNELS:
            for dtype in ("bf16",) if fixed_only else ITEMSIZE:
                tiles = (fixed_tiles_of if fixed_only else tiles_of)(kernel, dtype, limits.hip)
                two_ways = dtype == "fp32" and not kernel.endswith("decode1") and not limits.hip
                precisions = ("ieee", "tf32") if two_ways else ("ieee",)
                epilogues = (True, False) if "decode" in kernel else (False,)
                can_overlap = limits.can_overlap and dtype == "bf16" and "decode" in kernel
                can_count = not limits.hip and dtype == "bf16" and kernel == "decode16"
                for tile, precision, product, ordered in itertools.product(
                    tiles, precisions, ("pivots", "rest"), epilogues
                ):
                    case = Case(kernel, product, tile, dtype, chip, precision, ordered)
                    yield case
                    if can_overlap and not ordered:
                        yield dataclasses.replace(case, dependent=True)
                    if can_count and ordered and tile in fixed_tiles_of(kernel, dtype, limits.hip):
                        yield dataclasses.replace(case, counted=True)


def compile_case(case: Case) -> Figures:
    """Compiles one case and reads its code."""
    chip, compiled = CHIPS[case.chip], compiled_kernel(case)
    shared = int(compiled.metadata.shared)
    if chip.hip:
        return _read_amd(compiled.asm["amdgcn"], shared)
    columns = int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    return _read_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], shared, columns)


def compiled_kernel(case: Case) -> triton.compiler.CompiledKernel:
    """What Triton makes of one case."""
    kernel, arguments = _arguments(case)
    constants = {name: value for name, value in arguments.items() if not _is_type(value)}
    signature = {name: "constexpr" if name in constants else str(value) for name, value in arguments.items()}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind != "constexpr" and name != "M"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    if case.dependent:
        options["launch_pdl"] = case.product == "rest"
    return triton.compile(source, target=CHIPS[case.chip].target, options=options)


def _is_type(value: object) -> bool:
    return isinstance(value, str) and (value.startswith("*") or value == "i32")


def _arguments(case: Case) -> tuple[triton.JITFunction, dict[str, object]]:
    """The kernel and, in its order, the type of every argument that is passed and the value of all others."""
    x = f"*{case.dtype}"
    first = case.product == "pivots"
    rows, terms = (RANK, D_IN) if first else (OUT - RANK, RANK)
    sizes: dict[str, object] = {"N": rows, "K": terms, "FIRST": 0 if first else RANK}
    if "decode" in case.kernel:
        sizes |= {"SIGNAL": case.dependent and first, "WAIT": case.dependent and not first}
    common = {"BUCKET": 0, "PRECISION": case.precision, **case.tile.constants()}
    if case.kernel == "prefill":
        pointers = {"a": x if first else None, "w": x, "y": x}
        strides = {"M": "i32", "stride_a": "i32", "stride_y": "i32"}
        return prefill_kernel, {**pointers, **strides, **sizes, "GROUP": GROUP_M, **common}
    if case.kernel == "grouped":
        pointers = {"a": x if first else None, "w": x, "y": x, "ends": "*i64"}
        strides = {"stride_a": "i32", "stride_y": "i32"}
        experts = {"EXPERTS": EXPERTS, "BLOCK_E": EXPERTS}
        del common["BUCKET"]
        return grouped_kernel, {**pointers, **strides, **experts, **sizes, "GROUP": GROUP_M, **common}
    if case.kernel == "basis":
        pointers = {"x": x, "w": x, "bias": x, "y": x}
        heads = {"SIZE": 256 * 128 if first else 128, "D": 128, "K": 384}
        del common["BUCKET"]
        return basis_kernel, {**pointers, "M": "i32", "stride_y": "i32", **heads, **common}
    index, bias = ("*i32", x) if case.ordered else (None, None)
    if case.kernel.startswith("siblings"):
        overlap = {name: sizes[name] for name in ("SIGNAL", "WAIT") if name in sizes}
        sizes = {
            f"{axis}{i}": size // (1 if i == 0 else 4 if axis == "N" or not first else 1)
            for axis, size in (("N", rows), ("K", terms))
            for i in range(3)
        }
        if case.kernel.endswith("prefill"):
            pointers = {"a": x, "w0": x, "w1": x, "w2": x, "y": x}
            strides = {"M": "i32", "stride_a": "i32", "stride_y": "i32"}
            places = {"A": 0, "Y": 0, "SHARED": first}
            return siblings_kernel, {**pointers, **strides, **sizes, **places, "GROUP": GROUP_M, **common}
        order = "*i64" if first and case.ordered else None
        of_each = {"a": x if first else "*fp32", "w": x, "y": "*fp32" if first else x}
        of_each |= {"order": order, "scatter": index, "bias": None if first else bias}
        pointers = {f"{name}{i}": kind for name, kind in of_each.items() for i in range(3)}
        if first:
            pointers |= {"a1": None, "a2": None}  # one x for all
        strides = {"M": 1 if case.kernel.endswith("decode1") else "i32", "stride_a": "i32"}
        sizes |= {"OUT0": OUT, "OUT1": OUT // 4, "OUT2": OUT // 4, "PIVOTS": first}
        sizes |= {"ASIDES": 0 if first and not case.ordered else 4, **overlap}
        return siblings_decode_kernel, {**pointers, **strides, **sizes, **common}
    pointers = {"a": x if first else "*fp32", "w": x, "y": "*fp32" if first else x}
    pointers |= {"parts": "*fp32" if case.counted else None}
    pointers |= {"order": "*i64", "inverse": index} if first and case.ordered else {"order": None, "inverse": None}
    pointers |= {"pivots": None if first else "*fp32"}
    pointers |= {"scatter": None, "bias": None} if first else {"scatter": index, "bias": bias}
    pointers |= {"arrived": "*i32" if case.counted else None}
    strides = {"M": 1 if case.kernel == "decode1" else "i32", "stride_a": "i32", "stride_y": "i32"}
    chunk = terms // 4 if case.counted else terms
    return decode_kernel, {**pointers, **strides, **sizes, "OUT": OUT, "CHUNK": chunk, **common}


def _read_nvidia(ptx: str, cubin: bytes, shared: int, columns: int) -> Figures:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    loads = [
        _bytes_of_ptx_load(line) for line in ptx.splitlines() if re.search(r"\bld\.global|\bcp\.async\.c[ag]", line)
    ]
    units = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)
    spills = found["STACK"] + found["LOCAL"]
    wide = sum(width >= 16 for width in loads)
    return Figures(
        found["REG"], spills, shared, columns, len(units), units[0] if units else "none", wide, len(loads) - wide
    )


def _bytes_of_ptx_load(line: str) -> int:
    if "cp.async" in line:
        found = re.search(r"\],\s*(0x[0-9a-f]+|\d+)", line)
        assert found, line
        return int(found[1], 0)
    found = re.search(r"ld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\b", line)
    assert found, line
    return int(found[1] or 1) * int(found[2]) // 8


def _read_amd(code: str, shared: int) -> Figures:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        assert found, name
        return int(found[1])

    loads = re.findall(r"^\s*(?:global|buffer)_load_(?:lds_)?(\w+)", code, re.MULTILINE)
    wide = sum(name.startswith("dwordx4") for name in loads)
    units = re.findall(r"\bv_mfma_\w+", code)
    spills = number("private_segment_fixed_size")
    return Figures(
        number("vgpr_count"), spills, shared, 0, len(units), "v_mfma" if units else "none", wide, len(loads) - wide
    )


def faults(case: Case, figures: Figures) -> list[str]:
    """What breaks a promise, in words with its figure; empty if nothing does."""
    chip, tile = CHIPS[case.chip], case.tile
    found = []
    if figures.spills:
        found.append(f"{figures.spills} bytes a thread in local memory")
    in_tensor_cores = case.dtype != "fp32" or case.precision == "tf32"
    if in_tensor_cores and not case.kernel.endswith("decode1") and not figures.tensor_core:
        found.append("no tensor-core instruction")
    if not figures.wide:
        found.append("no global load is 16 bytes wide")
    indices = case.ordered or case.kernel in ("grouped", "basis")  # are loaded as well
    if not indices and figures.narrow:
        found.append(f"{figures.narrow} global loads are narrower than 16 bytes")
    if figures.shared > chip.shared_per_program:
        found.append(f"{figures.shared} bytes of shared memory, the chip gives {chip.shared_per_program}")
    elif (figures.shared + chip.reserved) * tile.resident > chip.shared:
        found.append(f"{tile.resident} times {figures.shared} bytes of shared memory, the chip has {chip.shared}")
    if chip.hip:
        waves = -(-tile.resident * tile.warps // 4)
        if waves * -(-figures.registers // 8) * 8 > chip.registers:
            found.append(f"{waves} waves of {figures.registers} registers, a SIMD has {chip.registers}")
    elif tile.resident * tile.warps * 32 * (-(-figures.registers // 8) * 8) > chip.registers:
        found.append(f"{tile.resident} times {tile.warps * 32} threads of {figures.registers} registers, "
                     f"the chip has {chip.registers}")  # fmt: skip
    if tile.resident * figures.tensor_memory > 512:
        found.append(f"{tile.resident} times {figures.tensor_memory} columns of tensor memory, the chip has 512")
    if tile.resident * tile.warps > chip.warps:
        found.append(f"{tile.resident} times {tile.warps} warps, the chip holds {chip.warps}")
    return found


def row(case: Case, figures: Figures) -> dict[str, object]:
    """One line of the table."""
    extras = ", dependent" * case.dependent + ", counted" * case.counted
    values = {
        "kernel": case.kernel,
        "product": case.product,
        "tile": str(case.tile),
        "dtype": case.dtype if case.dtype != "fp32" else f"fp32 {case.precision}",
        "epilogue": ("order, bias" if case.ordered else "plain") + extras,
        "chip": case.chip,
        **dataclasses.asdict(figures),
        "resident": case.tile.resident,
    }
    return values | {"faults": "; ".join(faults(case, figures))}

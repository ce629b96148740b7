"""Checks, and times by `pifa bench --device cuda`, what `Lower` and `MergeSiblings` emit on the GPU of this machine.

    python benchmarks/gpu.py [--output DIR] [--minutes 8] [--only checks,choices,models,layers,ranks] [--layers 2]

First values against float64 of all forms, ragged shapes and unequal siblings included, and models under
`torch.compile(backend="pifa")`, with CUDA graphs and without; on a wrong value it stops with exit code 1, as it does
without a GPU. Then rows, appended to files as they come:

    choices   gpu_choices.csv   what `gpu_choices.py` does: launches that overlap or not, ways to undo an order
    models    gpu_models.csv    layers of Llama-2-7B's shape at density 0.5: prefill of 512 and 2048 tokens, decoding of
                                1, 16 and 64 sequences
    layers    gpu_layers.csv    square layers at rank d / 2, 2:4 sparse weights beside them
    ranks     gpu_layers.csv    ranks of density 0.5, rounded down to multiples of 1 to 128

None is begun that would end after so many minutes if it took as long as the longest of its kind; what is left out is
said. It has not been run on a GPU since it was rewritten, and gpu.csv is of the script before.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
from pifa_compiler.kernels import linear, linear_ref
from pifa_compiler.kernels.linear_gemm import linear_gemm
from pifa_compiler.kernels.linear_siblings_gemm import linear_siblings_batched, linear_siblings_gemm
from pifa_compiler.kernels.side_by_side import lay_side_by_side
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RAGGED = [(40, 24, 8), (33, 17, 5), (576, 576, 96), (1000, 777, 333), (4096, 4096, 2048), (64, 48, 64)]  # out, in, rank
TOKENS = (1, 2, 16, 17, 513)
SIBLINGS = {  # in; out and rank of each
    "equal": (512, [(512, 160)] * 3),
    "grouped-query": (512, [(512, 160), (128, 64), (128, 64)]),
    "ragged": (777, [(1000, 333), (33, 5), (64, 64), (40, 17)]),
}


def operands(d_out: int, d_in: int, rank: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w_pivot, coeff, order, bias on the GPU."""
    shapes = (tokens, d_in), (rank, d_in), (d_out - rank, rank), (d_out,)
    x, w_pivot, coeff, bias = (torch.randn(shape, device="cuda") for shape in shapes)
    floats = (x, w_pivot / d_in**0.5, coeff / rank**0.5)
    stored = torch.randperm(d_out, device="cuda")  # the output rows in stored order, ascending in either part
    order = torch.cat((stored[:rank].sort().values, stored[rank:].sort().values)).argsort()
    return *(v.to(dtype) for v in floats), order, bias.to(dtype)


def check(name: str, size: tuple[int, int, int]) -> list[str]:
    """What values of either form, and of the other ways to launch decode, are wrong for one dtype and size.

    Wrong are errors of more than twice torch's in the same dtype plus rounding: half a unit in the last place of the
    dtype for the result, and of float32 for each of the d_in terms that one program adds up in a row, where torch
    splits the sum; random errors grow with the root of their number.
    """
    from gpu_choices import overlaps
    from pifa_compiler.kernels import linear_triton_tiles as tiles
    from pifa_compiler.kernels.linear_triton_dependent import decode_dependently
    from pifa_compiler.kernels.linear_triton_operator import linear_triton
    from torch._inductor import config

    def last_adds(*values: Tensor | None) -> Tensor:
        with mock.patch.object(tiles, "LAST_ADDS", True):
            return linear_triton(*values)

    def dependent(x: Tensor, *rest: Tensor | None) -> Tensor:
        return decode_dependently(x, *rest, "ieee", False)

    config.max_autotune = False
    always: dict[str, Callable[..., Tensor]] = {
        "linear_triton": linear_triton, "last adds": last_adds, "linear_gemm": ordered_gemm
    }  # fmt: skip
    wrong = []
    for tokens, ordered, biased in itertools.product(TOKENS, (True, False), (True, False)):
        x, w_pivot, coeff, order, bias = operands(*size, tokens, DTYPES[name])
        o, b = order if ordered else None, bias if biased else None
        exact = linear_ref(x.double(), w_pivot.double(), coeff.double(), o, None if b is None else b.double())
        torch_error = (linear(x, w_pivot, coeff, o, b) - exact).abs().max().item()
        rounding = torch.finfo(DTYPES[name]).eps + torch.finfo(torch.float32).eps * size[1] ** 0.5
        bound = 2 * torch_error + rounding * exact.abs().max().item()
        for form, run in (always | ({"dependent": dependent} if overlaps(x) else {})).items():
            error = (run(x, w_pivot, coeff, o, b) - exact).abs().max().item()
            if not error <= bound:
                wrong.append(f"WRONG {form} {name} {size} tokens {tokens} order {ordered} bias {biased}: "
                             f"error {error:.3g}, bound {bound:.3g}")  # fmt: skip
    return wrong


def ordered_gemm(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """What `Lower` makes of several tokens, uncompiled."""
    y = linear_gemm(x, w_pivot, coeff)
    y = y if order is None else y.index_select(-1, order)
    return y if bias is None else y + bias


def check_siblings(name: str, which: str) -> list[str]:
    """What values of either form for siblings are wrong, weights side by side in memory or apart; as in `check`."""
    from gpu_choices import overlaps
    from pifa_compiler.kernels.linear_triton_dependent import decode_siblings_dependently
    from pifa_compiler.kernels.linear_triton_siblings import linear_siblings_triton

    def dependent(x: Tensor, *rest: list[Tensor]) -> list[Tensor]:
        return decode_siblings_dependently(x, *rest, "ieee", False)

    d_in, sizes = SIBLINGS[which]
    dtype = DTYPES[name]
    values = [operands(out, d_in, rank, 1, dtype) for out, rank in sizes]
    w_pivots, coeffs, orders, biases = ([each[place] for each in values] for place in (1, 2, 3, 4))
    wrong = []
    for laid, tokens in itertools.product((False, True), (*TOKENS, 200)):
        if laid:
            lay_side_by_side(w_pivots)
            lay_side_by_side(coeffs)
        x = torch.randn(tokens, d_in, device="cuda").to(dtype)
        forms = [linear_siblings_gemm, linear_siblings_triton, linear_siblings_batched]
        for form in [*forms, dependent] if overlaps(x) else forms:
            behind = [(None, None)] * len(sizes)
            if form in (linear_siblings_triton, dependent):
                results, behind = form(x, w_pivots, coeffs, orders, biases), zip(orders, biases, strict=True)
            elif form is linear_siblings_batched:
                if which != "equal":
                    continue
                results = form(x, w_pivots, coeffs).unbind(-2)
            else:
                z, rest = form(x, w_pivots, coeffs)
                parts = z.split([w.shape[0] for w in w_pivots], -1), rest.split([c.shape[0] for c in coeffs], -1)
                results = [torch.cat(pair, -1) for pair in zip(*parts, strict=True)]
            for i, (w_pivot, coeff, (o, b), got) in enumerate(zip(w_pivots, coeffs, behind, results, strict=True)):
                exact = linear_ref(x.double(), w_pivot.double(), coeff.double(), o, None if b is None else b.double())
                torch_error = (linear(x, w_pivot, coeff, o, b) - exact).abs().max().item()
                rounding = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * d_in**0.5
                bound = 2 * torch_error + rounding * exact.abs().max().item()
                error = (got - exact).abs().max().item()
                if not error <= bound:
                    wrong.append(f"WRONG {form} {name} {which} {i} tokens {tokens} laid {laid}: "
                                 f"error {error:.3g}, bound {bound:.3g}")  # fmt: skip
    return wrong


class Block(nn.Module):
    """Two siblings of one shape, and the layer that absorbs their order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(256, 512), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 256] -> [..., 256]."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def check_model() -> list[str]:
    """What is wrong with a small model under the backend: its values, that it does not run our forms, or copies."""
    import pifa_compiler as pc

    torch.manual_seed(0)
    model = Block().cuda().requires_grad_(False)
    batches = [torch.randn(1024, 256, device="cuda") for _ in range(2)]
    pc.compress(model, batches, pc.CompressConfig(density=0.5))
    wrong = []
    for tokens, form, mode in (
        (1, "siblings_decode_kernel", None), (64, "pifa::linear_siblings_gemm", None),
        (1, "siblings_decode_kernel", "reduce-overhead"), (64, "gemm", "reduce-overhead"),
    ):  # fmt: skip
        x = torch.randn(tokens, 256, device="cuda")
        exact = copy.deepcopy(model).double()(x.double())
        torch._dynamo.reset()
        fast = torch.compile(model, backend="pifa", dynamic=False, mode=mode)
        with torch.no_grad():
            for _ in range(3):  # compiles, records, replays
                error = (fast(x) - exact).abs().max().item()
            with torch.profiler.profile() as profile:  # operators and kernels
                fast(x)
        ran = {event.key: event.count for event in profile.key_averages()}
        copies = sum(count for name, count in ran.items() if "Memcpy DtoD" in name)
        if not error <= 1e-5 * exact.abs().max().item():
            wrong.append(f'WRONG model under backend="pifa", mode {mode}, tokens {tokens}: error {error:.3g}')
        if not any(form in name for name in ran):
            wrong.append(f"NOT RUN, mode {mode}, tokens {tokens}: no {form} among {sorted(ran)}")
        if copies > 2:  # the input, and the result
            wrong.append(f"COPIED {copies} times at replay, mode {mode}, tokens {tokens}")
    return wrong


def run_checks(jobs: int) -> None:
    """Exits with 1 if a value is wrong."""
    wrong = check_model()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(check, name, size) for name in DTYPES for size in RAGGED]
        found += [pool.submit(check_siblings, name, which) for name in DTYPES for which in SIBLINGS]
        wrong += [line for each in found for line in each.result()]
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(f"{len(wrong)} checks failed; nothing was timed")
    print("all forms and a model are right", flush=True)


Row = TypeVar("Row")


def by(end: float, rows: Iterator[Row], what: str) -> Iterator[Row]:
    """The rows that can be had by a time of `time.monotonic`, if none takes longer than the longest so far."""
    longest = 0.0
    while (before := time.monotonic()) + longest < end:
        try:
            row = next(rows)
        except StopIteration:
            return
        longest = max(longest, time.monotonic() - before)
        yield row
    print(f"LEFT OUT for lack of time: the rest of {what}", flush=True)


def require_gpu() -> None:
    """Exits with 1 where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]} needs a GPU that torch can use; torch.cuda.is_available() is False here")


def main() -> None:
    """Parses the options, checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--only", default="checks,choices,models,layers,ranks")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--dims", default="2048,4096,8192", help="of layers; ranks are of the first two")
    parser.add_argument("--tokens", default="1,16,64,512,2048")
    parser.add_argument("--layers", type=int, default=2, help="of the model; each takes seconds to compile")
    parser.add_argument("--jobs", type=int, default=8, help="processes that check values side by side")
    options = parser.parse_args()
    require_gpu()
    end = time.monotonic() + 60 * options.minutes
    from gpu_choices import ChoiceRow, choice_rows

    from pifa_compiler.bench.gpu import GpuLayerRow, GpuModelRow, gpu_layer_rows, gpu_model_rows
    from pifa_compiler.bench.model import ModelPlan
    from pifa_compiler.bench.rows import CsvRows

    device, parts, bf16 = torch.device("cuda"), options.only.split(","), ["bf16"]
    if "checks" in parts:
        run_checks(options.jobs)
    plan = ModelPlan(decode_context=512, layers=options.layers, repeats=20)
    dims, tokens = ([int(text) for text in numbers.split(",")] for numbers in (options.dims, options.tokens))
    multiples = (1, 8, 16, 32, 64, 128)
    for part, name, row_type, rows in (
        ("choices", "choices", ChoiceRow, choice_rows([4096], tokens, torch.bfloat16, device)),
        ("models", "models", GpuModelRow,
         gpu_model_rows("llama-8x4096", plan, device, (1, 16, 64), prompts=(512, 2048))),
        ("layers", "layers", GpuLayerRow, gpu_layer_rows(dims, tokens, bf16, device)),
        ("ranks", "layers", GpuLayerRow,
         gpu_layer_rows(dims[:2], (1, 512), bf16, device, density=0.5, multiples=multiples)),
    ):  # fmt: skip
        if part in parts:
            file = CsvRows(options.output / f"gpu_{name}.csv", row_type)
            for row in by(end, rows, part):
                file.append(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()

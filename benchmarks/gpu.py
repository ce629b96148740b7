"""Checks and times what `Lower` emits on the GPU of this machine, in one go.

    python benchmarks/gpu.py [--dims 2048,4096,8192] [--tokens 1,16,512,4096] [--dtype bf16] [--tune] [--checks-only]

First values against float64 of both forms, ragged shapes included, and a model under `torch.compile(backend="pifa")`;
on a wrong value it stops with exit code 1, as it does without a GPU. Then the medians of CUDA-event times, all
contestants taking turns: dense and low-rank pair by cuBLAS, the plain PIFA subgraph under Inductor, and the layer under
backend="pifa" with and without an order to undo. Each is a CUDA graph of calls that go round over copies of the
weights, more than the L2 cache holds, so that weights come from memory and launches cost nothing. Appends to
benchmarks/results/gpu.csv with the device's name, and writes gpu.md.
"""

import argparse
import csv
import datetime
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from pifa_compiler.kernels import linear, linear_ref
from pifa_compiler.kernels.linear_gemm import linear_gemm
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RAGGED = [(40, 24, 8), (33, 17, 5), (576, 576, 96), (1000, 777, 333), (4096, 4096, 2048), (64, 48, 64)]  # out, in, rank
TOKENS = (1, 2, 16, 17, 513)


def operands(d_out: int, d_in: int, rank: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w_pivot, coeff, order, bias on the GPU."""
    shapes = (tokens, d_in), (rank, d_in), (d_out - rank, rank), (d_out,)
    x, w_pivot, coeff, bias = (torch.randn(shape, device="cuda") for shape in shapes)
    floats = (x, w_pivot / d_in**0.5, coeff / rank**0.5)
    stored = torch.randperm(d_out, device="cuda")  # the output rows in stored order, ascending in either part
    order = torch.cat((stored[:rank].sort().values, stored[rank:].sort().values)).argsort()
    return *(v.to(dtype) for v in floats), order, bias.to(dtype)


def check(name: str, size: tuple[int, int, int], tune: bool) -> list[str]:
    """What values of either form are wrong for one dtype and size.

    Wrong are errors of more than twice torch's in the same dtype plus rounding: half a unit in the last place of the
    dtype for the result, and of float32 for each of the d_in terms that one program adds up in a row, where torch
    splits the sum; random errors grow with the root of their number.
    """
    from pifa_compiler.kernels.linear_triton_operator import linear_triton
    from torch._inductor import config

    config.max_autotune = tune
    forms: dict[str, Callable[..., Tensor]] = {"linear_triton": linear_triton, "linear_gemm": ordered_gemm}
    wrong = []
    for tokens, ordered, biased in itertools.product(TOKENS, (True, False), (True, False)):
        x, w_pivot, coeff, order, bias = operands(*size, tokens, DTYPES[name])
        o, b = order if ordered else None, bias if biased else None
        exact = linear_ref(x.double(), w_pivot.double(), coeff.double(), o, None if b is None else b.double())
        torch_error = (linear(x, w_pivot, coeff, o, b) - exact).abs().max().item()
        rounding = torch.finfo(DTYPES[name]).eps + torch.finfo(torch.float32).eps * size[1] ** 0.5
        bound = 2 * torch_error + rounding * exact.abs().max().item()
        for form, run in forms.items():
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


def check_model() -> list[str]:
    """What is wrong with a small model under the backend: its values, or that it does not run our forms."""
    import pifa_compiler as pc

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    batches = [torch.randn(1024, 256, device="cuda") for _ in range(2)]
    pc.compress(model, batches, pc.CompressConfig(density=0.5))
    wrong = []
    for tokens, form in ((1, "decode_kernel"), (64, "pifa::linear_gemm")):
        x = torch.randn(tokens, 256, device="cuda")
        exact = model.double()(x.double())
        model.float()
        with torch.no_grad():
            fast = torch.compile(model, backend="pifa", dynamic=False)
            error = (fast(x) - exact).abs().max().item()
            with torch.profiler.profile() as profile:  # operators and kernels
                fast(x)
        ran = {event.key for event in profile.key_averages()}
        if not error <= 1e-5 * exact.abs().max().item():
            wrong.append(f'WRONG model under backend="pifa", tokens {tokens}: error {error:.3g}')
        if not any(form in name for name in ran):
            wrong.append(f"NOT RUN with tokens {tokens}: no {form} among {sorted(ran)}")
    return wrong


def contestants(d: int, tokens: int, dtype: torch.dtype) -> dict[str, torch.cuda.CUDAGraph]:
    """Name -> a graph that calls it once for every copy of the operands; `copies` of them."""
    plain = torch.compile(linear, dynamic=False)
    pifa = torch.compile(linear, backend="pifa", dynamic=False)
    sets = [(*operands(d, d, d // 2, tokens, dtype)[:4], *others(d, dtype)) for _ in range(copies(d, dtype))]
    return {
        "dense": graph(lambda x, p, c, o, w, u: nn.functional.linear(x, w), sets),
        "lowrank": graph(lambda x, p, c, o, w, u: x @ p.T @ u.T, sets),
        "subgraph": graph(lambda x, p, c, o, w, u: plain(x, p, c, o, None), sets),
        "pifa": graph(lambda x, p, c, o, w, u: pifa(x, p, c, o, None), sets),
        "pifa_no_order": graph(lambda x, p, c, o, w, u: pifa(x, p, c, None, None), sets),
    }


def copies(d: int, dtype: torch.dtype) -> int:
    """How often the operands are there: PIFA's weights, the fewest bytes, together three times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(4, -(-3 * cache // (3 * d * d // 4 * dtype.itemsize)))


def others(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A dense weight and U of a low-rank pair."""
    return torch.randn(d, d, device="cuda").to(dtype), torch.randn(d, d // 2, device="cuda").to(dtype)


@torch.no_grad()
def graph(call: Callable[..., Tensor], sets: list[tuple[Tensor, ...]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call for each of the operands in `sets`, compiled before."""
    for _ in range(2):
        call(*sets[0])
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for values in sets:
            call(*values)
    return captured


def medians(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a call of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Appends to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, object]]) -> str:
    """The text of gpu.md."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(line.values()) for line in rows)]
    text = "".join(f"| {' | '.join(str(value) for value in line)} |\n" for line in lines)
    return f"# Timed on {rows[0]['device']}\n\nWritten by `python benchmarks/gpu.py`.\n\n{text}"


def provenance(dtype: str) -> dict[str, object]:
    """What a figure is of: device, versions, commit, date, dtype."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": commit, "date": datetime.date.today().isoformat(), "dtype": dtype,
    }  # fmt: skip


def run_checks(jobs: int, tune: bool) -> None:
    """Exits with 1 if a value is wrong."""
    wrong = check_model()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(check, name, size, tune) for name in DTYPES for size in RAGGED]
        wrong += [line for each in found for line in each.result()]
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(f"{len(wrong)} checks failed; nothing was timed")
    print(f"{len(DTYPES) * len(RAGGED) * len(TOKENS) * 8} results and a model are right", flush=True)


def common_options(description: str | None, *, tokens: str, rounds: int) -> argparse.ArgumentParser:
    """The options of the GPU benchmarks, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="2048,4096,8192")
    parser.add_argument("--tokens", default=tokens)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile and check values side by side")
    return parser


def require_gpu() -> None:
    """Exits with 1 where there is none."""
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]} needs a GPU that torch can use; torch.cuda.is_available() is False here")


def main() -> None:
    """Parses the options, checks, times, writes."""
    parser = common_options(__doc__, tokens="1,16,512,4096", rounds=50)
    parser.add_argument("--tune", action="store_true", help="time all tiles (max_autotune) instead of the fixed ones")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--no-checks", action="store_true", help="time only; for a second run after the checks passed")
    options = parser.parse_args()
    require_gpu()
    from torch._inductor import config

    if not options.no_checks:
        run_checks(options.jobs, options.tune)
    if options.checks_only:
        return
    config.max_autotune = options.tune
    rows: list[dict[str, object]] = []
    for d in (int(text) for text in options.dims.split(",")):
        for tokens in (int(text) for text in options.tokens.split(",")):
            torch._dynamo.reset()
            dtype = DTYPES[options.dtype]
            found = medians(contestants(d, tokens, dtype), copies(d, dtype), options.rounds)
            about = provenance(options.dtype)
            rows.append({
                **{key: about[key] for key in ("device", "torch", "triton", "commit", "date")}, "tuned": options.tune,
                "dtype": options.dtype, "d": d, "tokens": tokens,
                **{f"{name}_ms": round(value, 5) for name, value in found.items()},
                "pifa_over_dense": round(found["pifa"] / found["dense"], 3),
                "pifa_over_lowrank": round(found["pifa"] / found["lowrank"], 3),
                "pifa_over_subgraph": round(found["pifa"] / found["subgraph"], 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    append(RESULTS / "gpu.csv", rows)
    (RESULTS / "gpu.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()

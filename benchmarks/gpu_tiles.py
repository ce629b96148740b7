"""Times every tile of the Triton kernels' lists on this machine's GPU, beside cuBLAS and the parts of what is emitted.

    python benchmarks/gpu_tiles.py [--dims 2048,4096,8192] [--tokens 1,16,128,512,4096] [--dtype bf16]

At r = d/2, in stored order: each tile in both products, the dense layer and the low-rank pair by cuBLAS, `linear_gemm`,
and the gather of the order alone, by ATen and by Inductor. All tiles are compiled first, side by side in processes, and
their values compared with those of `linear_gemm`; a wrong one ends the run with exit code 1. Each is timed as a CUDA
graph of calls that go round over copies of the weights, more than the L2 cache holds. Appends to
benchmarks/results/gpu_tiles.csv: what was timed, or the tile with the programs that share a sum in the first and in the
second product, and microseconds a call.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from gpu import DTYPES, RESULTS, operands, require_gpu
from pifa_compiler.kernels import linear_triton_decode, linear_triton_prefill
from pifa_compiler.kernels.linear_gemm import linear_gemm
from pifa_compiler.kernels.linear_triton_decode import MAX_TOKENS, decode
from pifa_compiler.kernels.linear_triton_prefill import prefill
from pifa_compiler.kernels.linear_triton_tiles import Tile, chunk_of_sum, decode_tiles, prefill_tiles
from torch import Tensor, nn

Job = tuple[Tile, int, int, str]
"""Tile, d, tokens, name of the dtype."""


def tiles_for(tokens: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The list that autotuning would try for so many tokens."""
    hip = torch.version.hip is not None
    if tokens > MAX_TOKENS:
        return prefill_tiles(dtype.itemsize, hip)
    return decode_tiles(dtype.itemsize, 1 if tokens == 1 else MAX_TOKENS, hip)


def with_tile(tile: Tile, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernels' own launches with `tile` in place of the fixed one."""
    few = tokens <= MAX_TOKENS
    module, name = (linear_triton_decode, "fixed_decode_tile") if few else (linear_triton_prefill, "fixed_prefill_tile")
    run = decode if few else prefill

    def call(x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
        with mock.patch.object(module, name, return_value=tile):
            return run(x, w_pivot, coeff, None, None, precision="ieee", tune=False)

    return call


def splits(tile: Tile, d: int, tokens: int) -> str:
    """Programs that share a sum, in the first and in the second product."""
    if tokens > MAX_TOKENS:
        return "1/1"
    return "/".join(str(-(-terms // chunk_of_sum(d // 2, terms, tile))) for terms in (d, d // 2))


def wrong_values(job: Job) -> str | None:
    """Compiles a tile's kernels; says by how much its values are off if they are."""
    tile, d, tokens, dtype = job
    x, w_pivot, coeff, *_ = operands(d, d, d // 2, tokens, DTYPES[dtype])
    wanted = linear_gemm(x, w_pivot, coeff).double()
    error = float((with_tile(tile, tokens)(x, w_pivot, coeff) - wanted).norm() / wanted.norm())
    # Both round y_p and y; float32 sums are in another order.
    bound = 4 * torch.finfo(DTYPES[dtype]).eps + torch.finfo(torch.float32).eps * d**0.5
    return None if error <= bound else f"WRONG {tile} d {d} tokens {tokens}: relative error {error:.3g}"


def graphs(d: int, tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, str, torch.cuda.CUDAGraph]]:
    """What is timed, the splits of a tile, and a graph that calls it once for every copy of the operands."""
    sets = [operands(d, d, d // 2, tokens, dtype)[:4] for _ in range(copies(d, dtype))]
    dense = [(x, *others(d, dtype)) for x, *_ in sets]
    pairs = [(x, w_pivot, u) for (x, w_pivot, *_), (*_, u) in zip(sets, dense, strict=True)]
    results = [(torch.randn(tokens, d, device="cuda").to(dtype), order) for *_, order in sets]
    gather = torch.compile(lambda y, order: y.index_select(-1, order), dynamic=False)
    yield "dense", "", graph(lambda x, w, u: nn.functional.linear(x, w), dense)
    yield "lowrank", "", graph(lambda x, w_pivot, u: x @ w_pivot.T @ u.T, pairs)
    yield "linear_gemm", "", graph(lambda x, w_pivot, coeff, order: linear_gemm(x, w_pivot, coeff), sets)
    yield "gather_aten", "", graph(lambda y, order: y.index_select(-1, order), results)
    yield "gather_inductor", "", graph(gather, results)
    for tile in tiles_for(tokens, dtype):
        call = with_tile(tile, tokens)
        yield str(tile), splits(tile, d, tokens), graph(lambda x, p, c, o, call=call: call(x, p, c), sets)


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


def provenance(dtype: str) -> dict[str, object]:
    """What a figure is of: device, versions, commit, date, dtype."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": commit, "date": datetime.date.today().isoformat(), "dtype": dtype,
    }  # fmt: skip


def parse_options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="2048,4096,8192")
    parser.add_argument("--tokens", default="1,16,128,512,4096")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile and check values side by side")
    return parser.parse_args()


def main() -> None:
    """Parses the options, compiles, checks, times, writes."""
    options = parse_options()
    require_gpu()
    dtype = DTYPES[options.dtype]
    sizes = [(int(d), int(tokens)) for d in options.dims.split(",") for tokens in options.tokens.split(",")]
    jobs: list[Job] = [(tile, *size, options.dtype) for size in sizes for tile in tiles_for(size[1], dtype)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        wrong = [line for line in pool.map(wrong_values, jobs, chunksize=2) if line]
    if wrong:
        sys.exit("\n".join(wrong))
    for d, tokens in sizes:
        torch._dynamo.reset()
        found = list(graphs(d, tokens, dtype))
        times = medians({what: captured for what, _, captured in found}, copies(d, dtype), options.rounds)
        about = {**provenance(options.dtype), "d": d, "tokens": tokens}
        rows = [about | {"what": what, "splits": parts, "us": round(1e3 * times[what], 2)} for what, parts, _ in found]
        append(RESULTS / "gpu_tiles.csv", rows)
        print(d, tokens, {row["what"]: row["us"] for row in rows}, flush=True)


if __name__ == "__main__":
    main()

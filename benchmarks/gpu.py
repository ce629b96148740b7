"""Checks and times the Triton kernels on the GPU of this machine, in one go.

    python benchmarks/gpu.py [--dims 2048,4096,8192] [--tokens 1,16,512,4096] [--dtype bf16] [--tune]

First values against float64, ragged shapes included; on a wrong value it stops with exit code 1, as it does without a
GPU. Then medians of CUDA-event times, all contestants taking turns, with the L2 cache overwritten before each: dense,
low-rank pair, plain PIFA subgraph (these three under Inductor), and ours with and without an order to undo. Appends to
benchmarks/results/gpu.csv with the device's name, and writes gpu.md.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from pifa_compiler.kernels import linear, linear_ref
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RAGGED = [(40, 24, 8), (33, 17, 5), (576, 576, 96), (1000, 777, 333), (4096, 4096, 2048), (64, 48, 64)]  # out, in, rank


def operands(d_out: int, d_in: int, rank: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w_pivot, coeff, order, bias on the GPU."""
    shapes = (tokens, d_in), (rank, d_in), (d_out - rank, rank), (d_out,)
    x, w_pivot, coeff, bias = (torch.randn(shape, device="cuda") for shape in shapes)
    floats = (x, w_pivot / d_in**0.5, coeff / rank**0.5)
    return *(v.to(dtype) for v in floats), torch.randperm(d_out, device="cuda"), bias.to(dtype)


def check(ours: Callable[..., Tensor]) -> int:
    """How many values tests failed: the error may be at most twice that of torch in the same dtype."""
    failed = 0
    for name, dtype in DTYPES.items():
        for size in RAGGED:
            for tokens in (1, 2, 16, 17, 513):
                x, w_pivot, coeff, order, bias = operands(*size, tokens, dtype)
                for o in (order, None):
                    for b in (bias, None):
                        exact = linear_ref(
                            x.double(), w_pivot.double(), coeff.double(), o, None if b is None else b.double()
                        )
                        error = (ours(x, w_pivot, coeff, o, b) - exact).abs().max().item()
                        torch_error = (linear(x, w_pivot, coeff, o, b) - exact).abs().max().item()
                        bound = 2 * torch_error + torch.finfo(dtype).eps * exact.abs().max().item()
                        if not error <= bound:
                            failed += 1
                            print(f"WRONG {name} {size} tokens {tokens} order {o is not None} bias {b is not None}: "
                                  f"error {error:.3g}, bound {bound:.3g}")  # fmt: skip
    return failed


def contestants(
    ours: Callable[..., Tensor], d: int, tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call without arguments."""
    x, w_pivot, coeff, order, _ = operands(d, d, d // 2, tokens, dtype)
    weight, u = torch.randn(d, d, device="cuda", dtype=dtype), torch.randn(d, d // 2, device="cuda", dtype=dtype)
    dense = torch.compile(torch.nn.functional.linear, dynamic=False)
    pair = torch.compile(lambda x, v, u: x @ v.T @ u.T, dynamic=False)
    plain = torch.compile(linear, dynamic=False)
    kernels = torch.compile(ours, dynamic=False)
    return {
        "dense": lambda: dense(x, weight),
        "lowrank": lambda: pair(x, w_pivot, u),
        "subgraph": lambda: plain(x, w_pivot, coeff, order, None),
        "pifa": lambda: kernels(x, w_pivot, coeff, order, None),
        "pifa_no_order": lambda: kernels(x, w_pivot, coeff, None, None),
    }


def medians(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            cache.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def write(rows: list[dict[str, object]]) -> None:
    """Appends to gpu.csv, rewrites gpu.md with these rows."""
    path = RESULTS / "gpu.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(line.values()) for line in rows)]
    text = "".join(f"| {' | '.join(str(value) for value in line)} |\n" for line in lines)
    (RESULTS / "gpu.md").write_text(
        f"# Timed on {rows[0]['device']}\n\nWritten by `python benchmarks/gpu.py`.\n\n{text}"
    )


def main() -> None:
    """Parses the options, checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="2048,4096,8192")
    parser.add_argument("--tokens", default="1,16,512,4096")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tune", action="store_true", help="time all tiles (max_autotune) instead of the fixed ones")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU that torch can use; torch.cuda.is_available() is False here")
    from pifa_compiler.kernels.linear_triton import linear_triton
    from torch._inductor import config

    config.max_autotune = options.tune
    if failed := check(linear_triton):
        sys.exit(f"{failed} checks failed; nothing was timed")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, object]] = []
    for d in (int(text) for text in options.dims.split(",")):
        for tokens in (int(text) for text in options.tokens.split(",")):
            torch._dynamo.reset()
            found = medians(contestants(linear_triton, d, tokens, DTYPES[options.dtype]), options.rounds)
            rows.append({
                "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
                "commit": commit, "date": datetime.date.today().isoformat(), "tuned": options.tune,
                "dtype": options.dtype, "d": d, "tokens": tokens,
                **{f"{name}_ms": round(value, 5) for name, value in found.items()},
                "pifa_over_dense": round(found["pifa"] / found["dense"], 3),
                "pifa_over_lowrank": round(found["pifa"] / found["lowrank"], 3),
                "pifa_over_subgraph": round(found["pifa"] / found["subgraph"], 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    write(rows)


if __name__ == "__main__":
    main()

"""Times a layer of heads in a basis of inputs beside the dense layer: the native kernel and the plain subgraph.

    python benchmarks/basis_linear.py [--threads 2] [--heads 256,32] [--csv FILE]

The layer is the key/value up-projection of latent attention: 512 inputs, heads of 128 (256 of them in DeepSeek-V2 and
V3, 32 in V2-Lite), with one basis for all heads and with one for each. Values are random: no time depends on them. The
three take turns, and a row holds the median of each; ratios are over the dense layer.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from pifa_compiler.kernels import basis_linear, basis_linear_cpu
from torch.nn.functional import linear

from pifa_compiler.bench.rows import provenance

D_IN, D = 512, 128


def seconds(calls: list, rounds: int) -> list[float]:
    """The median of each call over its turns; at one thread of its own time, not of the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append(clock() - start)
    return [statistics.median(taken[1:]) for taken in times]


@torch.no_grad()
def main() -> None:
    """Parses the options, measures and prints a row for every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", default="256,32")
    parser.add_argument("--tokens", default="1,4,16,64,256,512")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    reason = basis_linear_cpu.load()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    native = torch.ops.pifa.basis_linear_cpu.default
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for heads in map(int, options.heads.split(",")):
            weight = (torch.randn(heads * D, D_IN) / D_IN**0.5).to(dtype)
            rest = (torch.randn(heads * D, D_IN - D) / D_IN**0.5).to(dtype)
            for groups in (1, heads):
                order = torch.stack([torch.randperm(D_IN) for _ in range(groups)]).int()
                for tokens in map(int, options.tokens.split(",")):
                    x = torch.randn(tokens, D_IN).to(dtype)
                    dense, kernel, plain = seconds(
                        [
                            lambda x=x, w=weight: linear(x, w),
                            lambda x=x, w=rest, o=order: native(x, None, w, o, None),
                            lambda x=x, w=rest, o=order: basis_linear(x, None, w, o),
                        ],
                        options.rounds + 1,
                    )
                    case = {"dtype": str(dtype).removeprefix("torch."), "heads": heads, "bases": groups}
                    case |= {"tokens": tokens, "threads": options.threads, "dense_ms": round(dense * 1e3, 3)}
                    case |= {"native": round(kernel / dense, 3), "plain": round(plain / dense, 3)}
                    print(*(f"{name} {value}" for name, value in case.items()), flush=True)
                    rows.append({**case, **provenance()})
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""What the Triton kernels compile to on four chips, and a roofline prediction; needs no GPU.

    python benchmarks/kernel_figures.py            writes benchmarks/results/kernels.md and kernels.csv
    python benchmarks/kernel_figures.py --json     prints the figures, for the tests

The prediction is arithmetic, not a measurement: time = the larger of bytes / bandwidth and FLOPs / peak, summed over
the products, with each operand read and each result written once. What an H200 took is in gpu.md and gpu_tiles.csv.
"""

import argparse
import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # today's default; unset, Triton 3.9 warns

from kernel_compile import CHIPS, cases, compile_case, row

RESULTS = Path(__file__).parent / "results"
DIMS, TOKENS = (2048, 4096, 8192), (1, 16, 512, 4096)


@dataclass(frozen=True)
class Peak:
    """A GPU by its maker's data sheet: dense bf16 TFLOP/s, and TB/s of memory."""

    tflops: float
    terabytes: float


GPUS = {
    "A100 80GB SXM": Peak(312, 2.039),
    "H100 SXM": Peak(989, 3.35),
    "H200 SXM": Peak(989, 4.8),
    "B200": Peak(2250, 8.0),
    "MI300X": Peak(1307, 5.3),
}


def product_costs(tokens: int, rows: int, terms: int, left: int, result: int) -> tuple[int, int]:
    """Bytes and FLOPs of a product with a bf16 weight [rows, terms], at `left` and `result` bytes an element."""
    return 2 * rows * terms + left * tokens * terms + result * tokens * rows, 2 * tokens * rows * terms


def predict(gpu: Peak, products: list[tuple[int, int]]) -> tuple[float, float]:
    """Microseconds of all products, and the share of them that is bound by arithmetic."""
    times = [(moved / gpu.terabytes / 1e6, flops / gpu.tflops / 1e6) for moved, flops in products]
    total = sum(max(pair) for pair in times)
    return total, sum(arithmetic for _, arithmetic in times) / total


def predictions() -> list[dict[str, object]]:
    """What `Lower` emits at r = d / 2, without order and bias, against dense and the low-rank pair of the same rank."""
    found: list[dict[str, object]] = []
    for name, gpu in GPUS.items():
        for d in DIMS:
            for tokens in TOKENS:
                r, middle = d // 2, 4 if tokens == 1 else 2
                pifa = [product_costs(tokens, r, d, 2, middle), product_costs(tokens, d - r, r, middle, 2)]
                if tokens == 1:  # the decode kernel: y_p is put in place from its buffer
                    pifa.append((6 * tokens * r, 0))
                pair = [product_costs(tokens, r, d, 2, 2), product_costs(tokens, d, r, 2, 2)]
                dense = [product_costs(tokens, d, d, 2, 2)]
                time, share = predict(gpu, pifa)
                moved, flops = (sum(column) for column in zip(*pifa, strict=True))
                found.append({
                    "gpu": name, "d": d, "tokens": tokens, "MB": round(moved / 1e6, 2), "GFLOP": round(flops / 1e9, 3),
                    "predicted_us": round(time, 2), "predicted_share_of_peak_flops": round(share, 3),
                    "predicted_share_of_bandwidth": round(moved / gpu.terabytes / 1e6 / time, 3),
                    "predicted_over_dense": round(time / predict(gpu, dense)[0], 3),
                    "predicted_over_lowrank": round(time / predict(gpu, pair)[0], 3),
                })  # fmt: skip
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in line.values()) for line in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write(rows: list[dict[str, object]]) -> None:
    """The figures as CSV; figures and prediction as Markdown."""
    with (RESULTS / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = f"""# The Triton kernels, compiled without a GPU

Written by `python benchmarks/kernel_figures.py`. Compiled for d = 4096, r = 2048. `spills` are bytes a thread in local
memory; `wide` and `narrow` count global loads of at least 16 bytes and of fewer in the code ("plain": of matrices
alone; "order, bias", in decode only: also of single indices and biases); `resident` programs at a time on a
multiprocessor are assumed. decode1 is a GEMV and uses no tensor cores; neither does IEEE float32 on NVIDIA. Times of
most of these tiles in bf16, from an H200, are in `gpu_tiles.csv`; no other chip has timed them.

{table(rows)}
## PREDICTION, not a measurement

Roofline in bf16 from data sheets, r = d / 2, no order, no bias: every byte moved once at full bandwidth, every FLOP at
peak, launches free. Real times are longer.

{table(predictions())}"""
    (RESULTS / "kernels.md").write_text(text)


def main() -> None:
    """Compiles, and prints or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures, write nothing")
    parser.add_argument("--chip", choices=CHIPS, help="this one only; with --json")
    parser.add_argument("--fixed-only", action="store_true", help="the tiles taken without autotuning; with --json")
    options = parser.parse_args()
    wanted = [case for case in cases(fixed_only=options.fixed_only) if options.chip in (None, case.chip)]
    rows = [row(case, compile_case(case)) for case in wanted]
    if options.json:
        print(json.dumps(rows))
    else:
        write(rows)


if __name__ == "__main__":
    main()

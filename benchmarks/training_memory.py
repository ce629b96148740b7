"""Prints the memory that `distill` takes beside its teacher, over that of the dense model's weights in float32.

    python benchmarks/training_memory.py MODEL [--density 0.5] [--tokens 64] [--no-bfloat16]

Windows are short, so that values of a batch, which are in the figure, are few. Ranks are those of one density for all
layers, factors random: no memory depends on their values. The peak is that of the whole process, as Linux counts it.
"""

import argparse
import copy
from pathlib import Path

import torch
from training_step import in_pifa_form

import pifa_compiler as pc
from pifa_compiler.bench.rows import provenance
from pifa_compiler.hf.loading import load_model
from pifa_compiler.memory import resident_bytes, trim_heap


def peak_bytes() -> int:
    """The most that this process has held since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Has the system count anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Parses the options, measures and prints a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-bfloat16", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = copy.deepcopy(load_model(options.model, dtype="float32"))  # in memory, not mapped from its file
    dense = 4 * sum(parameter.numel() for parameter in teacher.parameters())
    windows = [torch.randint(0, 1000, (1, options.tokens)) for _ in range(4)]
    teacher(windows[0])  # what is loaded at the first call is none of the training
    trim_heap()
    before = resident_bytes()
    model = copy.deepcopy(teacher)
    in_pifa_form(model, options.density)
    trim_heap()
    student = resident_bytes() - before
    forget_peak()
    config = pc.DistillConfig(steps=3, batches_per_step=2, learning_rate=1e-6, bfloat16=not options.no_bfloat16)
    pc.distill(model, teacher, windows, config)
    row = {**provenance(), "model": Path(options.model).name, "density": options.density, "tokens": options.tokens}
    row |= {"bfloat16": config.bfloat16, "dense_mib": dense >> 20, "student_over_dense": round(student / dense, 2)}
    print(row | {"training_over_dense": round((peak_bytes() - before) / dense, 2)})


if __name__ == "__main__":
    main()

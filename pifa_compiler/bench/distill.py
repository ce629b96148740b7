"""The course of a distillation as rows and as a drawing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_whole
from ..report import DistillReport, StepRow
from .rows import BenchRow


@dataclass(frozen=True)
class DistillRow(StepRow, BenchRow):
    """One step as a row. `held_out` is empty where the held-out batches were not looked at."""

    @classmethod
    def of_step(cls, step: StepRow) -> "DistillRow":
        """The row of a step."""
        return cls(**asdict(step))


def draw(runs: Mapping[str, DistillReport], file: Path) -> None:
    """Draws the loss of every step, and of the held-out batches, over the steps (.png, .svg or .pdf)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        (line,) = axes.plot([row.step for row in run.steps], [row.loss for row in run.steps], alpha=0.4, label=name)
        seen = [(row.step, row.held_out) for row in run.steps if row.held_out is not None]
        at, values = [0, *(step for step, _ in seen)], [run.held_out_before, *(value for _, value in seen)]
        axes.plot(at, values, marker="o", color=line.get_color(), label=f"{name}, held out")
        axes.axvline(run.best_step, color=line.get_color(), linewidth=0.5)
    axes.set(
        xlabel="step", ylabel=f"loss ({', '.join(dict.fromkeys(run.loss for run in runs.values()))})", yscale="log"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_whole(file, lambda draft: figure.savefig(draft, dpi=150))

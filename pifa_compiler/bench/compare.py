"""`compare`: perplexity over stored numbers, every method and density on the same samples and the same texts.

Rows are kept in a JSON file as they are made, so that a run that was stopped goes on where it was. The dense model is
measured once for all rows with output gradients, and once for the methods of one flow and allocators without: gradients
may be taken in bfloat16, and no method shall suffer from another's precision.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress import compress, measure
from ..device import device_name
from ..distill import distill
from ..distillation.config import DistillConfig
from ..errors import ConfigError
from ..files import write_whole
from ..graph.linears import read_weight, weight_name
from ..graph.parts import capture_whole_or_in_parts
from ..hf.perplexity import perplexity
from ..reconstruction.allocators import ALLOCATORS
from ..reconstruction.config import CompressConfig
from ..reconstruction.methods import METHODS
from ..reconstruction.pruning import PRUNERS, STORED
from ..reconstruction.selection import find_linears
from ..reconstruction.statistics import DenseStatistics, Statistics
from ..reconstruction.sweep import Group, Progress, Sweep
from .rows import JsonRows, provenance

BASELINES = ("svd", "asvd", "svd-llm", "mpifa", "mpifa+owl", "optimal", "two-sided", "wanda-2:4", "sparsegpt-2:4")
"""What `pifa compare` runs unless asked otherwise, beside the dense model."""


@dataclass(frozen=True)
class Setting:
    """What all rows share; a file of rows belongs to one setting.

    Attributes:
        model: a folder, a Hub name or a GGUF file.
        calibration: the text calibrated on.
        tests: the texts measured on.
        samples, seqlen, seed: calibration windows.
        windows: windows of each test text, the first ones.
        rank_multiple: as in `CompressConfig`.
        dtype: of the weights.
    """

    model: str
    calibration: str
    tests: tuple[str, ...]
    samples: int = 16
    seqlen: int = 2048
    seed: int = 0
    windows: int = 16
    rank_multiple: int = 32
    dtype: str = "float32"


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        method: as asked for.
        density_asked: None where there is no choice (the dense model, 2:4 pruning).
        stored: of the compressed linears, stored numbers over dense numbers; of 2:4 pruning bytes in half precision.
        perplexity: by test text; None where it is beyond all numbers.
        seconds: to compress, without what the dense model's statistics took.
        shared_seconds: what those took, once for all rows; 0 where the row needs none.
        threads: of PyTorch, while these seconds were taken.
        device: they were taken on, as its maker calls it; "cpu" for the CPU.
        provenance: date, machine, versions and commit, as `bench.rows.provenance` gives them.
    """

    method: str
    density_asked: float | None
    stored: float
    perplexity: dict[str, float | None]
    seconds: float = 0.0
    shared_seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)
    device: str = "cpu"
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, float | None]:
        """What makes a row one of its own in a file."""
        return self.method, self.density_asked


def check_methods(names: Sequence[str]) -> None:
    """Refuses a name that is neither METHOD, METHOD+ALLOCATOR nor a pruner.

    Raises:
        ConfigError: names the unknown part and lists what is known.
    """
    for name in names:
        method, _, allocator = name.partition("+")
        if name not in PRUNERS and method not in METHODS:
            known = ", ".join([*METHODS, *PRUNERS])
            raise ConfigError(f"unknown method {name!r}; known are {known}, the former also with +ALLOCATOR")
        if "+" in name and allocator not in ALLOCATORS:
            raise ConfigError(f"unknown allocator {allocator!r} in {name!r}; known are {', '.join(ALLOCATORS)}")


@dataclass(frozen=True)
class Recovery:
    """The training that follows, the same for every row.

    Attributes:
        config: of `distill`; what is trained of pruned models is set for them.
        windows: text to train on, [1, tokens] each.
    """

    config: DistillConfig
    windows: Sequence[Tensor]

    def label(self, name: str) -> str:
        """What a method is called with it."""
        how_long = f"{self.config.steps} steps" if self.config.minutes is None else f"{self.config.minutes:g} min"
        return f"{name}, {how_long} of distillation"


class CompareRows(JsonRows[Row]):
    """The file that `compare` keeps its rows in."""

    def __init__(self, path: Path, setting: Setting) -> None:
        super().__init__(path, setting, Row)

    def has(self, key: tuple[str, float | None]) -> bool:
        """Whether a row is there already."""
        return any(row.key == key for row in self.rows)


def compare(
    model: nn.Module,
    batches: Sequence[Tensor],
    tests: Mapping[str, Sequence[Tensor]],
    file: CompareRows,
    densities: Sequence[float],
    methods: Sequence[str],
    progress: Progress | None = None,
    *,
    recovery: Recovery | None = None,
) -> list[Row]:
    """Makes the rows that `file` does not have yet: the dense model, then every method at every density.

    With `recovery` each compressed model has a second row, after training.

    Args:
        model: a causal language model; copies of it are compressed.
        batches: calibration windows [1, seqlen].
        tests: windows [1, seqlen] to measure on, by the name of their text.
        file: where rows are kept.
        densities: see `CompressConfig`.
        methods: METHOD, METHOD+ALLOCATOR or one of `PRUNERS`; see `check_methods`.
        progress: called as progress(done, total, what) within each row.
        recovery: the training; None for none.

    Returns:
        The rows asked for, in the order of the methods, old ones among them.

    Raises:
        PifaError: as `compress` and `perplexity`.
    """
    check_methods(methods)
    wanted: list[tuple[str, float | None]] = [("dense", None)]
    wanted += [(name, None) for name in methods if name in PRUNERS]
    wanted += [key for key in product((name for name in methods if name not in PRUNERS), densities)]
    shared = _Shared(model, batches)
    keys: list[tuple[str, float | None]] = []
    for name, density in wanted:
        after = None if recovery is None or name == "dense" else (recovery.label(name), density)
        own = [(name, density), *([] if after is None else [after])]
        keys += own
        if all(map(file.has, own)):
            continue
        tell = _told(progress, name, density)
        model, row, pruned = _compressed(shared, file.setting, name, density, tell)
        if not file.has((name, density)):
            file.append(_measured(row, model, tests))
        if after is not None and recovery is not None and not file.has(after):
            config = recovery.config
            if pruned:
                config = replace(config, train=(*pruned, "norms", "biases"), keep_zeros=True)
            started = time.perf_counter()
            found = distill(model, shared.model, recovery.windows, config, progress=tell).distillation
            if found is None or found.interrupted:
                raise KeyboardInterrupt  # a shorter training is no row
            seconds = row.seconds + time.perf_counter() - started
            file.append(_measured(replace(row, method=after[0], seconds=seconds), model, tests))
    return [row for key in keys for row in file.rows if row.key == key]


def _told(progress: Progress | None, name: str, density: float | None) -> Progress:
    def tell(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(done, total, f"{name} {'' if density is None else density} {what}")

    return tell


class _Shared:
    """What rows share: the dense model, its batches, and its statistics once a row asks for them."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, batches
        self._measured: dict[bool, tuple[DenseStatistics, float]] = {}

    def statistics(self, gradients: bool, progress: Progress) -> tuple[DenseStatistics, float]:
        """Of the dense model, measured the first time, and the seconds that took."""
        if gradients not in self._measured:
            started = time.perf_counter()
            found = measure(self.model, self.batches, gradients=gradients, progress=progress)
            self._measured[gradients] = found, time.perf_counter() - started
        return self._measured[gradients]


def _compressed(
    shared: _Shared, setting: Setting, name: str, density: float | None, progress: Progress
) -> tuple[nn.Module, Row, list[str]]:
    """A compressed model, its row before anything is measured, and the names of weights that were pruned."""
    model = copy.deepcopy(shared.model)
    stored, seconds, shared_seconds = 1.0, 0.0, 0.0
    statistics, pruned = None, list[str]()
    if name in PRUNERS:
        started = time.perf_counter()
        pruned = prune(model, shared.batches, name, progress)
        stored, seconds = STORED, time.perf_counter() - started
    elif density is not None:
        method, _, allocator = name.partition("+")
        config = CompressConfig(
            density=density, method=method, rank_multiple=setting.rank_multiple, allocator=allocator or None
        )
        kind = METHODS[method]
        if not kind.two_flows or kind.gradients or ALLOCATORS[config.allocator or kind.allocator].look is not None:
            statistics, shared_seconds = shared.statistics(kind.gradients, progress)
        report = compress(model, shared.batches, config, statistics=statistics, progress=progress)
        stored, seconds = report.density, report.seconds
    at = device_name(next(model.parameters()).device)
    row = Row(name, density, stored, {}, seconds, shared_seconds, device=at, provenance=provenance())
    return model, row, pruned


def _measured(row: Row, model: nn.Module, tests: Mapping[str, Sequence[Tensor]]) -> Row:
    found = {text: perplexity(model, windows).perplexity for text, windows in tests.items()}
    return replace(row, perplexity={text: value if math.isfinite(value) else None for text, value in found.items()})


def prune(model: nn.Module, batches: Sequence[Tensor], name: str, progress: Progress | None = None) -> list[str]:
    """Prunes the linears that `compress` would compress by one of `PRUNERS`, in place, layer after layer.

    As in the authors' scripts, each layer is calibrated while those before it are pruned already.

    Returns:
        The names of the weights.
    """
    captured = capture_whole_or_in_parts(model, batches)
    found, _ = find_linears(model, captured.graph, (), {})
    parameters = dict(model.named_parameters())

    def solve(group: Group, statistics: Statistics) -> dict[torch.fx.Node, Tensor]:
        new = {node: PRUNERS[name](read_weight(captured.weights, node), statistics.gram) for node in group.members}
        pruned.update(new)
        return new

    pruned: dict[torch.fx.Node, Tensor] = {}
    Sweep(captured, list(found), flows="compressed").run(solve, progress)
    with torch.no_grad():
        for node, weight in pruned.items():
            target = parameters[weight_name(node)]
            target.copy_(weight if target.shape == weight.shape else weight.T)
    return [weight_name(node) for node in pruned]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draws perplexity, on a logarithmic scale, over stored numbers (.png, .svg or .pdf); one panel a test text."""
    from matplotlib.figure import Figure

    texts = list(rows[0].perplexity)
    figure = Figure(figsize=(6.5 * len(texts), 5), layout="constrained")
    for text, axes in zip(texts, figure.subplots(1, len(texts), squeeze=False)[0], strict=True):
        for method, points in _curves(rows, text):
            x, y = zip(*points, strict=True)
            if method == "dense":
                axes.axhline(y[0], color="black", linewidth=0.8, label=f"dense {y[0]:.2f}")
            else:
                axes.plot(x, y, marker="o" if len(x) > 1 else "s", label=method)
        axes.set(xlabel="stored numbers / dense numbers", ylabel="perplexity", yscale="log", title=Path(text).name)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    write_whole(file, lambda draft: figure.savefig(draft, dpi=150))


def _curves(rows: Sequence[Row], text: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for method in dict.fromkeys(row.method for row in rows):
        own = [(row.stored, row.perplexity[text]) for row in rows if row.method == method]
        points = sorted((stored, value) for stored, value in own if value is not None)
        if points:
            yield method, points


def to_dict(setting: Setting, rows: Sequence[Row]) -> dict[str, Any]:
    """Plain values for JSON."""
    return {"setting": asdict(setting), "rows": [asdict(row) for row in rows]}

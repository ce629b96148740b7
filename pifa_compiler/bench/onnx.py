"""Speed of ONNX files in stock onnxruntime on CPUs: one linear layer as dense, low-rank pair and PIFA, by turns.

`functions` and `native` run the same PIFA file, without and with the native operator. `rewritten` is the pair's file
after `rewrite_onnx`, with the native operator; `rewritten_functions` without it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BenchError
from ..reconstruction.sweep import Progress
from .layer import layer_bound, layer_variants, random_factors
from .rows import BenchRow
from .timing import interleaved_medians

if TYPE_CHECKING:
    import onnxruntime

VARIANTS = ("dense", "lowrank", "functions", "native", "rewritten_functions", "rewritten")


@dataclass(frozen=True)
class OnnxRow(BenchRow):
    """One linear layer of shape [d, d] in float32 without bias, applied to [tokens, d].

    Attributes:
        rank: of the pair and of PIFA.
        threads: of onnxruntime, within an operator.
        dense_ms, ...: medians of `rounds` calls of each of `VARIANTS`.
        error: largest error of a PIFA variant over the largest output of the dense file.
    """

    d: int
    tokens: int
    rank: int
    threads: int
    dense_ms: float
    lowrank_ms: float
    functions_ms: float
    native_ms: float
    rewritten_functions_ms: float
    rewritten_ms: float
    error: float
    rounds: int
    functions_over_dense: float = field(init=False)
    native_over_dense: float = field(init=False)
    rewritten_over_lowrank: float = field(init=False)


def onnx_rows(
    dims: Sequence[int],
    tokens: Sequence[int],
    threads: Sequence[int] = (1, 2),
    *,
    seconds: float = 1.0,
    progress: Progress | None = None,
) -> Iterator[OnnxRow]:
    """Measures square layers at rank d / 2, one row for every size, number of threads and of tokens.

    Args:
        dims: sizes d, each 2 or more.
        tokens: rows of the input.
        threads: of onnxruntime.
        seconds: of timing for each variant in a cell.
        progress: called with (done, total, what).

    Raises:
        BenchError: a variant's result is wrong; nothing of that cell has been timed.
        ExportError: there is no native operator, or onnxruntime refuses a file.
    """
    total, done = len(dims) * len(tokens) * len(threads), 0
    for d in dims:
        with tempfile.TemporaryDirectory(prefix="pifa-bench-") as folder:
            files = _write_files(d, Path(folder))
            for count, rows in product(threads, tokens):
                if progress is not None:
                    progress(done, total, f"d = {d}, {count} threads, {rows} tokens")
                yield _row(files, d, rows, count, seconds)
                done += 1


def _write_files(d: int, folder: Path) -> dict[str, Path]:
    """The layer's file for every variant."""
    from ..export import rewrite_onnx, to_onnx

    torch.manual_seed(0)
    modules = layer_variants(random_factors(d, d, d // 2, torch.float32))
    files = {name: folder / f"{name}.onnx" for name in ("dense", "lowrank", "pifa", "rewritten")}
    for name in ("dense", "lowrank", "pifa"):
        varying = ({0: torch.export.Dim("tokens")},)
        to_onnx(modules[name], files[name], torch.randn(2, d), dynamic_shapes=varying)
    rewrite_onnx(files["lowrank"], files["rewritten"])
    pifa, rewritten = files["pifa"], files["rewritten"]
    return {
        "dense": files["dense"],
        "lowrank": files["lowrank"],
        "functions": pifa,
        "native": pifa,
        "rewritten_functions": rewritten,
        "rewritten": rewritten,
    }


def _row(files: dict[str, Path], d: int, tokens: int, threads: int, seconds: float) -> OnnxRow:
    import numpy as np

    from ..export import session

    x = torch.randn(tokens, d).numpy()
    calls = {}
    for name in VARIANTS:
        native = name in ("native", "rewritten")
        calls[name] = _Call(session(files[name], native=native, threads=threads, strict=native), x)
    expected = calls["dense"]()
    largest = float(np.abs(expected).max())
    errors = {name: float(np.abs(call() - expected).max()) / largest for name, call in calls.items()}
    # Three roundings of one layer, and those of the factors that `rewrite_onnx` computed anew.
    bound = 16 * layer_bound(torch.float32, d)
    if wrong := {name: error for name, error in errors.items() if not error <= bound}:
        raise BenchError(f"d = {d}, {tokens} tokens: {wrong} differ from the dense layer by more than {bound:.2g}")
    timing = interleaved_medians(calls, seconds)
    milliseconds = {f"{name}_ms": timing.milliseconds[name] for name in VARIANTS}
    return OnnxRow(d, tokens, d // 2, threads, **milliseconds, error=max(errors.values()), rounds=timing.rounds)


class _Call:
    """One run of a session on one input."""

    def __init__(self, session: "onnxruntime.InferenceSession", x: Any) -> None:
        self.session, self.feed = session, {session.get_inputs()[0].name: x}

    def __call__(self) -> Any:
        return self.session.run(None, self.feed)[0]

"""How results look in a terminal."""

import json
import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..memory import format_bytes
from ..report import DistillReport, Report

if TYPE_CHECKING:
    from ..bench.compare import Row
    from ..bench.demo import DemoResult
    from ..bench.gpu import GpuLayerRow, GpuModelRow
    from ..bench.layer import LayerRow
    from ..bench.model import ModelRow
    from ..bench.onnx import OnnxRow
    from ..checkpoint.inspect import Inspection
    from ..compress_checkpoint import Plan

_PIPED_WIDTH = 160


def summary(report: Report, output: Path, data: str, device: str) -> None:
    """What `pifa compress` has done, and what to do next."""
    console, where = _console(), shlex.quote(str(output))
    rows = [
        ("saved", f"{output} ({_bytes(folder_bytes(output))})"),
        (
            "density",
            f"{report.density_requested} asked, {report.density:.4f} reached; "
            f"{report.linear_density:.4f} with the linears that do not count for it",
        ),
        (
            "parameters",
            f"{report.params_before:,} -> {report.params_after:,}, {report.model_density:.4f} of the whole model",
        ),
        ("", report.rest),
        ("layers", f"{len(report.factorized)} in PIFA form, {len(report.skipped)} left dense"),
    ]
    reasons: dict[str, list[str]] = {}
    for layer in report.skipped:
        reasons.setdefault(str(layer.skipped), []).append(layer.name)
    rows += [("", f"{_names(names)}: {reason}") for reason, names in reasons.items()]
    rows += [("note", note) for note in report.notes]
    rows += [("seconds", f"{report.seconds:.1f} on {device}")]
    if report.distillation is not None:
        rows += _trained(report.distillation, device)
    measured_on = "pydoc" if data == "self" else shlex.quote(data)
    rows += [
        ("next", f"pifa eval {where} --data {measured_on}"),
        ("", f'pifa generate {where} "Once upon a time"'),
        ("", f"pifa inspect {where}"),
        ("in Python", "import pifa_compiler"),
        ("", f"transformers.AutoModelForCausalLM.from_pretrained({json.dumps(str(output))})"),
    ]
    _print_rows(console, rows)


def distillation(report: Report, output: Path, data: str, device: str) -> None:
    """What `pifa distill` has done, and what to do next."""
    console, where, found = _console(), shlex.quote(str(output)), report.distillation
    assert found is not None  # noqa: S101  it was distilled
    rows = [("saved", f"{output} ({_bytes(folder_bytes(output))})"), *_trained(found, device)]
    measured_on = "pydoc" if data == "self" else shlex.quote(data)
    _print_rows(console, [*rows, ("next", f"pifa eval {where} --data {measured_on}")])


def _trained(found: DistillReport, device: str) -> list[tuple[str, str]]:
    return [
        ("trained", f"{found.trained:,} numbers, {len(found.steps)} steps, {found.seconds:.0f} s on {device}"),
        ("loss", f"of {found.loss}, held out: {found.held_out_before:.4f} -> {found.held_out_after:.4f}"),
        *(("note", note) for note in found.notes),
    ]


def plan(found: "Plan", device: str) -> None:
    """What `pifa compress --dry-run` says."""
    needs = found.needs
    rows = [
        ("memory", f"{format_bytes(found.memory)} given, {format_bytes(needs.least)} is the least"),
        ("held already", format_bytes(needs.process)),
        ("largest block", f"{format_bytes(needs.block)}: weights, values of one batch, sums"),
        ("widest linear", f"{format_bytes(needs.solve)} to solve it"),
        ("values", f"{format_bytes(needs.values)} of all batches, {format_bytes(found.values_in_memory)} in memory"),
        ("working folder", f"{format_bytes(found.working_folder)} at most"),
        ("output", f"about {format_bytes(found.output)}"),
        ("products", f"{needs.products / 1e12:,.1f} TFLOP, and {needs.solving / 1e12:,.1f} to solve"),
        ("time", f"about {found.seconds / 60:,.0f} minutes on {device}, by the speed of a product now"),
    ]
    _print_rows(_console(), rows)


def layers(found: "Inspection", folder: Path) -> None:
    """A table by layer, and totals; below the largest coefficient and "in bf16" stands the largest of all layers."""
    table = Table(title=escape(str(folder)), show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("before", f"{found.stored_before:,}", justify="right", no_wrap=True)
    table.add_column("after", f"{found.stored_after:,}", justify="right", no_wrap=True)
    table.add_column("max|coeff|", _number(found.max_coeff, ".2f"), justify="right", no_wrap=True)
    table.add_column("in bf16", _number(found.bf16_error, ".4f"), justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("left dense because", overflow="fold")
    for layer in found.layers:
        table.add_row(
            escape(layer.name),
            " x ".join(map(str, layer.shape)),
            "dense" if layer.rank is None else str(layer.rank),
            f"{layer.stored_before:,}",
            f"{layer.stored_after:,}",
            _number(layer.max_coeff, ".2f"),
            _number(layer.bf16_error, ".4f"),
            _number(layer.error, ".4f"),
            escape("; ".join((*((layer.skipped,) if layer.skipped else ()), *layer.notes))),
        )
    console = _console()
    console.print(table)
    rows = [("method", found.method or "unknown")]
    if found.density is not None:
        asked = "" if found.density_requested is None else f"{found.density_requested} asked, "
        rows.append(("density", f"{asked}{found.density:.4f} reached"))
    if found.params_before is not None and found.params_after is not None:
        rows.append(("parameters", f"{found.params_before:,} -> {found.params_after:,} in the whole model"))
    rows.append(("size", _bytes(folder_bytes(folder))))
    rows.append(("in bf16", "relative error of a layer's weight once its factors are rounded to bfloat16"))
    _print_rows(console, rows)


def demo(result: "DemoResult", output: Path) -> None:
    """One table, dense beside PIFA, and what both answer."""
    dense, pifa = result.dense, result.pifa
    table = Table(title=f"SmolLM2-135M, density {result.density_requested} asked, {result.density:.4f} reached")
    table.add_column("")
    for title in ("dense", "PIFA", "PIFA / dense"):
        table.add_column(title, justify="right", no_wrap=True)

    def add(title: str, before: float, after: float, show: Callable[[float], str]) -> None:
        table.add_row(title, show(before), show(after), f"{after / before:.3f}")

    add("stored numbers, whole model", dense.numbers, pifa.numbers, lambda value: f"{value:,.0f}")
    add("stored numbers, linears", dense.linear_numbers, pifa.linear_numbers, lambda value: f"{value:,.0f}")
    add("size on disk, float32 safetensors", dense.bytes, pifa.bytes, _bytes)
    add("perplexity, held-out pydoc text", dense.perplexity, pifa.perplexity, lambda value: f"{value:.2f}")
    add("tokens a second, one by one", dense.tokens_per_second, pifa.tokens_per_second, lambda value: f"{value:.1f}")
    console = _console()
    console.print(table)
    rows = [
        ("perplexity", f"{result.windows} windows of {result.seqlen}, {result.tokens:,} tokens predicted"),
        ("speed", f"{result.measured}; by turns, medians; batch 1, cache of fixed size"),
        (
            "source",
            f"a 4-bit GGUF of {_bytes(result.gguf_bytes)}, here as float32; PIFA's factors are not quantized yet",
        ),
        ("seconds", f"{result.seconds:.0f} in all, {result.compress_seconds:.0f} of them to compress"),
        ("saved", str(output)),
        ("prompt", result.prompt),
        ("dense", dense.text),
        ("PIFA", pifa.text),
    ]
    _print_rows(console, rows)


def bench(rows: "Sequence[LayerRow | ModelRow]", columns: Sequence[str], origin: Mapping[str, str]) -> None:
    """Medians and ratios, a line for each row; `columns` say what was measured, `origin` on what."""
    table = Table(title="median milliseconds")
    for title in (*columns, "dense", "low-rank", "plain PIFA", "PIFA", "/ low-rank", "/ dense", "calls"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        times = (f"{time:.3f}" for time in (row.dense_ms, row.lowrank_ms, row.plain_ms, row.pifa_ms))
        ratios = (f"{row.pifa_over_lowrank:.3f}", f"{row.pifa_over_dense:.3f}")
        table.add_row(*(str(getattr(row, column)) for column in columns), *times, *ratios, str(row.rounds))
    console = _console()
    console.print(table)
    ratio = math.exp(sum(math.log(row.pifa_over_lowrank) for row in rows) / len(rows))
    _print_rows(
        console,
        [
            ("PIFA", f"{ratio:.3f} of the low-rank pair's time, geometric mean"),
            ("machine", f"{origin['machine']}, {rows[0].threads} threads"),
            (
                "versions",
                f"torch {origin['torch']}, pifa-compiler {origin['pifa_compiler']} {origin['commit']}".strip(),
            ),
        ],
    )


def bench_gpu(rows: "Sequence[GpuLayerRow | GpuModelRow]", columns: Sequence[str], origin: Mapping[str, str]) -> None:
    """Microseconds of GPU time, what of the copy rate the weights are read at, and ratios; a line for each row."""
    names = [name.removesuffix("_ms") for name in vars(rows[0]) if name.endswith("_ms") and "wall" not in name]
    table = Table(title="median microseconds of GPU time")
    for title in (*columns, *(name.replace("_", " ") for name in names), "of the copy rate", "/ low-rank", "/ dense"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        times = (_number(None if (ms := getattr(row, f"{name}_ms")) is None else 1e3 * ms, ".1f") for name in names)
        ratios = (f"{row.pifa_share:.2f}", f"{row.pifa_over_lowrank:.3f}", f"{row.pifa_over_dense:.3f}")
        table.add_row(*(str(getattr(row, column)) for column in columns), *times, *ratios)
    console = _console()
    console.print(table)
    versions = f"torch {origin['torch']}, triton {rows[0].triton}, pifa-compiler {origin['pifa_compiler']}"
    _print_rows(
        console,
        [
            ("device", f"{rows[0].device}, copies {rows[0].copy_gb_s:,.0f} GB/s"),
            ("versions", f"{versions} {origin['commit']}".strip()),
        ],
    )


def bench_onnx(rows: "Sequence[OnnxRow]", origin: Mapping[str, str]) -> None:
    """Medians and ratios of ONNX files, a line for each row."""
    table = Table(title="median milliseconds in onnxruntime, float32")
    names = ("dense", "lowrank", "functions", "native", "rewritten_functions", "rewritten")
    ratios = ("functions_over_dense", "native_over_dense", "rewritten_over_lowrank")
    for title in ("d", "threads", "tokens", *names, *ratios, "rounds"):
        table.add_column(title.replace("_over_", " / ").replace("_", " "), justify="right")
    for row in rows:
        times = (f"{getattr(row, f'{name}_ms'):.3f}" for name in names)
        shares = (f"{getattr(row, name):.3f}" for name in ratios)
        table.add_row(str(row.d), str(row.threads), str(row.tokens), *times, *shares, str(row.rounds))
    console = _console()
    console.print(table)
    _print_rows(console, [("machine", origin["machine"])])


def compare(rows: "Sequence[Row]", texts: Sequence[str], title: str) -> None:
    """Perplexity over stored numbers, a line for each method and density."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for column in ("density", "stored", *(f"perplexity, {Path(text).name}" for text in texts), "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        found = (row.perplexity[text] for text in texts)
        table.add_row(
            row.method,
            "" if row.density_asked is None else str(row.density_asked),
            f"{row.stored:.4f}",
            *("inf" if value is None else f"{value:.2f}" for value in found),
            f"{row.seconds + row.shared_seconds:.0f}",
        )
    console = _console()
    console.print(table)
    _print_rows(
        console,
        [
            ("stored", "numbers, row orders included, over dense ones, of the compressed linears; of 2:4, bytes"),
            ("seconds", "to compress; what the dense model's statistics took counts in every row that uses them"),
        ],
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    for title, text in rows:
        console.print(f"{title:<11}{text}", markup=False, highlight=False, soft_wrap=True)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _console() -> Console:
    """Standard output; as wide as the terminal, or wide enough for a table where it goes into a file."""
    console = Console()
    return console if console.is_terminal else Console(width=max(_PIPED_WIDTH, shutil.get_terminal_size().columns))

"""`pifa bench layer`, `pifa bench model` and `pifa bench onnx`: speed beside dense weights and low-rank pairs.

On GPUs layers and models have rows of other columns, see `bench.gpu`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import write_whole
from . import tables
from .options import Json, ShortDtypeName, check_plot, device_of
from .output import print_json, progress, work

if TYPE_CHECKING:
    from ..bench.gpu import GpuLayerRow, GpuModelRow
    from ..bench.rows import BenchRow

MOST_THREADS = 1024
"""PyTorch starts as many as it is told, until the process dies of it."""

_LARGEST = 1 << 16

app = typer.Typer(
    help="Measure the speed of PIFA beside dense weights and low-rank pairs, results checked first.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to this CSV file.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the ratios (.png, .svg or .pdf).")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="PyTorch's threads. Default: as PyTorch chooses.")
]
BenchDevice = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N; rows of GPUs have other columns.")]
Rounds = Annotated[int, typer.Option(min=1, help="Calls of each variant on a GPU, of which medians are taken.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Timing of each variant; medians are of 5 calls or more.")]


@app.command("layer", epilog="Example: pifa bench layer --dims 1024,2048 --tokens 1,128 --dtype bf16 --csv layers.csv")
def layer_verb(
    dims: Annotated[list[str] | None, typer.Option(metavar="D,...", help="Sizes. Default: 1024,2048,4096.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Default: 1,8,128,1024.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE,...", help="fp32, bf16, fp16. Default: fp32,bf16.")
    ] = None,
    device: BenchDevice = "cpu",
    threads: Threads = None,
    seconds: Seconds = 1.0,
    rounds: Rounds = 20,
    csv: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure square linear layers at rank d / 2."""
    from ..bench.layer import LayerRow, layer_rows
    from ..bench.rows import CsvRows, provenance

    sizes = _numbers("--dims", dims or ["1024,2048,4096"], least=2)
    counts = _numbers("--tokens", tokens or ["1,8,128,1024"], least=1)
    dtypes = _dtypes(dtype or ["fp32,bf16"])
    check_plot(plot)
    place = device_of(device)
    if place.type == "cuda":
        from ..bench.gpu import GpuLayerRow, gpu_layer_rows

        with work(as_json), progress("layers", as_json) as tell:
            measured = gpu_layer_rows(sizes, counts, dtypes, place, rounds=rounds, progress=tell)
            found = _kept(measured, csv, GpuLayerRow)
        _show_gpu(found, ("dtype", "d", "tokens"), plot, "square layers, rank d / 2", as_json)
        return
    rows = []
    with work(as_json):
        file = None if csv is None else CsvRows(csv, LayerRow)
        with progress("layers", as_json) as tell:
            for row in layer_rows(sizes, counts, dtypes, seconds=seconds, threads=threads, progress=tell):
                rows.append(row)
                if file is not None:
                    file.append(row)
        if plot is not None:
            _draw(plot, "square layers, rank d / 2", rows, lambda row: f"{row.dtype} {row.d}\n{row.tokens}")
    if as_json:
        print_json({**provenance(), "rows": [row.to_dict() for row in rows]})
    else:
        tables.bench(rows, ("dtype", "d", "tokens"), provenance())


@app.command("model", no_args_is_help=True, epilog="Example: pifa bench model llama-16x2048 --density 0.5 --layers 4")
def model_verb(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_CONFIG",
            help="A folder with a saved PIFA model; a config.json, or a folder with one, for random weights; "
            "or llama-16x2048 (16 layers, hidden 2048, MLP 8192, 32 heads, 1024 tokens in the vocabulary) or "
            "llama-8x4096 (8 layers of Llama-2-7B).",
        ),
    ],
    density: Annotated[float, typer.Option(help="Of random weights, in (0, 1]; a saved model has its own.")] = 0.5,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of random weights.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 512,
    decode_context: Annotated[int, typer.Option(min=1, help="Tokens in the cache when one is decoded.")] = 512,
    dtype: Annotated[ShortDtypeName, typer.Option(help="What the model computes in.")] = "bf16",
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks of random weights are multiples of this.")] = 32,
    device: BenchDevice = "cpu",
    batch: Annotated[
        list[str] | None, typer.Option(metavar="N,...", help="Sequences that a GPU decodes at a time. Default: 1.")
    ] = None,
    threads: Threads = None,
    seconds: Seconds = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each variant even if that takes longer.")] = 5,
    csv: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure a language model's prefill and decoding, batch 1 on CPUs."""
    from ..bench.model import ModelPlan, ModelRow, model_rows
    from ..bench.rows import CsvRows, provenance

    if not 0 < density <= 1:
        raise typer.BadParameter(f"--density must lie in (0, 1], got {density}")
    check_plot(plot)
    plan = ModelPlan(
        density, dtype, prompt_tokens, decode_context, layers, seconds, repeats, threads, rank_multiple=rank_multiple
    )
    place, batches = device_of(device), _numbers("--batch", batch or ["1"], least=1)
    if place.type == "cuda":
        from ..bench.gpu import GpuModelRow, gpu_model_rows

        with work(as_json), progress("model", as_json) as tell:
            found = _kept(gpu_model_rows(source, plan, place, batches, progress=tell), csv, GpuModelRow)
        _show_gpu(found, ("phase", "dtype", "batch", "tokens"), plot, source, as_json)
        return
    if batches != [1]:
        raise typer.BadParameter("--batch is for GPUs; give --device cuda, or leave it out")
    rows = []
    with work(as_json):
        file = None if csv is None else CsvRows(csv, ModelRow)
        with progress("model", as_json) as tell:
            for row in model_rows(source, plan, tell):
                rows.append(row)
                if file is not None:
                    file.append(row)
        if plot is not None:
            _draw(plot, source, rows, lambda row: f"{row.phase}\n{row.tokens}")
    if as_json:
        print_json({**provenance(), "rows": [row.to_dict() for row in rows]})
    else:
        tables.bench(rows, ("phase", "dtype", "tokens"), provenance())


@app.command("onnx", epilog="Example: pifa bench onnx --dims 2048 --tokens 1,128 --threads 1 --csv onnx.csv")
def onnx_verb(
    dims: Annotated[list[str] | None, typer.Option(metavar="D,...", help="Sizes. Default: 2048.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(metavar="N,...", help="Default: 1,16,128,512.")] = None,
    threads: Annotated[list[str] | None, typer.Option(metavar="N,...", help="onnxruntime's. Default: 1,2.")] = None,
    seconds: Seconds = 1.0,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Measure square linear layers at rank d / 2 as ONNX files in onnxruntime, float32."""
    from ..bench.onnx import OnnxRow, onnx_rows
    from ..bench.rows import CsvRows, provenance

    sizes = _numbers("--dims", dims or ["2048"], least=2)
    counts = _numbers("--tokens", tokens or ["1,16,128,512"], least=1)
    thread_counts = _numbers("--threads", threads or ["1,2"], least=1, most=MOST_THREADS)
    rows = []
    with work(as_json):
        file = None if csv is None else CsvRows(csv, OnnxRow)
        with progress("files", as_json) as tell:
            for row in onnx_rows(sizes, counts, thread_counts, seconds=seconds, progress=tell):
                rows.append(row)
                if file is not None:
                    file.append(row)
    if as_json:
        print_json({**provenance(), "rows": [row.to_dict() for row in rows]})
    else:
        tables.bench_onnx(rows, provenance())


def _kept(rows: "Iterable[Any]", csv: Path | None, row_type: "type[BenchRow]") -> list[Any]:
    """All rows, each appended to a file as it comes."""
    from ..bench.rows import CsvRows

    file, found = None if csv is None else CsvRows(csv, row_type), []
    for row in rows:
        found.append(row)
        if file is not None:
            file.append(row)
    return found


def _show_gpu(
    rows: "Sequence[GpuLayerRow | GpuModelRow]", columns: Sequence[str], plot: Path | None, title: str, as_json: bool
) -> None:
    from ..bench.rows import provenance

    if plot is not None:
        _draw(plot, title, rows, lambda row: "\n".join(str(getattr(row, column)) for column in columns))
    if as_json:
        print_json({**provenance(), "rows": [row.to_dict() for row in rows]})
    else:
        tables.bench_gpu(rows, columns, provenance())


def _split(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def _numbers(option: str, values: Sequence[str], *, least: int, most: int = _LARGEST) -> list[int]:
    """Whole numbers from comma lists, each once."""
    parts = _split(values)
    for part in parts:
        if not part.isdecimal() or len(part) > len(str(most)) or not least <= int(part) <= most:
            raise typer.BadParameter(
                f"{option} takes whole numbers from {least} to {most}, such as 128,1024; got {part!r:.80}"
            )
    return [int(part) for part in parts]


def _dtypes(values: Sequence[str]) -> list[str]:
    from ..bench.timing import DTYPES

    for part in (parts := _split(values)):
        if part not in DTYPES:
            raise typer.BadParameter(f"unknown --dtype {part!r}; choose from {', '.join(DTYPES)}")
    return parts


def _draw(plot: Path, title: str, rows: Sequence[Any], label: Callable[[Any], str]) -> None:
    """Times over the low-rank pair's, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 0.6 * len(rows) + 2), 4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(("dense", "plain", "pifa")):
        ratios = [getattr(row, f"{name}_ms") / row.lowrank_ms for row in rows]
        axes.bar([i + 0.27 * (place - 1) for i in range(len(rows))], ratios, 0.25, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    axes.set_ylabel("time / low-rank pair")
    axes.set_title(title)
    axes.legend()
    write_whole(plot, figure.savefig)

"""`pifa compare`: perplexity over stored numbers, every method on the same samples."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import tables as cli_print
from .output import Device, Json, device_of, print_json, progress, work


def compare_verb(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a Hub name or a .gguf file.")],
    densities: Annotated[str, typer.Option(metavar="D,...", help="Of the low-rank methods.")] = "0.9,0.8,0.65,0.5,0.4",
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="METHOD, METHOD+ALLOCATOR or a pruner. Default: all below.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text to calibrate on, as in `pifa compress`.")] = "pydoc",
    test: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to measure on; repeatable. Default: as --data.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 16,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each test text, from its start.")] = 16,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the calibration windows.")] = 0,
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks are multiples of this; 1 is exact.")] = 32,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Rows; a run that was stopped goes on from them.")
    ] = Path("pifa-compare.json"),
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows (.png, .svg or .pdf).")] = None,
    device: Device = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let Python code that comes with MODEL run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure methods side by side: svd, asvd, svd-llm, mpifa, mpifa+owl, optimal, two-sided, wanda-2:4, sparsegpt-2:4.

    The dense model comes first. What 2:4 pruning stores is counted in bytes of half precision: 0.5625 of the dense.
    """
    from ..bench.compare import BASELINES, Comparison, RowFile, check_methods, compare, draw, to_dict

    names = list(BASELINES) if methods is None else _split(methods)
    numbers = [_density(part) for part in _split(densities)]
    _check_files(output, plot)
    try:
        check_methods(names)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    tests = tuple(dict.fromkeys(test or [data]))
    if data in tests and Path(data).is_file():
        raise typer.BadParameter(f"{data} is calibrated on; measure on another text: --test TEXT")
    setting = Comparison(name, data, tests, samples, seqlen, seed, windows, rank_multiple)
    place = device_of(device)
    with work(as_json, place):
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.text import calibration_batches, evaluation_batches, read_text

        file = RowFile(output, setting)
        for text in tests:
            read_text(text, "evaluation")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=setting.dtype, device=place, trust_remote_code=trust_remote_code)
        batches = calibration_batches(data, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        measured = {text: evaluation_batches(text, model, tokenizer, seqlen=seqlen, limit=windows) for text in tests}
        with progress("comparing", as_json) as tell:
            rows = compare(model, batches, measured, file, numbers, names, tell)
        if plot is not None:
            draw(rows, plot)
    if as_json:
        print_json(to_dict(setting, rows))
    else:
        cli_print.compare(rows, tests, f"{Path(name).name}, calibrated on {Path(data).name}")


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"--densities takes numbers in (0, 1] such as 0.8,0.5; got {text!r}")
    return value


def _check_files(output: Path, plot: Path | None) -> None:
    """Refuses before the long work what would fail after it."""
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot takes a .png, .svg or .pdf file, got {str(plot)!r}")
    if plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'pifa-compiler[plot]'")
    for file in (output, plot):
        if file is not None and not file.resolve().parent.is_dir():
            raise ConfigError(f"the folder of {file} does not exist; make it first")

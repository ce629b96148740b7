"""`pifa compare`: perplexity over stored numbers, every method on the same samples."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import tables
from .options import (
    Device,
    Json,
    ModelName,
    RankMultiple,
    RemoteCode,
    Samples,
    Seed,
    Seqlen,
    check_plot,
    device_of,
)
from .output import print_json, progress, work

EXAMPLE = "Example: pifa compare HuggingFaceTB/SmolLM2-135M --densities 0.8,0.5 --methods two-sided,mpifa,wanda-2:4"


def compare_verb(
    name: ModelName,
    densities: Annotated[str, typer.Option(metavar="D,...", help="Of the low-rank methods.")] = "0.9,0.8,0.65,0.5,0.4",
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="METHOD, METHOD+ALLOCATOR or a pruner. Default: all below.")
    ] = None,
    data: Annotated[str, typer.Option(help="Text to calibrate on, as in `pifa compress`.")] = "pydoc",
    test: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to measure on; repeatable. Default: as --data.")
    ] = None,
    samples: Samples = 16,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each test text, from its start.")] = 16,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    rank_multiple: RankMultiple = 32,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Rows; a run that was stopped goes on from them.")
    ] = Path("pifa-compare.json"),
    distill_minutes: Annotated[
        float | None,
        typer.Option(
            "--distill", metavar="MINUTES", help="Train each model so long, too; on all of the text of --data."
        ),
    ] = None,
    distill_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Instead of --distill: so many updates, on whatever machine.")
    ] = None,
    windows_per_step: Annotated[
        int | None, typer.Option(min=1, help="Windows of text for one update. Default: 8, or what the minutes allow.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows (.png, .svg or .pdf).")] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure methods side by side: svd, asvd, svd-llm, mpifa, mpifa+owl, optimal, two-sided, wanda-2:4, sparsegpt-2:4.

    The dense model comes first. What 2:4 pruning stores is counted in bytes of half precision: 0.5625 of the dense.
    """
    from ..bench.compare import BASELINES, CompareRows, Recovery, Setting, check_methods, compare, draw, to_dict
    from ..distillation.config import DistillConfig

    names = list(BASELINES) if methods is None else _split(methods)
    numbers = [_density(part) for part in _split(densities)]
    check_plot(plot)
    try:
        check_methods(names)
        training = None
        if distill_minutes is not None or distill_steps is not None:
            training = DistillConfig(steps=distill_steps, minutes=distill_minutes, batches_per_step=windows_per_step)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    tests = tuple(dict.fromkeys(test or [data]))
    if data in tests and Path(data).is_file():
        raise typer.BadParameter(f"{data} is calibrated on; measure on another text: --test TEXT")
    setting = Setting(name, data, tests, samples, seqlen, seed, windows, rank_multiple)
    place = device_of(device)
    with work(as_json, place):
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.text import calibration_batches, evaluation_batches, read_text, training_batches

        file = CompareRows(output, setting)
        for text in tests:
            read_text(text, "evaluation")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=setting.dtype, device=place, trust_remote_code=trust_remote_code)
        batches = calibration_batches(data, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        measured = {text: evaluation_batches(text, model, tokenizer, seqlen=seqlen, limit=windows) for text in tests}
        recovery = None
        if training is not None:
            all_of_it = training_batches(data, model, tokenizer, seqlen=seqlen, samples=samples, seed=seed)
            recovery = Recovery(training, all_of_it)
        with progress("comparing", as_json) as tell:
            rows = compare(model, batches, measured, file, numbers, names, tell, recovery=recovery)
        if plot is not None:
            draw(rows, plot)
    if as_json:
        print_json(to_dict(setting, rows))
    else:
        tables.compare(rows, tests, f"{Path(name).name}, calibrated on {Path(data).name}")


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

"""`pifa compress`: a model's linears low-rank, saved in PIFA form."""

from typing import Annotated

import typer

from ..errors import ConfigError
from ..factors import Pivoting
from . import tables
from .options import (
    AllocatorName,
    Device,
    Dtype,
    Force,
    Json,
    MethodName,
    ModelName,
    OutputFolder,
    RankMultiple,
    RemoteCode,
    Samples,
    Seed,
    Seqlen,
    device_of,
)
from .output import print_json, progress, work

EXAMPLE = "Example: pifa compress HuggingFaceTB/SmolLM2-135M -o smol-pifa --density 0.6 --data wikitext2"

CalibrationData = Annotated[
    str,
    typer.Option(
        help="wikitext2, pydoc (the texts in CPython's help), self (text that the model writes), "
        "or a .txt, .jsonl or .parquet file."
    ),
]


def compress_verb(
    name: ModelName,
    output: OutputFolder,
    density: Annotated[float, typer.Option(help="Stored numbers over dense numbers, in (0, 1]; never exceeded.")] = 0.5,
    method: Annotated[MethodName, typer.Option(help="How weights are made low-rank.")] = "two-sided",
    mix: Annotated[float, typer.Option(help="Share of the dense model's inputs in the target, in [0, 1].")] = 0.25,
    damping: Annotated[float, typer.Option(help="Regularisation, relative to the Gram matrix.")] = 1e-3,
    data: CalibrationData = "pydoc",
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Linears to leave dense. Repeatable.")
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=RANK", help="Ranks for linears by name, whatever the density. Repeatable."),
    ] = None,
    rank_multiple: RankMultiple = 32,
    pivoting: Annotated[Pivoting, typer.Option(help="How pivot rows are chosen.")] = "lu",
    allocator: Annotated[
        AllocatorName | None,
        typer.Option(help="How ranks are shared out. Default: global for two-sided, uniform for others."),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Weigh errors by what they do to predictions.")
    ] = True,
    gradient_damping: Annotated[
        float, typer.Option(help="Regularisation, relative to the gradients' Gram matrix.")
    ] = 1e-2,
    dtype: Dtype = None,
    device: Device = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    force: Force = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a model's linears low-rank and save it in PIFA form."""
    from .. import CompressConfig, compress

    place = device_of(device)
    try:
        config = CompressConfig(
            density=density,
            method=method,
            mix=mix,
            damping=damping,
            ranks=_ranks(rank or []),
            skip=tuple(skip or ()),
            rank_multiple=rank_multiple,
            pivoting=pivoting,
            allocator=allocator,
            gradients=gradients,
            gradient_damping=gradient_damping,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with work(as_json, place):
        from ..checkpoint import save_pretrained
        from ..device import device_name
        from ..files import check_destination
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.text import calibration_batches, read_text

        check_destination(output, overwrite=force)
        if data != "self":
            read_text(data, "calibration")  # a missing text is refused before the weights are read
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        batches = calibration_batches(data, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        with progress("compressing", as_json) as tell:
            report = compress(model, batches, config, progress=tell)
        save_pretrained(model, output, tokenizer=tokenizer, report=report, overwrite=force)
        at = device_name(place)
    if as_json:
        print_json({**report.to_dict(), "output": str(output), "bytes": tables.folder_bytes(output), "device": at})
    else:
        tables.summary(report, output, data, at)


def _ranks(pairs: list[str]) -> dict[str, int]:
    """PATTERN=RANK, each, as a mapping."""
    ranks = {}
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        if not pattern or not number.isdecimal():
            raise typer.BadParameter(f"--rank takes PATTERN=RANK such as '*.down_proj=96', got {pair!r}")
        ranks[pattern] = int(number)
    return ranks

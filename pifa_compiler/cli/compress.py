"""`pifa compress`: a model's linears low-rank, saved in PIFA form."""

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

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

_MEMORY = "8GiB"
"""What is held if --offload, --resume or --dry-run is given without --memory."""

_MOST_DIGITS = 9
"""Of a rank. Python refuses to read numbers of some thousands."""

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
    refine: Annotated[
        int, typer.Option(metavar="STEPS", help="Then train each residual block's factors on the dense block's output.")
    ] = 0,
    dtype: Dtype = None,
    device: Device = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Hold no more than this, such as 8GiB; weights then stay in their files.",
        ),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --memory: where results lie until the end. Default: beside the output."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run with --memory that was stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --memory: say what the run would take, and stop.")
    ] = False,
    distill_minutes: Annotated[
        float | None,
        typer.Option("--distill", metavar="MINUTES", help="Then train the factors on the dense model's predictions."),
    ] = None,
    force: Force = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a model's linears low-rank and save it in PIFA form.

    With --memory the model may be larger than memory: its weights stay in their files and are read block by block. What
    such a run has done is kept when it is stopped, by whatever, and --resume goes on. Several processes can share it:
    torchrun --nproc-per-node 2 -m pifa_compiler compress ...

    --distill is pifa distill with its defaults, on all of the text; run that by itself to resume, or to choose more.
    """
    from .. import CompressConfig, DistillConfig, compress, distill

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
            refine=refine,
        )
        training = None if distill_minutes is None else DistillConfig(minutes=distill_minutes)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    in_files = memory is not None or offload is not None or resume or dry_run
    if in_files and data == "self":
        raise typer.BadParameter("--data self needs the model in memory: take another text, or leave --memory out")
    if in_files and training is not None:
        raise typer.BadParameter("--distill trains a model in memory: leave --memory out, or run pifa distill after it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(work(as_json, place))
        from ..checkpoint import save_pretrained
        from ..compress_checkpoint import compress_checkpoint, plan_checkpoint
        from ..device import device_name
        from ..files import check_destination
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.stored_model import open_model
        from ..hf.text import calibration_batches, read_text, training_batches
        from ..processes import joined

        processes = stack.enter_context(joined(os.environ, place))
        check_destination(output, overwrite=force)
        if data != "self":
            read_text(data, "calibration")  # a missing text is refused before the weights are read
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if processes.size > 1 and not in_files:
            raise typer.BadParameter("several processes share a run over files: give --memory")
        if in_files:
            model = open_model(name, dtype=dtype, trust_remote_code=trust_remote_code).model
        else:
            model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        batches = calibration_batches(data, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        at = device_name(place)
        options: dict[str, Any] = {"memory": memory or _MEMORY, "offload": offload, "dtype": dtype, "device": place}
        options["trust_remote_code"] = trust_remote_code
        if dry_run:
            plan = plan_checkpoint(name, output, batches, config, **options)
        else:
            with progress("compressing", as_json or not processes.is_first) as tell:
                if in_files:
                    options |= {"resume": resume, "overwrite": force, "progress": tell}
                    report = compress_checkpoint(name, output, batches, config, **options)
                else:
                    report = compress(model, batches, config, progress=tell)
                    if training is not None:
                        dense = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
                        text = training_batches(data, dense, tokenizer, seqlen=seqlen, samples=samples, seed=seed)
                        report = distill(model, dense, text, training, report=report, progress=tell)
                    save_pretrained(model, output, tokenizer=tokenizer, report=report, overwrite=force)
    if not processes.is_first:
        return
    if dry_run and as_json:
        print_json({**plan.to_dict(), "device": at})
    elif dry_run:
        tables.plan(plan, at)
    elif as_json:
        print_json({**report.to_dict(), "output": str(output), "bytes": tables.folder_bytes(output), "device": at})
    else:
        tables.summary(report, output, data, at)
    if not dry_run and report.distillation is not None and report.distillation.interrupted:
        raise typer.Exit(130)


def _ranks(pairs: list[str]) -> dict[str, int]:
    """PATTERN=RANK, each, as a mapping."""
    ranks = {}
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        if not pattern or not number.isdecimal() or len(number) > _MOST_DIGITS:
            raise typer.BadParameter(f"--rank takes PATTERN=RANK such as '*.down_proj=96', got {pair!r}")
        ranks[pattern] = int(number)
    return ranks

"""`pifa distill`: a compressed model trained on the dense one's predictions, saved anew."""

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from ..distillation.config import DistillConfig, LossName
from ..errors import ConfigError
from . import tables
from .compress import CalibrationData
from .options import (
    Device,
    Dtype,
    Folder,
    Force,
    Json,
    OutputFolder,
    RemoteCode,
    Seed,
    Seqlen,
    check_plot,
    device_of,
)
from .output import print_json, progress, work

EXAMPLE = (
    "Example: pifa distill smol-pifa --teacher HuggingFaceTB/SmolLM2-135M -o smol-again --data my.txt --minutes 60"
)


def distill_verb(
    name: Folder,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The dense model; a folder, Hub name or .gguf file.")],
    output: OutputFolder,
    steps: Annotated[int | None, typer.Option(help="How long: so many updates.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long, instead of --steps.")] = None,
    data: CalibrationData = "pydoc",
    seqlen: Seqlen = 2048,
    windows_per_step: Annotated[
        int | None, typer.Option(min=1, help="Windows of text for one update. Default: 8, or what the minutes allow.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest; it ends at 0. Default: see docs/distillation.md.")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="factors, norms, biases, or a pattern of names. Repeatable. Default: these."),
    ] = None,
    loss: Annotated[
        LossName | None, typer.Option(help="Default: logits where the model predicts the next token.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of both models' predictions.")] = 1.0,
    text_share: Annotated[float, typer.Option(help="Of the loss, the cross entropy of the text, in [0, 1].")] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Write the teacher's K likeliest tokens to disk once."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Hold no more than this, such as 8GiB; values are computed twice if need be."
        ),
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: spread the weights of both models over the processes.")
    ] = False,
    offload: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where states lie until the end. Default: beside the output.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the steps to this CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the losses (.png, .svg or .pdf).")] = None,
    teacher_dtype: Dtype = None,
    device: Device = None,
    seed: Seed = 0,
    force: Force = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train a compressed model on the dense one's predictions; it keeps its form, and its size.

    The last windows of the text are held out, and say which state is the best. What is done lies on disk every five
    minutes: --resume goes on after a stop. Ctrl-C saves the best state so far. Several processes share the steps:
    torchrun --nproc-per-node 2 -m pifa_compiler distill ...
    """
    place = device_of(device)
    check_plot(plot)
    try:
        config = DistillConfig(
            steps=steps,
            minutes=minutes,
            learning_rate=learning_rate,
            batches_per_step=windows_per_step,
            train=tuple(train) if train else DistillConfig.train,
            loss=loss,
            temperature=temperature,
            text_share=text_share,
            top_k=top_k,
            memory=memory,
            shard=shard,
            seed=seed,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(work(as_json, place))
        from ..bench.distill import DistillRow, draw
        from ..bench.rows import CsvRows
        from ..checkpoint import load_pretrained, save_pretrained
        from ..checkpoint.format import read_report
        from ..device import device_name
        from ..distill import distill
        from ..drafts import delete_at_once
        from ..files import check_destination
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.text import read_text, training_batches
        from ..processes import joined
        from ..report import Report

        processes = stack.enter_context(joined(os.environ, place))
        check_destination(output, overwrite=force)
        if data != "self":
            read_text(data, "calibration")
        rows = None if csv is None else CsvRows(csv, DistillRow)
        values = read_report(name)
        known = None if values is None else Report.from_dict(values)
        at = "cpu" if shard else place  # a part of it goes to each process's device
        model = load_pretrained(name, device=at)
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        dense = load_model(teacher, dtype=teacher_dtype, device=at, trust_remote_code=trust_remote_code)
        batches = training_batches(data, dense, tokenizer, seqlen=seqlen, seed=seed)
        beside = output.expanduser().resolve().with_name(f".{output.name}.run") if offload is None else offload
        with progress("distilling", as_json or not processes.is_first) as tell:
            report = distill(
                model,
                dense,
                batches,
                config,
                report=known,
                folder=beside,
                resume=resume,
                device=place,
                progress=tell,
            )
        found = report.distillation
        assert found is not None  # noqa: S101  what `distill` adds
        if processes.is_first:
            save_pretrained(model, output, tokenizer=tokenizer, report=report, overwrite=force)
            if rows is not None:
                for step in found.steps:
                    rows.append(DistillRow.of_step(step))
            if plot is not None:
                draw({name.name: found}, plot)
            if not found.interrupted:
                delete_at_once(beside)
    if not processes.is_first:
        return
    if as_json:
        print_json({**report.to_dict(), "output": str(output), "device": device_name(place)})
    else:
        tables.distillation(report, output, data, device_name(place))
    if found.interrupted:
        typer.echo(f"interrupted; --resume --force goes on from the last state in {beside}", err=True)
        raise typer.Exit(130)

"""What the verbs of the command line share: one JSON object on stdout, progress on stderr, and nothing else."""

import contextlib
import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def work(as_json: bool, place: "torch.device | None" = None) -> Iterator[None]:
    """Sends whatever libraries print to stderr, and keeps their progress bars away where they would be noise.

    With `place`, the device computed on, running out of its memory is an error that says so.
    """
    with contextlib.ExitStack() as stack:
        if place is not None:
            from ..device import enough_memory

            stack.enter_context(enough_memory(place))
        if as_json or not sys.stderr.isatty():
            for switch in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(switch, "1")
            stack.enter_context(_without_bars())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switches tqdm's bars off.

    The libraries' own switches do not do it: transformers reads GGUF files under a bar that it has no switch for.
    tqdm's environment variable comes too late, as torch has imported tqdm already.
    """
    tqdm = importlib.import_module("tqdm").tqdm  # it has no type information
    usual = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(usual, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = usual


@contextlib.contextmanager
def progress(title: str, as_json: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, for people; gives progress(done, total, what)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    hidden = as_json or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(title, total=None, what="")

        def advance(done: int, total: int, what: str = "") -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield advance


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout; what is not finite is null."""
    typer.echo(json.dumps(_finite(values), allow_nan=False))


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

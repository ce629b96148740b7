"""The command line `pifa`: each verb parses, calls and prints, in a file of its own; this one puts them together.

Exit codes: 0 done, 1 refused (a `PifaError`, as one line), 2 bad usage, 130 interrupted, 143 terminated.
"""

import contextlib
import io
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import interrupts
from ..errors import PifaError
from . import bench, compare, compress, demo, distill, evaluate, export, inspect


class _Verbs(TyperGroup):
    """Turns what this package refuses, what the system does, and an interrupt, into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            if error.filename is None:  # standard output, say: it would be tried once more, and fail again, at the end
                with contextlib.suppress(io.UnsupportedOperation):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _stopped() from interrupt
        except Exception as error:
            if _signals:  # a library has made an error of its own of the interrupt, as numpy does while it writes
                raise _stopped() from error
            if not isinstance(error, PifaError):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


_signals: list[int] = []
"""Those that came."""


def _stop(number: int, _: object) -> None:
    """SIGINT or SIGTERM came: what is half done is cleaned up after either."""
    _signals.append(number)
    raise KeyboardInterrupt


def _stopped() -> typer.Exit:
    terminated = signal.SIGTERM in _signals
    typer.echo("terminated" if terminated else "interrupted", err=True)
    return typer.Exit(143 if terminated else 130)


app = typer.Typer(
    cls=_Verbs,
    help="Makes language models smaller and faster without training: low-rank linears in PIFA form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line on the arguments of the program."""
    signal.signal(signal.SIGTERM, _stop)
    interrupts.hand_over(_stop)
    try:
        app(prog_name="pifa")
    finally:
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pifa-compiler {version('pifa-compiler')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before a verb; each does what it does by its own callback."""


app.command("compress", no_args_is_help=True, epilog=compress.EXAMPLE)(compress.compress_verb)
app.command("distill", no_args_is_help=True, epilog=distill.EXAMPLE)(distill.distill_verb)
app.command("eval", no_args_is_help=True, epilog=evaluate.EVAL_EXAMPLE)(evaluate.eval_verb)
app.command("generate", no_args_is_help=True, epilog=evaluate.GENERATE_EXAMPLE)(evaluate.generate_verb)
app.command("inspect", no_args_is_help=True, epilog=inspect.EXAMPLE)(inspect.inspect_verb)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo_verb)
app.command("export", no_args_is_help=True, epilog=export.EXAMPLE)(export.export_verb)
app.command("compare", no_args_is_help=True, epilog=compare.EXAMPLE)(compare.compare_verb)
app.add_typer(bench.app, name="bench")

"""Ctrl-C while the program `pifa` imports what it needs, which takes seconds: one line and the end.

The package imports this before all else. An exception would not do: some packages catch it and import on, in pieces.
Programs that import the package keep their own way.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_PACKAGE = __package__ or ""


def hand_over(handler: Callable[[int, FrameType | None], object]) -> None:
    """From here on Ctrl-C calls `handler`, in a process that does not ignore it."""
    if signal.getsignal(signal.SIGINT) in (_end, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # there is nothing to clean up yet


def _is_program() -> bool:
    """Whether this process is `pifa` or `python -m pifa_compiler`."""
    if sys.argv[0] == "-m":  # Python is looking for the module
        return _PACKAGE in sys.orig_argv[: sys.orig_argv.index("-m") + 2]
    return Path(sys.argv[0]).name == "pifa"


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)

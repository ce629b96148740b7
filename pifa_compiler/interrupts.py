"""Ctrl-C while the program `pifa` imports what it needs, which takes seconds: one line and the end.

The package imports this before all else. An exception would not do: some packages catch it and import on, in pieces.
Programs that import the package keep their own way.
"""

import os
import signal
import sys
from pathlib import Path

_PACKAGE = __package__ or ""


def take_exceptions() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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

"""The command line in this process, and in one of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from pifa_compiler import cli

SHORT = ("--seqlen", "32", "--samples", "4", "--rank-multiple", "1")
"""Of `pifa compress`, for a tiny model."""


def pifa(*arguments: object) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refusal(result: Result, code: int = 1) -> str:
    """What stderr says of a refusal; checks the exit code, and that nothing else is printed."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


def run_python(*arguments: object, cwd: Path | None = None, **variables: str) -> "subprocess.Popen[str]":
    """Starts another Python on these arguments, offline and in one thread, as tests are run.

    Args:
        arguments: of the command line.
        cwd: where it starts; None is here.
        variables: further ones of its environment.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in background jobs
    )

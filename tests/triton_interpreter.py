"""Triton's interpreter, which `make test` switches on, and processes without it."""

import os
import subprocess
import sys

import pytest

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def run_without_interpreter(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs another Python on these arguments, where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

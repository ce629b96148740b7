"""A slice of the attack on writes; `python tests/fuzz/fuzz_kills.py COUNT` is the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whatever_kills_a_write_the_old_or_the_new_is_there_whole() -> None:
    script = Path(__file__).with_name("fuzz_kills.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # it forks, which a process with threads must not
    run = subprocess.run([sys.executable, script, "100", "0"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

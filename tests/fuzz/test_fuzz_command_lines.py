"""A slice of the attack on the command line; `python tests/fuzz/fuzz_command_lines.py COUNT` is the whole."""

import pytest
from fuzz import fuzz_command_lines


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_odd_command_lines_are_refused_in_one_line() -> None:
    assert fuzz_command_lines.run(100, first=0)[1] == []

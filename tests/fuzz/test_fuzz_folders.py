"""A slice of the attack on saved models; `python tests/fuzz/fuzz_folders.py COUNT` is the whole."""

import pytest
from fuzz import fuzz_folders


@pytest.mark.slow
def test_damaged_folders_are_typed_errors() -> None:
    assert fuzz_folders.attack(500, seed=0) == []

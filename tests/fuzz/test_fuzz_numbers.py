"""A slice of the attack on numbers; `python tests/fuzz/fuzz_numbers.py COUNT` is the whole."""

import pytest
from fuzz import fuzz_numbers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_odd_weights_are_within_their_bound_or_refused() -> None:
    assert fuzz_numbers.run(range(5000))[1] == []

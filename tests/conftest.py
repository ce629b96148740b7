import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from graphs import CAPTURES, Capture

# `python -m pytest` puts the root on the path, and transformers takes the folder `kernels` there for the package of
# that name; the package under test is installed and needs no such entry.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parents[1]]


@pytest.fixture(params=CAPTURES.values(), ids=CAPTURES.keys())
def capture(request: pytest.FixtureRequest) -> Capture:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _untimed_guards() -> Iterator[None]:
    """Dynamo times the guards of whatever it compiles, with the processor's caches flushed first: 20 ms each."""
    with mock.patch("torch._dynamo.guards.profile_guard_manager", return_value=0.0, create=True):
        yield


# Matrices of tests are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)

import sys
from pathlib import Path

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


# Matrices of tests are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)

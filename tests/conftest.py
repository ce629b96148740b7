import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def _one_and_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _no_reports_of_dynamo() -> Iterator[None]:
    """What Dynamo tells about its work, and nobody reads here, takes as long as the work on programs of tests.

    It times the guards of whatever it compiles, with the processor's caches flushed first: 20 ms each. It takes apart
    every file of which a line is traced, for the name of the function there: seconds for the large ones of torch. It
    writes all settings of Inductor down for telemetry. And pytest captures its structured trace, which has no other
    reader and would not be made: every graph as text in JSON.
    """
    with (
        mock.patch("torch._dynamo.guards.profile_guard_manager", return_value=0.0, create=True),
        mock.patch("torch._dynamo.symbolic_convert.get_funcname", return_value=None, create=True),
        mock.patch("torch._dynamo.utils._scrubbed_inductor_config_for_logging", return_value=None, create=True),
        mock.patch("torch._logging._internal.trace_log", logging.Logger("without handlers")),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_stacks_of_seeds() -> Iterator[None]:
    """`torch.manual_seed` keeps the stack as text, for each kind of device that may be used later: milliseconds."""
    stacks = SimpleNamespace(format_stack=lambda: [])
    with contextlib.ExitStack() as patches:
        for device in (torch.cuda, torch.mtia, torch.xpu):
            patches.enter_context(mock.patch.object(device, "traceback", stacks, create=True))
        yield


# Matrices of tests are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)

# Graphs are many small objects that live for long: looked through every 700 new ones, they take a fifth of the time.
# Dynamo looks through the newer ones after each compilation.
gc.set_threshold(50_000, 20, 100)
torch._dynamo.config.run_gc_after_compile = False

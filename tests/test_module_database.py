"""Every module of PyTorch's own test suite: the backend changes nothing that the same module does without it."""

from collections.abc import Iterator

import pytest
import torch
from operator_samples import finding_of_ours_alone, modules, programs_of_module
from pifa_compiler.passes import Record
from programs import Program, passes_alone, quiet, rewrites

CHUNKS, SLOW_CHUNKS = 8, 32


def programs(chunk: int, chunks: int, samples: int) -> Iterator[Program]:
    for info in modules()[chunk::chunks]:
        yield from programs_of_module(info, torch.float32, samples)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_passes_change_nothing_that_a_module_does(chunk: int):
    with quiet(), passes_alone():
        found = [finding_of_ours_alone(program, "eager", []) for program in programs(chunk, CHUNKS, 1)]
    assert [line for line in found if line is not None] == []


@pytest.mark.parametrize("name", ["nn.Linear", "nn.TransformerEncoderLayer", "nn.TransformerDecoderLayer"])
def test_low_rank_weights_of_modules_are_rewritten(name: str):
    """Else the test above would say nothing about rewritten weights."""
    (info,) = (info for info in modules() if info.name == name)
    report: list[Record] = []
    with quiet(), passes_alone():
        found = [finding_of_ours_alone(p, "eager", report) for p in programs_of_module(info, torch.float32, 2)]
    assert found == [None] * len(found)
    assert rewrites(report, "FactorizeLinear") >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(SLOW_CHUNKS))
def test_modules_compiled_by_the_backend_do_what_inductor_makes_of_them(chunk: int):
    with quiet():
        found = [finding_of_ours_alone(program, "inductor", []) for program in programs(chunk, SLOW_CHUNKS, 8)]
    assert [line for line in found if line is not None] == []

"""Every operator of PyTorch's own test suite: the backend changes nothing that the same program does without it."""

from collections.abc import Iterator

import pytest
import torch
from operator_samples import finding_of_ours_alone, operators, programs_of, with_low_rank_weights
from pifa_compiler.passes import Record
from programs import Program, passes_alone, quiet, rewrites, without_code_generation

DTYPES = (torch.float32, torch.complex64)
CHUNKS, SLOW_CHUNKS = 16, 64

# Of these, products of matrices and transposes, the quick test takes more than one sample.
PRODUCTS = {
    *("nn.functional.linear", "mm", "matmul", "__rmatmul__", "addmm", "addmv", "addbmm", "baddbmm", "bmm", "mv"),
    *("einsum", "linalg.multi_dot", "inner", "tensordot", "nn.functional.bilinear", "addr"),
    *("H", "T", "mH", "mT", "t", "transpose", "permute", "nn.functional.embedding"),
}


def programs(chunk: int, chunks: int, samples: int, samples_of_products: int) -> Iterator[Program]:
    for op in operators()[chunk::chunks]:
        number = samples_of_products if op.name in PRODUCTS else samples
        # Quick, complex numbers of products alone are taken; test_operators_around_linears has all operators on them.
        for dtype in DTYPES if samples > 1 or op.name in PRODUCTS else DTYPES[:1]:
            yield from programs_of(op, dtype, number, one_kind=samples == 1 and op.name not in PRODUCTS)


def findings(program: Program, other: str) -> tuple[list[str], int]:
    """What the backend does to the program that the backend `other` does not, and how many weights it rewrote.

    If the program has linears the same is asked of it with low-rank weights.
    """
    report: list[Record] = []
    found = [finding_of_ours_alone(program, other, report)]
    if any(record.rule == "FactorizeLinear" for record in report):
        low_rank = with_low_rank_weights(program)
        if low_rank is not None:
            found.append(finding_of_ours_alone(low_rank, other, report))
    return [line for line in found if line is not None], rewrites(report, "FactorizeLinear", "FactorizePair")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_passes_change_nothing_that_an_operator_does(chunk: int):
    with quiet(), passes_alone():
        found = [line for program in programs(chunk, CHUNKS, 1, 3) for line in findings(program, "eager")[0]]
    assert found == []


@pytest.mark.parametrize("name", ["nn.functional.linear", "mm", "matmul"])
def test_low_rank_weights_among_the_samples_are_rewritten(name: str):
    """Else the test above would say nothing about rewritten weights."""
    with quiet(), passes_alone():
        samples = [p for op in operators() if op.name == name for p in programs_of(op, torch.float32, 10)]
        assert sum(findings(program, "eager")[1] for program in samples if program.name.endswith("function")) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(SLOW_CHUNKS))
def test_all_samples_of_all_operators_do_the_same_before_code_is_generated(chunk: int):
    with quiet(), without_code_generation():
        found = [line for program in programs(chunk, SLOW_CHUNKS, 8, 64) for line in findings(program, "aot_eager")[0]]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chunk", range(SLOW_CHUNKS))
def test_operators_compiled_by_the_backend_do_what_inductor_makes_of_them(chunk: int):
    with quiet():
        found = [line for program in programs(chunk, SLOW_CHUNKS, 1, 8) for line in findings(program, "inductor")[0]]
    assert found == []

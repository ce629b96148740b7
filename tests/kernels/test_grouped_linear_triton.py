"""Values by Triton's interpreter (`make test` sets TRITON_INTERPRET=1), tracing in a process without it."""

import pytest
import torch
from grouped_operands import ENDS, SIZES, check_errors, operands
from pifa_compiler.kernels import grouped_linear
from triton_interpreter import interpreted, run_without_interpreter

pytest.importorskip("triton", reason="needs the package triton")

DTYPES = [torch.float32, torch.float16]  # the interpreter's tl.dot is wrong for bfloat16


def run(*values):
    from pifa_compiler.kernels.grouped_linear_triton_operator import grouped_linear_triton

    return grouped_linear_triton(*values)


@interpreted
@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size: tuple[int, int, int], dtype: torch.dtype, where: str):
    check_errors(run, size, where, dtype)


@interpreted
@pytest.mark.parametrize(("rows", "ends"), [(130, [0, 66, 67, 130]), (200, [90, 90, 199])], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_values_over_several_tiles_of_an_expert(rows: int, ends: list[int], index: torch.dtype):
    x, w_pivot, coeff, order, bias, _ = operands((150, 40, 70), rows, ends, torch.float32)
    values = (x, w_pivot, coeff, order, bias, torch.tensor(ends, dtype=index))
    torch.testing.assert_close(run(*values), grouped_linear(*values), rtol=1e-4, atol=1e-4)  # sums of 70 terms


@interpreted
@pytest.mark.parametrize("given", ["", "order", "bias"])
def test_operands_may_be_strided_and_order_and_bias_left_out(given: str):
    x, w_pivot, coeff, order, bias, ends = operands((33, 24, 8), 9, [2, 2, 7], torch.float32)
    order, bias = order if given == "order" else None, bias if given == "bias" else None
    strided = (x.T.contiguous().T, w_pivot.mT.contiguous().mT, coeff.mT.contiguous().mT)
    got = run(*strided, order, bias, ends)
    torch.testing.assert_close(got, grouped_linear(x, w_pivot, coeff, order, bias, ends), rtol=1e-5, atol=1e-5)


@interpreted
def test_there_may_be_many_experts():
    ends = torch.randint(0, 3, (70,)).cumsum(0).tolist()
    values = operands((20, 12, 6), ends[-1] + 2, ends, torch.float32)
    torch.testing.assert_close(run(*values), grouped_linear(*values), rtol=1e-5, atol=1e-5)


@interpreted
def test_operands_that_do_not_fit_are_refused():
    x, w_pivot, coeff, order, bias, ends = operands((17, 12, 5), 6, [2, 2, 6], torch.float32)
    with pytest.raises(ValueError, match=r"one of .* throughout"):
        run(x.double(), w_pivot, coeff, order, bias, ends)
    for wrong in ((x[:, 1:], w_pivot, coeff), (x, w_pivot[1:], coeff), (x, w_pivot, coeff[..., 1:])):
        with pytest.raises(ValueError, match=r"takes x \[rows, in\]"):
            run(*wrong, order, bias, ends)


TRACE = """
import torch
from torch._subclasses import FakeTensorMode
from torch._functorch.aot_autograd import aot_export_module
from pifa_compiler.kernels import grouped_linear_triton_operator as _registers
class Layer(torch.nn.Module):
    def forward(self, *values):
        return (torch.ops.pifa.grouped_linear_triton.default(*values),)
for rows in (2, 512):
    with FakeTensorMode():
        h, i = dict(device="cuda", dtype=torch.bfloat16), dict(device="cuda", dtype=torch.int64)
        weights = torch.empty(4, 32, 64, **h), torch.empty(4, 64, 32, **h)
        weights += torch.empty(4, 96, **i), torch.empty(4, 96, **h)
        values = (torch.empty(rows, 64, **h), *weights, torch.empty(4, **i))
        gm, _ = aot_export_module(Layer(), values, trace_joint=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    print(sum("triton_kernel_wrapper" in target for target in targets), sum("pifa" in target for target in targets))
"""


def test_inductor_sees_two_kernels_and_no_opaque_operator():
    """In a process without the interpreter."""
    done = run_without_interpreter("-c", TRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 0"] * 2

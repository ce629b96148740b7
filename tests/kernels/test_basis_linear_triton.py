"""Values by Triton's interpreter (`make test` sets TRITON_INTERPRET=1), tracing in a process without it."""

import pytest
import torch
from basis_operands import SIZES, check_errors, operands
from pifa_compiler.kernels import basis_linear
from triton_interpreter import interpreted, run_without_interpreter

pytest.importorskip("triton", reason="needs the package triton")

DTYPES = [torch.float32, torch.float16]  # the interpreter's tl.dot is wrong for bfloat16


def run(*values):
    from pifa_compiler.kernels.basis_linear_triton import FORM

    return FORM.linear(*values)


@interpreted
@pytest.mark.parametrize("tokens", [1, 16, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_against_float64(size: tuple[int, ...], dtype: torch.dtype, tokens: int):
    for bias in (True, False):
        check_errors(run, operands(size, tokens, dtype, bias))


@interpreted
def test_plain_rows_leading_dimensions_and_empty_inputs():
    x, *others = operands((5, 4, 8, 33, 2), 12, torch.float32)
    strided = x.t().contiguous().t().unflatten(0, (3, 4))
    wanted = basis_linear(x, *others).unflatten(0, (3, 4))
    torch.testing.assert_close(run(strided, *others), wanted, rtol=1e-5, atol=1e-5)  # float32 sums of 33 terms
    assert run(strided[:, :0], *others).shape == (3, 0, 37)


@interpreted
def test_operands_that_do_not_fit_are_refused():
    x, front, rest, order, bias = operands((5, 4, 8, 33, 2), 4, torch.float32)
    with pytest.raises(ValueError, match=r"one of .* throughout"):
        run(x.double(), front, rest, order, bias)
    for wrong in ((x[:, 1:], None, rest, order, None), (x, front, rest[:-1], order, bias[:-1])):
        with pytest.raises(ValueError, match=r"takes x \[\.\.\., in\]"):
            run(*wrong)


TRACE = """
import torch
from torch._subclasses import FakeTensorMode
from torch._functorch.aot_autograd import aot_export_module
from pifa_compiler.kernels import basis_linear_triton_operator as _registers
class Layer(torch.nn.Module):
    def forward(self, *values):
        return (torch.ops.pifa.basis_linear_triton.default(*values),)
for tokens in (2, 512):
    with FakeTensorMode():
        h = dict(device="cuda", dtype=torch.bfloat16)
        order = torch.empty(2, 64, device="cuda", dtype=torch.int32)
        values = torch.empty(tokens, 64, **h), torch.empty(96, 48, **h), order
        gm, _ = aot_export_module(Layer(), (*values, torch.empty(96, **h)), trace_joint=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    print(sum("triton_kernel_wrapper" in target for target in targets), sum("pifa" in target for target in targets))
"""


def test_inductor_sees_a_kernel_and_no_opaque_operator():
    """In a process without the interpreter."""
    done = run_without_interpreter("-c", TRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 0"] * 2

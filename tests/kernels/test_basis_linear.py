import pytest
import torch
from basis_operands import DTYPES, SIZES, operands, widen
from pifa_compiler.kernels import basis_linear, basis_linear_ref


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_computes_the_dense_weight(size: tuple[int, ...], dtype: torch.dtype):
    for tokens in (0, 1, 9):
        values = operands(size, tokens, dtype, bias=tokens != 1)
        got, exact = basis_linear(*values), basis_linear_ref(*widen(values))
        assert (got.shape, got.dtype) == (exact.shape, dtype)
        # One rounding of the product and one of the sum, of terms of unit scale, d_in of them in float32.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=12 * torch.finfo(dtype).eps)


def test_its_gradients_are_those_of_the_dense_weight():
    values = widen(operands((5, 4, 8, 33, 2), 6, torch.float64))
    given = [value.requires_grad_() for value in values if value.is_floating_point()]
    gradients = [torch.autograd.grad(f(*values).square().sum(), given) for f in (basis_linear, basis_linear_ref)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_capture_holds_one_node(dynamic: bool):
    x, *rest = operands((5, 4, 8, 33, 2), 6, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return basis_linear(x, *rest)

    shapes = {"x": {0: torch.export.Dim.AUTO}} if dynamic else None
    program = torch.export.export(Layer(), (x,), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.pifa.basis_linear.default) == 1
    assert torch.equal(program.module()(x), basis_linear(x, *rest))

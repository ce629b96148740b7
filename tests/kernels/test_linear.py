import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pifa_compiler.kernels import linear, linear_ref
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (2, 3, 1), (17, 33, 5), (64, 48, 32), (31, 70, 31)]  # out, in, rank


def operands(d_out: int, d_in: int, rank: int, batch: tuple[int, ...], dtype: torch.dtype, bias: bool = True):
    """x, w_pivot, coeff, order, bias, of unit scale."""
    x = torch.randn(*batch, d_in, dtype=torch.float64)
    w_pivot = torch.randn(rank, d_in, dtype=torch.float64) / d_in**0.5
    coeff = torch.randn(d_out - rank, rank, dtype=torch.float64) / rank**0.5
    values = (x, w_pivot, coeff, torch.randperm(d_out), torch.randn(d_out, dtype=torch.float64) if bias else None)
    return tuple(v.to(dtype) if v is not None and v.is_floating_point() else v for v in values)


def widen(values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(v.double() if v is not None and v.is_floating_point() else v for v in values)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_errs_at_most_twice_as_much_as_its_reference(size: tuple[int, int, int], dtype: torch.dtype, bias: bool):
    values = operands(*size, (2, 3), dtype, bias)
    exact = linear_ref(*widen(values))
    got = linear(*values)
    assert (got.shape, got.dtype) == (exact.shape, dtype)
    reference_error = (linear_ref(*values) - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * reference_error + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_linear_takes_any_leading_dimensions(batch: tuple[int, ...]):
    values = operands(17, 33, 5, batch, torch.float64)
    torch.testing.assert_close(linear(*values), linear_ref(*values))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), d_out=st.integers(1, 40), d_in=st.integers(1, 40), rows=st.integers(0, 5))
def test_linear_is_its_reference_at_every_size(data: st.DataObject, d_out: int, d_in: int, rows: int):
    rank = data.draw(st.integers(1, d_out))
    values = operands(d_out, d_in, rank, (rows,), torch.float64, bias=data.draw(st.booleans()))
    torch.testing.assert_close(linear(*values), linear_ref(*values))


def test_order_is_the_gather_index():
    # Stored rows 10, 20, 30; output row 0 is stored row 2, 1 is 0, 2 is 1. The scatter index would give 20, 30, 10.
    x, w_pivot, coeff = torch.ones(1, 1), torch.tensor([[10.0]]), torch.tensor([[2.0], [3.0]])
    assert linear(x, w_pivot, coeff, torch.tensor([2, 0, 1])).tolist() == [[30.0, 10.0, 20.0]]
    assert linear(x, w_pivot, coeff).tolist() == [[10.0, 20.0, 30.0]]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_has_the_gradients_of_its_formula(bias: bool):
    x, w_pivot, coeff, order, b = operands(9, 7, 4, (3,), torch.float64, bias)
    inputs = [v.requires_grad_() for v in (x, w_pivot, coeff, b) if v is not None]

    def function(*new: Tensor) -> Tensor:
        return linear(*new[:3], order, new[3] if bias else None)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("ordered", [True, False], ids=["order", "no-order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_registered_as_torch_demands(dtype: torch.dtype, ordered: bool):
    x, w_pivot, coeff, order, bias = operands(17, 12, 5, (3,), dtype)
    torch.library.opcheck(torch.ops.pifa.linear.default, (x, w_pivot, coeff, order if ordered else None, bias))


def test_fake_tensors_go_through():
    with torch._subclasses.FakeTensorMode():
        values = operands(17, 33, 5, (2, 3), torch.bfloat16)
        result = linear(*values)
    assert (result.shape, result.dtype) == ((2, 3, 17), torch.bfloat16)


def test_autocast_gives_its_dtype_as_for_a_dense_linear():
    values = operands(17, 12, 5, (3,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*values).dtype is torch.bfloat16

import pytest
import torch
from pifa_compiler.kernels import grouped_linear, grouped_linear_ref
from pifa_compiler.kernels.grouped_mm import grouped_mm
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (2, 3, 1), (17, 33, 5), (64, 48, 32), (31, 70, 31)]  # out, in, rank
ENDS = {  # rows, and where each expert's end
    "ragged": (11, [3, 4, 11]),
    "experts without rows": (5, [0, 5, 5]),
    "rows of no expert": (9, [2, 4, 6]),
    "one row": (1, [0, 0, 1]),
    "no rows": (0, [0, 0, 0]),
}


def operands(size: tuple[int, int, int], rows: int, ends: list[int], dtype: torch.dtype, ordered: bool = True):
    """x, w_pivot, coeff, order, bias, ends, of unit scale; rows of no expert are NaN."""
    (d_out, d_in, rank), experts = size, len(ends)
    x = torch.randn(rows, d_in, dtype=torch.float64)
    x[ends[-1] :] = torch.nan
    w_pivot = torch.randn(experts, rank, d_in, dtype=torch.float64) / d_in**0.5
    coeff = torch.randn(experts, d_out - rank, rank, dtype=torch.float64) / rank**0.5
    bias = torch.randn(experts, d_out, dtype=torch.float64)
    order = torch.stack([torch.randperm(d_out) for _ in ends]) if ordered else None
    x, w_pivot, coeff, bias = (value.to(dtype) for value in (x, w_pivot, coeff, bias))
    return x, w_pivot, coeff, order, bias, torch.tensor(ends)


def widen(values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(v.double() if v is not None and v.is_floating_point() else v for v in values)


@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grouped_linear_errs_at_most_twice_as_much_as_its_reference(size, dtype: torch.dtype, where: str):
    rows, ends = ENDS[where]
    values = operands(size, rows, ends, dtype)
    exact = grouped_linear_ref(*widen(values))
    got = grouped_linear(*values)
    assert (got.shape, got.dtype) == (exact.shape, dtype)
    assert not got[ends[-1] :].any()  # NaN there would be "any" too
    if rows:
        reference_error = (grouped_linear_ref(*values) - exact).abs().max()
        assert (got - exact).abs().max() <= 2 * reference_error + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("given", ["", "order", "bias"])
def test_order_and_bias_can_be_left_out(given: str, index: torch.dtype):
    x, w_pivot, coeff, order, bias, ends = operands((17, 33, 5), *ENDS["ragged"], torch.float64)
    order, bias = order if given == "order" else None, bias if given == "bias" else None
    got = grouped_linear(x, w_pivot, coeff, order, bias, ends.to(index))
    torch.testing.assert_close(got, grouped_linear_ref(x, w_pivot, coeff, order, bias, ends))


def test_it_has_the_gradients_of_its_formula():
    x, w_pivot, coeff, order, bias, ends = operands((7, 5, 3), 6, [2, 2, 5], torch.float64)
    x.nan_to_num_()
    inputs = [value.requires_grad_() for value in (x, w_pivot, coeff, bias)]

    def function(x: Tensor, w_pivot: Tensor, coeff: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, w_pivot, coeff, order, bias, ends)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", ["grouped_linear", "grouped_mm", "grouped_outer"])
def test_the_operators_are_registered_as_torch_demands(name: str):
    x, w_pivot, coeff, order, bias, ends = operands((17, 12, 5), 6, [2, 2, 6], torch.float32)
    given = {
        "grouped_linear": (x, w_pivot, coeff, order, bias, ends),
        "grouped_mm": (x, w_pivot.clone().requires_grad_(), ends),
        "grouped_outer": (torch.randn(6, 3), torch.randn(6, 4), ends),
    }
    torch.library.opcheck(getattr(torch.ops.pifa, name).default, given[name])


def test_inputs_of_another_dtype_are_computed_in_that_of_the_weights():
    x, w_pivot, coeff, _, _, ends = operands((17, 12, 5), 6, [2, 2, 6], torch.bfloat16)
    wide = grouped_linear(x, w_pivot.float(), coeff.float(), None, None, ends)
    assert torch.equal(wide, grouped_linear(x.float(), w_pivot.float(), coeff.float(), None, None, ends))


def test_grouped_mm_takes_weights_of_any_strides():
    x, weight, ends = torch.randn(6, 5), torch.randn(3, 5, 7), torch.tensor([1, 4, 6])
    torch.testing.assert_close(grouped_mm(x, weight.mT, ends), grouped_mm(x, weight.mT.contiguous(), ends))

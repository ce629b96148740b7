import pytest
import torch
from grouped_operands import DTYPES, ENDS, SIZES, check_errors, operands
from pifa_compiler.kernels import grouped_linear, grouped_linear_ref
from pifa_compiler.kernels.grouped_mm import grouped_mm
from torch import Tensor


@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grouped_linear_errs_at_most_twice_as_much_as_its_reference(size, dtype: torch.dtype, where: str):
    check_errors(grouped_linear, size, where, dtype)


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

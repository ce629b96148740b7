import pytest
import torch
from grouped_operands import DTYPES, ENDS, SIZES, check_errors, operands
from pifa_compiler.kernels import grouped_linear_ref, linear_cpu
from pifa_compiler.kernels.grouped_linear_cpu import FORM

pytestmark = pytest.mark.skipif(linear_cpu.load() is not None, reason=str(linear_cpu.load()))
grouped_linear_cpu = FORM.linear


@pytest.mark.parametrize("where", ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_errs_at_most_twice_as_much_as_the_reference(size, dtype: torch.dtype, where: str):
    check_errors(grouped_linear_cpu, size, where, dtype)


def test_experts_may_have_many_rows_and_operands_any_strides():
    x, w_pivot, coeff, _, bias, ends = operands((40, 24, 9), 60, [37, 40, 55], torch.float64)
    given = (x.T.contiguous().T, w_pivot.mT.contiguous().mT, coeff.mT.contiguous().mT)
    got = grouped_linear_cpu(*(value.float() for value in given), None, bias.float(), ends.int())
    want = grouped_linear_ref(x, w_pivot, coeff, None, bias, ends)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, check_dtype=False)  # float32 sums of 24 and 9 terms


def test_the_operator_is_registered_as_torch_demands():
    x, w_pivot, coeff, order, bias, ends = operands((17, 12, 5), 6, [2, 2, 6], torch.float32)
    torch.library.opcheck(
        grouped_linear_cpu, (x, w_pivot, coeff, order, bias, ends), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("ends", [[2, 1, 6], [2, 4, 7], [-1, 2, 6]], ids=str)
def test_ends_that_are_none_are_refused(ends: list[int]):
    values = operands((17, 12, 5), 6, [2, 2, 6], torch.float32)
    with pytest.raises(IndexError, match="wanted"):
        grouped_linear_cpu(*values[:-1], torch.tensor(ends))


def test_shapes_that_do_not_fit_are_refused():
    x, w_pivot, coeff, order, bias, ends = operands((17, 12, 5), 6, [2, 2, 6], torch.float32)
    for values in ((x, w_pivot[:2], coeff, order, bias, ends), (x[:, 1:], w_pivot, coeff, order, bias, ends)):
        with pytest.raises(RuntimeError, match="wanted x"):
            grouped_linear_cpu(*values)

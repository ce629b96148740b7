import itertools
from typing import Any

import pytest
import torch
from basis_operands import DTYPES, SIZES, TOKENS, check_errors, operands
from pifa_compiler.kernels import basis_linear, basis_linear_cpu
from pifa_compiler.kernels.form import Case
from torch import nn
from vector_widths import WIDTHS, built_for

from pifa_compiler.basis_linear import BasisLinear

pytestmark = pytest.mark.skipif(basis_linear_cpu.load() is not None, reason=str(basis_linear_cpu.load()))

native = torch.ops.pifa.basis_linear_cpu


@pytest.fixture(params=WIDTHS)
def operator(request: pytest.FixtureRequest) -> Any:
    """The operator built for vectors of every width that the machine has."""
    if request.param is None:
        return native
    return built_for(request.param, basis_linear_cpu.SOURCE, (basis_linear_cpu.SCHEMA,))[1].basis_linear_cpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_against_float64(operator: Any, size: tuple[int, ...], dtype: torch.dtype):
    for tokens, bias in itertools.product(TOKENS, (True, False)):
        check_errors(operator, operands(size, tokens, dtype, bias))


@pytest.mark.usefixtures("_one_and_two_threads")
def test_threads_share_the_rows():
    for dtype in DTYPES:
        check_errors(native, operands((5, 12, 64, 96, 3), 40, dtype))


def test_leading_dimensions_strides_and_empty_inputs():
    x, front, rest, order, bias = operands((5, 4, 8, 33, 2), 12, torch.float32)
    strided = x.t().contiguous().t().unflatten(0, (3, 4))
    others = (front.t().contiguous().t(), rest.t().contiguous().t(), order.t().contiguous().t(), bias)
    wanted = basis_linear(x, front, rest, order, bias).unflatten(0, (3, 4))
    torch.testing.assert_close(native(strided, *others), wanted, rtol=1e-5, atol=1e-5)
    assert native(strided[:, :0], *others).shape == (3, 0, 37)
    assert native(x[0], *others).shape == (37,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 32)}, "wanted x"),
        ({"w_plain": torch.randn(5, 32)}, "wanted x"),
        ({"w_rest": torch.randn(32, 33)}, "wanted x"),
        ({"w_rest": torch.randn(24, 25)}, "2 groups of heads"),
        ({"w_rest": torch.randn(32, 25).half()}, "one dtype"),
        ({"bias": torch.randn(36)}, r"bias \[37\]"),
        ({"order": torch.arange(66).view(2, 33)}, "order of int32"),
        ({"order": torch.arange(66).view(2, 33).int()}, "holds 33, which is no input"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, torch.Tensor], message: str):
    names = ("x", "w_plain", "w_rest", "order", "bias")
    values = dict(zip(names, operands((5, 4, 8, 33, 2), 4, torch.float32), strict=True)) | change
    with pytest.raises((RuntimeError, IndexError), match=message):
        native(**values)


def test_the_operator_is_registered_as_torch_demands():
    torch.library.opcheck(native, operands((5, 4, 8, 33, 2), 4, torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers_use_it(dynamic: bool):
    layer, report = nn.Sequential(BasisLinear(33, 37, 8, 4, 2), nn.ReLU()).requires_grad_(False), []
    compiled = torch.compile(layer, backend="pifa", dynamic=dynamic, options={"report": report})
    for tokens in (3, 40):
        x = torch.randn(2, tokens, 33)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)  # float32 sums of 33 terms
    assert any(str(record.outcome).startswith("basis_linear_cpu") for record in report)


def test_one_token_and_one_basis_are_left_to_aten_on_one_thread(monkeypatch: pytest.MonkeyPatch):
    against = basis_linear_cpu.FORM.reason_against
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert against(Case("cpu", torch.float32, 512, 4096, 1)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "one thread" in against(Case("cpu", torch.float32, 512, 4096, 1))
    assert against(Case("cpu", torch.float32, 512, 4096, 1, groups=2)) is None
    assert against(Case("cpu", torch.float32, 512, 4096, None)) is None

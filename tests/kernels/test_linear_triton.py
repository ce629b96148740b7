"""Values by Triton's interpreter (`make test` sets TRITON_INTERPRET=1), tracing in a process without it."""

import pytest
import torch
from pifa_compiler.kernels import linear, linear_ref
from pifa_compiler.passes.lower import FORMS
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.testing import assert_close
from triton_interpreter import interpreted, run_without_interpreter

from pifa_compiler import backend as backend_module
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

pytest.importorskip("triton", reason="needs the package triton")

DTYPES = [torch.float32, torch.float16]  # the interpreter's tl.dot is wrong for bfloat16
TOKENS = [1, 2, 16, 17, 65]  # decode by a GEMV, by tensor cores, full; prefill with a ragged tile, with two
SIZES = [(40, 24, 8), (33, 17, 5), (20, 20, 20), (70, 90, 65), (12, 1, 1)]  # out, in, rank
EPILOGUES = [(True, True), (True, False), (False, True), (False, False)]


def run(*values: Tensor | None) -> Tensor:
    from pifa_compiler.kernels.linear_triton_operator import linear_triton

    return linear_triton(*values)


def in_nan(value: Tensor, row_gap: int = 3, inner: int = 1) -> Tensor:
    """The same matrix inside a larger storage full of NaN, with `row_gap` of it between rows, and before and after."""
    rows, columns = value.shape
    stride = columns * inner + row_gap
    storage = torch.full((64 + (rows + 1) * stride,), torch.nan, dtype=value.dtype)
    view = storage.as_strided((rows, columns), (stride, inner), 32)
    return view.copy_(value)


def padded(value: Tensor) -> Tensor:
    """The same tensor, contiguous, with NaN right before and after it."""
    storage = torch.full((64 + value.numel(),), torch.nan, dtype=value.dtype)
    return storage[32 : 32 + value.numel()].view(value.shape).copy_(value)


def operands(d_out: int, d_in: int, rank: int, tokens: int, dtype: torch.dtype, order: bool, bias: bool):
    x = torch.randn(tokens, d_in) + 1  # not centred: NaN-free rubbish would show as well
    w_pivot, coeff = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out - rank, rank) / rank**0.5
    b = padded(torch.randn(d_out).to(dtype)) if bias else None
    index = torch.randperm(d_out) if order else None
    return in_nan(x.to(dtype)), padded(w_pivot.to(dtype)), padded(coeff.to(dtype)), index, b


def widen(values):
    return tuple(v.double() if v is not None and v.is_floating_point() else v for v in values)


@pytest.fixture
def nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated starts as NaN, so that an element never written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(value: Tensor) -> Tensor:
        return value.fill_(torch.nan) if value.is_floating_point() else value.fill_(2**20)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: fill(new_empty(*args, **kwargs)))


def assert_errs_at_most_twice_as_much_as_torch(values) -> None:
    exact = linear_ref(*widen(values))
    got, by_torch = run(*values), linear(*values)
    assert (got.shape, got.dtype) == (by_torch.shape, by_torch.dtype)
    assert not got.isnan().any()
    bound = 2 * (by_torch - exact).abs().max() + torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= bound


@interpreted
@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=["order-bias", "order", "bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size: tuple[int, int, int], tokens: int, dtype: torch.dtype, epilogue: tuple[bool, bool]):
    assert_errs_at_most_twice_as_much_as_torch(operands(*size, tokens, dtype, *epilogue))


@interpreted
@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float16), (5, torch.float32)], ids=["one", "few"])
@pytest.mark.parametrize("size", [(40, 2500, 8), (2200, 30, 2100)], ids=["pivots", "rest"])
def test_values_where_programs_share_a_sum(size: tuple[int, int, int], tokens: int, dtype: torch.dtype):
    assert_errs_at_most_twice_as_much_as_torch(operands(*size, tokens, dtype, True, True))


@interpreted
@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[-1]], ids=["order-bias", "plain"])
def test_values_where_the_last_program_adds_the_parts(dtype: torch.dtype, epilogue, monkeypatch: pytest.MonkeyPatch):
    from pifa_compiler.kernels import linear_triton_tiles

    monkeypatch.setattr(linear_triton_tiles, "LAST_ADDS", True)
    assert_errs_at_most_twice_as_much_as_torch(operands(1150, 30, 1100, 5, dtype, *epilogue))


@interpreted
@pytest.mark.usefixtures("nan_in_new_tensors")
def test_values_over_several_groups_of_tiles():
    assert_errs_at_most_twice_as_much_as_torch(operands(150, 20, 70, 600, torch.float32, True, True))


@interpreted
def test_decode_keeps_y_p_wider_than_the_dtype():
    # y_p = 1 + 2^-12, of which float16 keeps 1; coeff (1, -1) against a second pivot row of 1 leaves the difference.
    x = torch.tensor([[1.0, 2.0**-12]] * 2, dtype=torch.float16)
    w_pivot = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float16)
    coeff = torch.tensor([[1.0, -1.0]], dtype=torch.float16)
    for tokens in (1, 2):
        assert run(x[:tokens], w_pivot, coeff, None, None)[:, 2].tolist() == [2.0**-12] * tokens


@interpreted
@pytest.mark.parametrize("tokens", [3, 20])
def test_strided_inputs(tokens: int):
    x, w_pivot, coeff, order, bias = operands(40, 24, 8, tokens, torch.float32, True, True)
    expected = linear(x, w_pivot, coeff, order, bias)
    for strided in (in_nan(x, inner=2), x.T.contiguous().T, in_nan(x, row_gap=2**22)):
        assert_close(run(strided, w_pivot, coeff, order, bias), expected)
    transposed = (w_pivot.T.contiguous().T, coeff.T.contiguous().T)
    assert_close(run(x, *transposed, order.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]), expected)


@interpreted
def test_tokens_further_apart_than_32_bits_reach():
    storage = torch.empty(700 * (2**22 - 16), dtype=torch.float16)  # virtual but for the rows written below
    x = storage.as_strided((700, 24), (2**22 - 16, 1)).copy_(torch.randn(700, 24))
    assert x.stride(0) * 700 > 2**31
    _, w_pivot, coeff, order, bias = operands(40, 24, 8, 1, torch.float16, True, True)
    assert_close(run(x, w_pivot, coeff, order, bias), linear(x, w_pivot, coeff, order, bias), rtol=2e-3, atol=4e-3)


@interpreted
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_leading_dimensions(batch: tuple[int, ...]):
    _, *rest = operands(17, 33, 5, 1, torch.float32, True, True)
    x = torch.randn(*batch, 33)
    assert_close(run(x, *rest), linear(x, *rest))


@interpreted
@pytest.mark.parametrize("order", [True, False], ids=["order", "no-order"])
def test_gradients_are_those_of_the_composite(order: bool):
    values = [v.clone().requires_grad_() if v is not None and v.is_floating_point() else v
              for v in operands(17, 12, 5, 3, torch.float32, order, True)]  # fmt: skip
    wanted = [v for v in values if v is not None and v.requires_grad]
    weight = torch.randn(3, 17)
    expected = torch.autograd.grad((linear(*values) * weight).sum(), wanted)
    assert_close(torch.autograd.grad((run(*values) * weight).sum(), wanted), expected)


@interpreted
def test_the_operator_is_registered_as_torch_demands():
    from pifa_compiler.kernels import linear_triton_operator as _registers  # noqa: F401

    values = operands(17, 12, 5, 3, torch.float32, True, True)
    torch.library.opcheck(torch.ops.pifa.linear_triton.default, values)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, c, o, b: (x.double(), w, c, o, b), "throughout"),
        (lambda x, w, c, o, b: (x, w.half(), c, o, b), "throughout"),
        (lambda x, w, c, o, b: (x[:, 1:], w, c, o, b), r"takes x \[..., in\]"),
        (lambda x, w, c, o, b: (x, w, c, o[1:], b), r"takes x \[..., in\]"),
        (lambda x, w, c, o, b: (x, w[:0], c[:, :0], o, b), "r > 0"),
        (lambda x, w, c, o, b: (x, w, c, o.int(), b), "int64"),
    ],
    ids=["float64", "mixed", "in", "order", "rank", "index"],
)
def test_what_does_not_fit_is_refused(change, message: str):
    with pytest.raises(ValueError, match=message):
        run(*change(*operands(17, 12, 5, 3, torch.float32, True, True)))


@interpreted
@pytest.mark.parametrize(
    ("tokens", "tune", "operator"),
    [(1, False, "linear_triton"), (3, False, "linear_gemm"), (3, True, "linear_triton"), (40, True, "linear_triton")],
    ids=["one", "several", "one-tuned", "several-tuned"],
)
def test_the_backend_runs_what_lower_emits(tokens: int, tune: bool, operator: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMS, "cpu", FORMS["cuda"])
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    model, x, report = nn.Sequential(layer, nn.Tanh()), torch.randn(tokens, 16), []
    fast = torch.compile(model, backend="pifa", options={"report": report})
    with inductor.patch(max_autotune=tune):
        assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)  # the same sums in another order
    (outcome,) = (r.outcome for r in report if r.rule == "Lower")
    assert outcome.startswith(operator)
    layer.order.copy_(layer.order.flip(0))
    assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)  # no derived index went stale


@interpreted
@pytest.mark.parametrize("how", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}])
def test_the_kernels_are_taken_for_several_tokens_where_the_call_asks_for_tuning(how, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setitem(FORMS, "cpu", FORMS["cuda"])
    run = backend_module.run_passes
    monkeypatch.setattr(backend_module, "run_passes", lambda *args: seen.extend(run(*args)) or [])
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), None, requires_grad=False)
    torch.compile(nn.Sequential(layer), backend="pifa", **how)(torch.randn(3, 16))
    assert [r.outcome for r in seen if r.rule == "Lower"] == ["linear_triton_default"]


TRACE = """
import itertools
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import config
from pifa_compiler.kernels import linear_triton_operator as _registers
class Layer(torch.nn.Module):
    def forward(self, *values):
        return (torch.ops.pifa.linear_triton.default(*values),)
for config.max_autotune, tokens in itertools.product((True, False), (1, 16, 512)):
    with FakeTensorMode():
        h = dict(device="cuda", dtype=torch.bfloat16)
        order, bias = torch.empty(96, device="cuda", dtype=torch.int64), torch.empty(96, **h)
        values = (torch.empty(tokens, 64, **h), torch.empty(32, 64, **h), torch.empty(64, 32, **h), order, bias)
        gm, _ = aot_export_module(Layer(), values, trace_joint=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    print(sum("triton_kernel_wrapper" in target for target in targets), sum("pifa" in target for target in targets))
"""


def test_inductor_sees_two_kernels_and_no_opaque_operator():
    """Tuned and not, for one token, some and many. In a process without the interpreter."""
    done = run_without_interpreter("-c", TRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 0"] * 6

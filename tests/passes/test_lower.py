import re

import pytest
import torch
from graphs import Capture, call, op_counts
from pifa_compiler.kernels import grouped_linear_ref, linear_cpu, linear_ref, linear_triton
from pifa_compiler.kernels.form import Case, Form
from pifa_compiler.passes import Lower, Skip, run_passes
from pifa_compiler.passes.lower import FORMS, GROUPED_FORMS, choose
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

from pifa_compiler.experts import PifaGroupedLinear
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

aten, pifa = torch.ops.aten, torch.ops.pifa


def pifa_layer() -> nn.Sequential:
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    return nn.Sequential(layer)


def multiply_dense(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """A form for the tests: the dense weight, put together in the graph."""
    rows = aten.cat.default([w_pivot, aten.mm.default(coeff, w_pivot)])
    return aten.linear.default(x, aten.index_select.default(rows, 0, order), bias)


def form(reason_against=lambda case: None, name: str = "dense") -> Form:
    return Form(name, (torch.float32,), reason_against, multiply_dense)


def test_lower_builds_the_form_chosen_for_the_case(capture: Capture):
    seen: list[Case] = []

    forms = {"cpu": (form(seen.append),)}
    model, x = pifa_layer(), torch.randn(2, 3, 16)
    gm = capture(model, (x,))
    (record,) = run_passes(gm, [Lower(forms=forms)])
    assert record.outcome == "dense"
    assert pifa.linear.default not in op_counts(gm)
    assert (seen[0].device, seen[0].dtype) == ("cpu", torch.float32)
    assert (seen[0].d_in, seen[0].d_out) == (16, 24)
    assert seen[0].tokens in (6, None)  # symbolic_trace knows no shapes
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # the same sums in another order
    assert run_passes(gm, [Lower(forms=forms)]) == []  # a second run finds nothing


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Lower(forms={}), "plain subgraph: there is no other form for cpu"),
        (Lower(gradients=True, forms={"cpu": (form(),)}), "plain subgraph: gradients are needed"),
        (
            Lower(forms={"cpu": (form(lambda case: "it rains", "first"), form(lambda case: "it snows", "second"))}),
            "plain subgraph: no first (it rains), no second (it snows)",
        ),
    ],
    ids=["other-device", "gradients", "no-form"],
)
def test_lower_says_why_the_plain_subgraph_stays(rule: Lower, reason: str, capture: Capture):
    gm = capture(pifa_layer(), (torch.randn(3, 16),))
    (record,) = run_passes(gm, [rule])
    assert record.outcome == Skip(reason)
    assert op_counts(gm) == {pifa.linear.default: 1}


def test_lower_leaves_factors_of_unknown_shape():
    class Inputs(nn.Module):
        def forward(self, x: Tensor, w_pivot: Tensor, coeff: Tensor) -> Tensor:
            return pifa.linear.default(x, w_pivot, coeff, None, None)

    gm = torch.fx.symbolic_trace(Inputs())
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome == Skip("plain subgraph: the shapes of the factors are unknown")


def test_lower_takes_native_code_on_cpus_and_leaves_the_bias_to_what_follows(capture: Capture):
    model, x = pifa_layer(), torch.randn(3, 16)
    gm = capture(model, (x,))
    run_passes(gm, [Lower()])
    counts = op_counts(gm)
    assert counts[pifa.linear_cpu.default] == counts[aten.add.Tensor] == 1
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)


def test_lower_keeps_the_plain_subgraph_in_dtypes_without_native_code(capture: Capture):
    gm = capture(pifa_layer().double(), (torch.randn(3, 16).double(),))
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome == Skip("plain subgraph: no linear_cpu (it does not compute in torch.float64)")


def test_lower_keeps_the_plain_subgraph_where_native_code_cannot_be_built(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear_cpu, "load", lambda: "no C++ compiler")
    gm = capture(pifa_layer(), (torch.randn(3, 16),))
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome == Skip("plain subgraph: no linear_cpu (no C++ compiler)")


def on_gpu(tokens: int | None, dtype: torch.dtype = torch.bfloat16, others: frozenset[torch.dtype] = frozenset()):
    found = choose(Case("cuda", dtype, 64, 64, tokens, others), FORMS["cuda"])
    return found.reason if isinstance(found, Skip) else found.name


def test_gpus_take_the_decode_kernel_for_one_token_and_gemms_for_several():
    assert on_gpu(1) == "linear_triton"
    assert [on_gpu(tokens) for tokens in (2, 16, 4096, None)] == ["linear_gemm"] * 4
    with inductor.patch(max_autotune=True):
        assert [on_gpu(tokens) for tokens in (1, 2, 4096, None)] == ["linear_triton"] * 4


def test_gpus_keep_the_plain_subgraph_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    assert "float64" in on_gpu(2, torch.float64)
    assert "autocast" in on_gpu(2, torch.float32, frozenset({torch.bfloat16}))
    monkeypatch.setattr(linear_triton, "find_spec", lambda name: None)
    assert "not installed" in on_gpu(1)
    assert on_gpu(2) == "linear_gemm"  # no kernel of ours is in it
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in on_gpu(1)
    assert on_gpu(2) == "linear_gemm"


def test_every_form_takes_the_arguments_of_the_operator_and_is_named_by_its_own():
    """Traced, none looks at values; an operator of that name is in the graph, whatever stands behind it."""
    values = torch.randn(3, 16), torch.randn(5, 16), torch.randn(19, 5), torch.randperm(24), torch.randn(24)
    for each in {each.name: each for forms in FORMS.values() for each in forms}.values():
        traced = torch.fx.symbolic_trace(each.linear)
        assert any(str(target) == f"pifa.{each.name}.default" for target in op_counts(traced))
        if each.name != "linear_triton":  # values of Triton's form: tests/kernels
            assert_close(traced(*values), linear_ref(*values), rtol=1e-4, atol=1e-5)


def test_so_does_every_form_of_grouped_linears():
    x, w_pivot, coeff = torch.randn(4, 16), torch.randn(2, 5, 16), torch.randn(2, 19, 5)
    order, bias = torch.stack([torch.randperm(24), torch.randperm(24)]), torch.randn(2, 24)
    values = x, w_pivot, coeff, order, bias, torch.tensor([1, 4])
    for each in (form for forms in GROUPED_FORMS.values() for form in forms):
        graph = torch.fx.Graph()
        tracer = torch.fx.proxy.GraphAppendingTracer(graph)
        result = each.linear(*(torch.fx.Proxy(graph.placeholder(f"value{i}"), tracer) for i in range(len(values))))
        graph.output(result.node)
        traced = torch.fx.GraphModule(nn.Module(), graph)
        assert any(str(target) == f"pifa.{each.name}.default" for target in op_counts(traced))
        if each.name != "grouped_linear_triton":
            assert_close(traced(*values), grouped_linear_ref(*values), rtol=1e-4, atol=1e-5)


def grouped_layer() -> PifaGroupedLinear:
    factors = [factorize(torch.randn(24, 16), rank=5) for _ in range(3)]
    return PifaGroupedLinear.from_factors(factors, torch.randn(3, 24), requires_grad=False)


def test_lower_takes_native_code_for_experts_on_cpus(capture: Capture):
    model, given = grouped_layer(), (torch.randn(7, 16), torch.tensor([2, 2, 6]))
    gm = capture(model, given)
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome.startswith("grouped_linear_cpu")
    assert op_counts(gm) == {pifa.grouped_linear_cpu.default: 1}
    assert_close(call(gm, *given), model(*given), rtol=1e-4, atol=1e-5)  # the same sums in another order


def test_lower_says_why_the_plain_subgraph_of_experts_stays(capture: Capture):
    given = (torch.randn(7, 16), torch.tensor([2, 2, 6]))
    gm = capture(grouped_layer(), given)
    for rule, reason in (
        (Lower(grouped_forms={}), "plain subgraph: there is no other form for cpu"),
        (Lower(gradients=True), "plain subgraph: gradients are needed"),
    ):
        (record,) = run_passes(gm, [rule])
        assert record.outcome == Skip(reason)
    gm = capture(grouped_layer().double(), (given[0].double(), given[1]))
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome == Skip("plain subgraph: no grouped_linear_cpu (it does not compute in torch.float64)")
    assert op_counts(gm) == {pifa.grouped_linear.default: 1}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("order", [True, False], ids=["order", "no-order"])
def test_lower_leaves_order_and_bias_of_gemms_to_what_follows(order: bool, bias: bool, capture: Capture):
    model, x = pifa_layer(), torch.randn(2, 3, 16)
    if not order:
        model[0].order = None
    if not bias:
        model[0].bias = None
    gm = capture(model, (x,))
    records = run_passes(gm, [Lower(forms={"cpu": FORMS["cuda"]})])
    wanted = {pifa.linear_gemm.default: 1, aten.index_select.default: int(order), aten.add.Tensor: int(bias)}
    assert op_counts(gm) == {target: count for target, count in wanted.items() if count}
    assert [record.outcome.startswith("linear_gemm") for record in records] == [True]
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)


def test_inductor_fuses_order_and_bias_behind_the_gemms_into_the_consumer():
    def model(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor, bias: Tensor) -> Tensor:
        stored = pifa.linear_gemm.default(x, w_pivot, coeff)
        return x + (stored.index_select(-1, order) + bias).relu()

    values = torch.randn(3, 24), torch.randn(5, 24), torch.randn(19, 5), torch.randperm(24), torch.randn(24)
    result, (code,) = run_and_get_code(torch.compile(model), *values)
    assert_close(result, model(*values))
    assert code.count("pifa.linear_gemm.default(") == 1
    assert len(re.findall(r"^cpp_fused\w* = ", code, re.MULTILINE)) == 1

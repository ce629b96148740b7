import pytest
import torch
from graphs import Capture, call, op_counts
from pifa_compiler.kernels import linear_cpu
from pifa_compiler.passes import Lower, Skip, run_passes
from pifa_compiler.passes.lower import Case
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.testing import assert_close

from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

aten, pifa = torch.ops.aten, torch.ops.pifa


def pifa_layer() -> nn.Sequential:
    layer = PifaLinear.from_factors(factorize(torch.randn(24, 16), rank=5), torch.randn(24), requires_grad=False)
    return nn.Sequential(layer)


def multiply_dense(gm: GraphModule, node: Node) -> Node:
    """A form for the tests: the dense weight, put together in the graph."""
    x, w_pivot, coeff, order, bias = node.args
    call_function = gm.graph.call_function
    others = call_function(aten.mm.default, (coeff, w_pivot))
    rows = call_function(aten.cat.default, ([w_pivot, others],))
    return call_function(aten.linear.default, (x, call_function(aten.index_select.default, (rows, 0, order)), bias))


def test_lower_builds_the_form_chosen_for_the_case(capture: Capture):
    seen: list[Case] = []

    def choose(case: Case):
        seen.append(case)
        return multiply_dense

    model, x = pifa_layer(), torch.randn(2, 3, 16)
    gm = capture(model, (x,))
    run_passes(gm, [Lower(forms={"cpu": choose})])
    assert pifa.linear.default not in op_counts(gm)
    assert (seen[0].device, seen[0].dtype) == ("cpu", torch.float32)
    assert (seen[0].d_in, seen[0].d_out, seen[0].rank) == (16, 24, 5)
    assert seen[0].tokens in (6, None)  # symbolic_trace knows no shapes
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # the same sums in another order
    assert run_passes(gm, [Lower(forms={"cpu": choose})]) == []  # a second run finds nothing


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Lower(forms={}), "plain subgraph: there is no other form for cpu"),
        (Lower(gradients=True, forms={"cpu": lambda case: multiply_dense}), "plain subgraph: gradients are needed"),
    ],
    ids=["other-device", "gradients"],
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
    assert record.outcome == Skip("plain subgraph: there is no native code for torch.float64")


def test_lower_keeps_the_plain_subgraph_where_native_code_cannot_be_built(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear_cpu, "load", lambda: "no C++ compiler")
    gm = capture(pifa_layer(), (torch.randn(3, 16),))
    (record,) = run_passes(gm, [Lower()])
    assert record.outcome == Skip("plain subgraph: no C++ compiler")

from collections.abc import Callable

import pytest
import torch
from graphs import call
from pifa_compiler.passes import AbsorbOrder, Canonicalize, FactorizePair, Skip, run_passes
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional as F
from torch.testing import assert_close

from pifa_compiler.factors import factorize_jointly
from pifa_compiler.linear import PifaLinear

pifa = torch.ops.pifa


def layers(inputs: int, outputs: int, rank: int, count: int = 1, bias: bool = True) -> list[PifaLinear]:
    """PIFA layers of random weights, float64, all in one row order."""
    pairs = [(torch.randn(outputs, rank).double(), torch.randn(rank, inputs).double()) for _ in range(count)]
    return [
        PifaLinear.from_factors(factors, torch.randn(outputs).double() if bias else None, requires_grad=False)
        for factors in factorize_jointly(pairs)
    ]


class Mlp(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], last: nn.Module | None = None):
        super().__init__()
        (self.fc1,) = layers(10, 24, 5)
        self.fc2 = last or layers(24, 10, 4)[0]
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, shared: bool = True):
        super().__init__()
        self.gate, self.up = layers(10, 24, 5, count=2) if shared else (*layers(10, 24, 5), *layers(10, 24, 5))
        self.down = nn.Linear(24, 10).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def orders(gm: GraphModule) -> list[bool]:
    """For every pifa::linear whether it still has a row order."""
    return [node.args[3] is not None for node in gm.graph.find_nodes(op="call_function", target=pifa.linear.default)]


def exported(model: nn.Module, x: Tensor) -> GraphModule:
    gm = torch.export.export(model, (x,), strict=False).run_decompositions({}).module(check_guards=False)
    run_passes(gm, [Canonicalize()])
    return gm


CASES = {
    "relu": (lambda: Mlp(F.relu), [False, True]),
    "gelu-tanh": (lambda: Mlp(lambda x: F.gelu(x, approximate="tanh")), [False, True]),
    "gelu-by-hand": (lambda: Mlp(lambda x: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.04 * x**3)))), [False, True]),
    "scaled-by-token": (lambda: Mlp(lambda x: x * x.abs().sum(-1, keepdim=True)), [True, True]),
    "dense-behind": (lambda: Mlp(F.relu, nn.Linear(24, 10).double()), [False]),
    "dropout": (lambda: Mlp(lambda x: F.dropout(F.relu(x), 0.5, training=False)), [False, True]),
    "view": (lambda: Mlp(lambda x: F.relu(x).reshape(-1, 24)), [False, True]),
    "gated": (Gated, [False, False]),
    "gated-two-orders": (lambda: Gated(shared=False), [True, True]),
    "softmax": (lambda: Mlp(lambda x: x.softmax(-1)), [True, True]),
    "flip": (lambda: Mlp(lambda x: x.flip(-1)), [True, True]),
    "per-channel": (lambda: Mlp(lambda x: x * torch.linspace(0, 1, 24).double()), [True, True]),
    "split-heads": (lambda: Mlp(lambda x: x.reshape(3, 6, 4).transpose(0, 1).reshape(3, 24)), [True, True]),
}


@pytest.mark.parametrize(("make", "kept"), CASES.values(), ids=CASES)
def test_order_goes_where_everything_between_is_elementwise(make: Callable[[], nn.Module], kept: list[bool]):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, 10).double()
    gm = exported(model, x)
    records = run_passes(gm, [AbsorbOrder()])
    assert orders(gm) == kept
    assert_close(call(gm, x), model(x), rtol=1e-10, atol=1e-10)
    assert all(isinstance(record.outcome, Skip) for record in records) == all(kept)
    assert run_passes(gm, [AbsorbOrder()]) == [r for r in records if isinstance(r.outcome, Skip)]


@pytest.mark.parametrize("act", [F.relu, F.silu, torch.tanh, lambda x: x * 2, lambda x: x.relu()], ids=range(5))
def test_pairs_found_in_a_symbolic_trace(act: Callable[[Tensor], Tensor]):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.v1, self.u1 = nn.Linear(10, 4, bias=False), nn.Linear(4, 20)
            self.v2, self.u2 = nn.Linear(20, 4, bias=False), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.u2(self.v2(act(self.u1(self.v1(x)))))

    torch.manual_seed(0)
    model, x = Pairs().double(), torch.randn(3, 10).double()
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize(), FactorizePair(), AbsorbOrder()])
    assert orders(gm) == [False, True]
    assert_close(call(gm, x), model(x), rtol=1e-10, atol=1e-10)


def test_a_result_that_is_also_returned_keeps_its_order():
    class Both(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.fc1(x))
            return self.fc2(hidden).sum() + hidden.cumsum(-1)

    model, x = Both(F.relu), torch.randn(3, 10).double()
    gm = exported(model, x)
    first, _ = run_passes(gm, [AbsorbOrder()])
    assert isinstance(first.outcome, Skip)
    assert "cumsum reads the outputs in order" in first.outcome.reason
    assert_close(call(gm, x), model(x))


@torch.fx.wrap
def square(x: Tensor) -> Tensor:
    """Of the name of an elementwise function, and none."""
    return x * x.cumsum(-1)


def test_another_function_of_the_name_of_an_elementwise_one_keeps_the_order():
    model, x = Mlp(lambda x: square(x)), torch.randn(3, 10).double()
    gm = symbolic_trace(model)
    assert any(node.target is square for node in gm.graph.nodes)
    records = run_passes(gm, [Canonicalize(), AbsorbOrder()])
    assert all(isinstance(record.outcome, Skip) for record in records)
    assert_close(call(gm, x), model(x))


def test_random_numbers_are_drawn_for_the_same_features_as_before():
    model, x = Mlp(lambda x: F.dropout(F.relu(x), 0.5, training=True)), torch.randn(3, 10).double()
    gm = exported(model, x)
    records = run_passes(gm, [AbsorbOrder()])
    assert orders(gm) == [True, True]
    assert all(isinstance(record.outcome, Skip) for record in records)
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    assert_close(call(gm, x), wanted, rtol=1e-10, atol=1e-10)


def test_a_bias_of_one_number_for_all_outputs_keeps_the_order():
    model, x = Mlp(F.relu), torch.randn(3, 10).double()
    model.fc1.bias = nn.Parameter(torch.ones(1).double(), requires_grad=False)
    gm = exported(model, x)
    first, _ = run_passes(gm, [AbsorbOrder()])
    assert first.outcome == Skip("row order stays: a bias is not known to have one number for each output")

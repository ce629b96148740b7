import pytest
import torch
from graphs import Capture, call, op_counts
from pifa_compiler.kernels import linear_cpu
from pifa_compiler.passes import Lower, MergeSiblings, Skip, run_passes
from torch import Tensor, nn
from torch.testing import assert_close

from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

pytestmark = pytest.mark.skipif(linear_cpu.load() is not None, reason=str(linear_cpu.load()))

pifa = torch.ops.pifa


def layer(d_out: int, rank: int) -> PifaLinear:
    return PifaLinear.from_factors(
        factorize(torch.randn(d_out, 16), rank=rank), torch.randn(d_out), requires_grad=False
    )


class Attention(nn.Module):
    """Three linears of unequal shapes on one input, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = layer(24, 7), layer(16, 5), layer(16, 4), layer(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q[..., :16] * k + v)


class Written(nn.Module):
    """The input changes between its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(24, 7), layer(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        before = self.first(h)
        h.add_(1)
        return before + self.second(h)


@pytest.mark.parametrize("tokens", [1, 40])
def test_siblings_become_one_call(capture: Capture, tokens: int):
    model, x = Attention(), torch.randn(tokens, 16)
    gm = capture(model, (x,))
    records = run_passes(gm, [Lower(), MergeSiblings()])
    counts = op_counts(gm)
    assert counts[pifa.linear_siblings_cpu.default] == counts[pifa.linear_cpu.default] == 1
    assert [record.rule for record in records].count("MergeSiblings") == 1
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # the same sums in another order
    assert run_passes(gm, [MergeSiblings()]) == []  # a second run finds nothing


def test_siblings_stay_apart_where_the_input_changes_between_them():
    model, x = Written(), torch.randn(3, 16)
    gm = torch.fx.symbolic_trace(model)
    records = run_passes(gm, [Lower(), MergeSiblings()])
    assert records[-1].outcome == Skip("siblings stay apart: the graph may write in place between them")
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)


def test_siblings_stay_apart_where_a_weight_is_computed():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, w: Tensor, coeff: Tensor) -> Tensor:
            first = pifa.linear_cpu.default(x, w, coeff, None)
            return first + pifa.linear_cpu.default(x, w * 2, coeff, None)

    gm = torch.fx.symbolic_trace(Scaled())
    (record,) = run_passes(gm, [MergeSiblings()])
    assert record.outcome == Skip("siblings stay apart: a weight is computed in the graph")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_calls_siblings_together(dynamic: bool):
    model, report = Attention(), []
    compiled = torch.compile(model, backend="pifa", dynamic=dynamic, options={"report": report})
    for tokens in (5, 1, 300):
        x = torch.randn(tokens, 16)
        with torch.no_grad():
            assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)  # values of up to 30, three products deep
    merged = [record for record in report if record.rule == "MergeSiblings"]
    assert merged
    assert not any(isinstance(record.outcome, Skip) for record in merged)

import pytest
import torch
from graphs import Capture, call, op_counts
from pifa_compiler.passes import Canonicalize, FactorizeLinear, FactorizePair, Skip, run_passes
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.testing import assert_close

aten, pifa = torch.ops.aten, torch.ops.pifa


def pair(d_in: int, width: int, d_out: int, bias: bool = True, inner_bias: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(d_in, width, bias=inner_bias), nn.Linear(width, d_out, bias=bias))
    return model.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_factorize_pair_makes_one_linear_of_two(capture: Capture, bias: bool):
    model, x = pair(16, 5, 24, bias), torch.randn(2, 3, 16)
    gm = capture(model, (x,))
    run_passes(gm, [Canonicalize(), FactorizePair()])
    assert op_counts(gm) == {pifa.linear.default: 1}
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    assert run_passes(gm, [FactorizePair()]) == []  # a second run finds nothing


def test_factorize_pair_stores_fewer_numbers_and_drops_the_old_ones():
    model = pair(16, 5, 24)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize(), FactorizePair()])
    assert set(gm.state_dict()) == {"1.w_pivot", "1.coeff", "1.order", "1.bias"}
    numbers = sum(gm.state_dict()[name].numel() for name in ("1.w_pivot", "1.coeff", "1.order"))
    assert numbers == 5 * (16 + 24 - 5) + 24
    assert set(model.state_dict()) == {"0.weight", "1.weight", "1.bias"}  # the model keeps its own


def test_factorize_pair_takes_each_link_of_a_chain_once():
    model, x = (
        nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((16, 4), (4, 16), (16, 4), (4, 16)))),
        torch.randn(3, 16),
    )
    gm = symbolic_trace(model.requires_grad_(False))
    run_passes(gm, [Canonicalize(), FactorizePair()])
    assert op_counts(gm) == {pifa.linear.default: 2}
    assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(16, 5, bias=False), nn.Linear(5, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.v(x)
        return self.u(middle), middle


def mixed_dtypes() -> nn.Sequential:
    model = pair(16, 5, 24)
    model[1].double()
    return model


def with_nan() -> nn.Sequential:
    model = pair(16, 5, 24)
    model[0].weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoUsers(), "the value between the two linears has another user"),
        (pair(16, 5, 24, inner_bias=True), "there is a bias between the two linears"),
        (pair(16, 40, 24), "the pair is not low-rank: width 40 between 16 inputs and 24 outputs"),
        (pair(16, 1, 24), "PIFA would store 40 numbers at rank 1, the pair stores 40"),
        (mixed_dtypes(), "the two weights differ in dtype or device"),
        (with_nan(), "V [5, 16] holds NaN or Inf; repair or skip this layer"),
    ],
    ids=["users", "bias", "wide", "rank-one", "dtypes", "nan"],
)
def test_factorize_pair_leaves_near_misses(model: nn.Module, reason: str):
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize()])
    (record,) = run_passes(gm, [FactorizePair()])
    assert record.outcome == Skip(reason)
    assert op_counts(gm) == {aten.linear.default: 2}


def test_factorize_pair_has_nothing_to_say_about_activated_layers():
    gm = symbolic_trace(nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 24)))
    assert run_passes(gm, [Canonicalize(), FactorizePair(), FactorizeLinear({})])[2:] != []
    assert run_passes(gm, [FactorizePair()]) == []


def test_a_pair_whose_input_is_written_in_between_stays():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.u = nn.Linear(16, 3, bias=False), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Tensor:
            middle = self.v(x)
            x.add_(1)
            return self.u(middle)

    model, x = Written(), torch.randn(5, 16)
    gm = symbolic_trace(model)
    records = run_passes(gm, [Canonicalize(), FactorizePair()])
    assert records[-1].outcome == Skip("the graph may write in place between the two linears")
    assert_close(gm(x.clone()), model(x.clone()))


def test_a_pair_whose_product_overflows_stays():
    model = pair(16, 5, 24).half()
    for layer in model:
        layer.weight.mul_(3000)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize()])
    (record,) = run_passes(gm, [FactorizePair()])
    assert "do not fit into torch.float16" in record.outcome.reason
    assert op_counts(gm) == {aten.linear.default: 2}

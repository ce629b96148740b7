import pytest
import torch
from graphs import Capture, call, capture_by_export, capture_by_symbolic_trace, low_rank, op_counts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pifa_compiler.passes import Canonicalize, FactorizeLinear, Skip, run_passes
from pifa_compiler.passes.factorize_linear import FULL_RANK, LARGEST_SHARE, detect, rank_exceeds
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F
from torch.testing import assert_close

from pifa_compiler.factors import factorize, rank_for_density

aten, pifa = torch.ops.aten, torch.ops.pifa


def two_layers(bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 24, bias=bias), nn.ReLU(), nn.Linear(24, 8))
    model[0].weight.data = low_rank(24, 16, rank=5)
    return model.requires_grad_(False)


def test_factorize_linear_rewrites_only_the_named_weight():
    model, x = two_layers(), torch.randn(3, 16)
    gm = capture_by_export(model, (x,))
    before = gm(x)
    rule = FactorizeLinear({"0.weight": factorize(model[0].weight.data, rank=5)})
    records = run_passes(gm, [rule])
    assert op_counts(gm) == {pifa.linear.default: 1, aten.relu.default: 1, aten.linear.default: 1}
    assert [r.outcome for r in records if isinstance(r.outcome, Skip)] == [Skip("no factors for this weight")]
    assert_close(gm(x), before, rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    assert all(isinstance(r.outcome, Skip) for r in run_passes(gm, [rule]))  # a second run finds nothing


@pytest.mark.parametrize("bias", [True, False])
def test_factorize_linear_finds_weights_of_deficient_rank(capture: Capture, bias: bool):
    model, x = two_layers(bias), torch.randn(3, 16)
    gm = capture(model, (x,))
    records = run_passes(gm, [Canonicalize(), FactorizeLinear()])
    counts = op_counts(gm)
    assert (counts[pifa.linear.default], counts[aten.linear.default]) == (1, 1)
    assert FULL_RANK in [record.outcome for record in records]
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    assert all(isinstance(r.outcome, Skip) for r in run_passes(gm, [FactorizeLinear()]))


def test_factorize_linear_keeps_the_factors_beside_the_weight_and_drops_it():
    model, x = two_layers(), torch.randn(3, 16)
    gm = capture_by_export(model, (x,))
    run_passes(gm, [FactorizeLinear()])
    state = gm.state_dict()
    assert set(state) == {"0.w_pivot", "0.coeff", "0.order", "0.bias", "2.weight", "2.bias"}
    assert state["0.w_pivot"].shape == (5, 16)


def test_factorize_linear_leaves_the_captured_model_alone():
    model, x = two_layers(), torch.randn(3, 16)
    names, before = list(model.state_dict()), model(x)
    gm = capture_by_symbolic_trace(model, (x,))
    run_passes(gm, [Canonicalize(), FactorizeLinear()])
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)


def test_factorize_linear_keeps_a_weight_that_something_else_reads():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(24, 16)
            self.embed.weight.data = low_rank(24, 16, rank=5)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.embed(ids), self.embed.weight)

    model, ids = Tied().requires_grad_(False), torch.arange(7)
    gm = capture_by_export(model, (ids,))
    run_passes(gm, [FactorizeLinear()])
    assert op_counts(gm)[pifa.linear.default] == 1
    assert "embed.weight" in gm.state_dict()
    assert_close(gm(ids), model(ids), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


def test_factorize_linear_shares_the_factors_of_a_weight_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.fc.weight.data = low_rank(16, 16, rank=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.fc(x)))

    model, x = Twice(), torch.randn(3, 16)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize(), FactorizeLinear()])
    assert op_counts(gm)[pifa.linear.default] == 2
    assert set(gm.state_dict()) == {"fc.w_pivot", "fc.coeff", "fc.order", "fc.bias"}
    assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


def test_factorize_linear_tells_a_weight_from_its_transpose():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(low_rank(16, 16, rank=4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w).relu(), self.w.t())

    model, x = Both(), torch.randn(3, 16)
    gm = symbolic_trace(model)
    run_passes(gm, [Canonicalize(), FactorizeLinear()])
    assert op_counts(gm)[pifa.linear.default] == 2
    assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(16, 16), FULL_RANK.reason),
        (torch.full((16, 16), torch.nan), "holds NaN or Inf"),
        (torch.eye(16), FULL_RANK.reason),
        (torch.ones(1, 1), "leaves no room for rank 1"),
    ],
    ids=["zero", "nan", "full", "tiny"],
)
def test_detect_says_why_a_weight_is_left(weight: Tensor, reason: str):
    found = detect(weight)
    assert isinstance(found, Skip)
    assert reason in found.reason


def test_factorize_linear_refuses_factors_of_another_shape():
    model, x = two_layers(), torch.randn(3, 16)
    gm = capture_by_export(model, (x,))
    records = run_passes(gm, [FactorizeLinear({"2.weight": factorize(model[0].weight.data)})])
    assert Skip("factors represent a [24, 16] weight, this one is [8, 24]") in [r.outcome for r in records]


@settings(max_examples=30, deadline=None)
@given(
    d_out=st.integers(8, 90),
    d_in=st.integers(8, 90),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@example(d_out=8, d_in=48, share=1.0, dtype=torch.float64, seed=233)
def test_the_screen_never_hides_a_low_rank(d_out: int, d_in: int, share: float, dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    most = rank_for_density(d_out, d_in, LARGEST_SHARE)
    rank = 1 + int(share * (most - 1))
    assert not rank_exceeds(low_rank(d_out, d_in, rank, dtype), most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_screen_passes_over_random_weights_of_full_rank(dtype: torch.dtype):
    passed = [
        rank_exceeds(torch.randn(96, 64, dtype=dtype), rank_for_density(96, 64, LARGEST_SHARE)) for _ in range(20)
    ]
    assert all(passed)

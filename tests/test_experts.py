import copy

import pytest
import torch
from expert_models import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    dense_experts,
    expert_classes,
    grouped_layers,
    put_experts_in_pifa_form,
    routed,
    tiny_mixtral,
)
from graphs import low_rank
from pifa_compiler.passes import Record
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from pifa_compiler import factorize, refresh
from pifa_compiler.errors import ConfigError, RankError
from pifa_compiler.experts import PifaExperts, PifaGroupedLinear, expert_weights

CLASSES = (AriaExperts, DeepseekV4Experts, GptOssExperts, MixtralExperts, MuseSparkExperts, NemotronHExperts)


@torch.no_grad()
def check_class(kind: type[nn.Module]) -> None:
    """In float64 it computes what the experts' eager forward does, whatever projections are in PIFA form."""
    torch.manual_seed(0)
    experts, given = dense_experts(kind), routed()
    want = experts(*given)
    front = ["gate_up_proj" if experts.has_gate else "up_proj"]
    chosen = [
        grouped_layers(experts),
        {},
        *(grouped_layers(experts, [name], joint=True) for name in (*front, "down_proj")),
    ]
    for layers in chosen:
        got = PifaExperts.of(experts, layers)(*given)
        # Some classes compute their gate or norm in float32, whatever comes.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_pifa_experts_compute_what_the_experts_do(kind: type[nn.Module]):
    check_class(kind)


@pytest.mark.slow
def test_so_they_do_for_every_class_of_transformers():
    classes = list(expert_classes())
    assert len(classes) > 40
    for kind in classes:
        check_class(kind)


def test_the_number_of_experts_means_no_expert():
    experts, (x, index, weights) = dense_experts(MixtralExperts), routed()
    index[0, 1] = index[3] = EXPERTS
    for layers in ({}, grouped_layers(experts)):
        torch.testing.assert_close(PifaExperts.of(experts, layers)(x, index, weights), experts(x, index, weights))


@pytest.mark.parametrize("tokens", [0, 1])
def test_there_may_be_few_tokens(tokens: int):
    experts = dense_experts(MixtralExperts)
    given = routed(max(tokens, 1))
    given = tuple(value[:tokens] for value in given)
    torch.testing.assert_close(PifaExperts.of(experts, grouped_layers(experts))(*given), experts(*given))


def test_gradients_are_those_of_the_dense_experts():
    experts, given = dense_experts(GptOssExperts), routed()
    pifa = PifaExperts.of(experts, grouped_layers(experts, ["gate_up_proj"]))
    found = []
    for module in (experts, pifa):
        x, weights = given[0].clone().requires_grad_(), given[2].clone().requires_grad_()
        experts.down_proj.grad = None
        module(x, given[1], weights).square().sum().backward()
        found.append((x.grad, weights.grad, experts.down_proj.grad))
    torch.testing.assert_close(*found)
    assert pifa.pifa.gate_up_proj.w_pivot.grad is not None
    assert pifa.pifa.gate_up_proj.bias.grad is not None


def test_dense_projections_stay_the_same_parameter_under_their_name():
    experts = dense_experts(GptOssExperts)
    pifa = PifaExperts.of(experts, grouped_layers(experts, ["gate_up_proj"]))
    assert pifa.down_proj is experts.down_proj
    assert set(pifa.state_dict()) == {
        "down_proj",
        "down_proj_bias",
        *(f"pifa.gate_up_proj.{part}" for part in ("w_pivot", "coeff", "pivots", "bias")),
    }
    assert str(pifa).startswith("PifaExperts(\n  of GptOssExperts, num_experts=4, dense={'down_proj'")


def test_more_projections_can_follow_later():
    experts, given = dense_experts(MixtralExperts), routed()
    first = PifaExperts.of(experts, grouped_layers(experts, ["down_proj"]))
    assert "PifaExperts" in str(expert_weights(first))
    with pytest.raises(ConfigError, match="cannot be in PIFA form"):
        PifaExperts.of(first, {})
    torch.testing.assert_close(first(*given), experts(*given))


def test_a_copy_computes_the_same():
    experts, given = dense_experts(MixtralExperts), routed()
    pifa = PifaExperts.of(experts, grouped_layers(experts, rank=5))
    assert torch.equal(copy.deepcopy(pifa)(*given), pifa(*given))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_of_experts_does_not_matter(implementation: str):
    model, tokens = tiny_mixtral(), torch.arange(10)[None]
    put_experts_in_pifa_form(model)
    before = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert torch.equal(model(tokens).logits, before)


def test_compiled_and_exported_it_is_one_graph_that_computes_the_same():
    experts = dense_experts(GptOssExperts).float()
    pifa = PifaExperts.of(experts, grouped_layers(experts, ["gate_up_proj"], rank=7)).requires_grad_(False)
    given = routed(dtype=torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(pifa, given, dynamic_shapes=({0: tokens},) * 3, strict=False)
    names = [str(node.target) for node in program.graph.nodes if "pifa." in str(node.target)]
    assert names == ["pifa.grouped_linear.default", "pifa.grouped_mm.default"]
    report: list[Record] = []
    compiled = torch.compile(pifa, backend="pifa", fullgraph=True, options={"report": report})
    for more in (given, routed(21, torch.float32)):
        want = pifa(*more)
        assert torch.equal(program.module()(*more), want)
        torch.testing.assert_close(compiled(*more), want, rtol=1e-5, atol=1e-5)  # sums in another order
    lowered = [str(record.outcome) for record in report if record.rule == "Lower"]
    assert len(lowered) == 2  # fixed and varying tokens
    assert all(name.startswith("grouped_linear_cpu") for name in lowered)


def test_experts_that_are_not_known_say_why():
    assert "decorated" in str(expert_weights(nn.Linear(3, 3)))
    assert "Llama4TextExperts" in str(expert_weights(Llama4TextExperts.__new__(Llama4TextExperts)))
    experts = dense_experts(MixtralExperts)
    experts._is_expert_parallel = True
    assert expert_weights(experts) == "its experts are spread over processes"
    experts = dense_experts(MixtralExperts)
    experts.scale = nn.Parameter(torch.ones(1))
    assert "has the parameters ['down_proj', 'gate_up_proj', 'scale']" in str(expert_weights(experts))
    experts = dense_experts(MixtralExperts)
    experts.down_proj = nn.Parameter(experts.down_proj[0])
    assert expert_weights(experts) == "its down_proj is no floating-point parameter of 3 dimensions"


def test_expert_weights_are_views_of_the_parameters():
    experts = dense_experts(GptOssExperts)
    found = expert_weights(experts)
    assert {name: (tuple(each.weight.shape), tuple(each.bias.shape)) for name, each in found.items()} == {
        "gate_up_proj": ((EXPERTS, 2 * INTERMEDIATE, HIDDEN), (EXPERTS, 2 * INTERMEDIATE)),
        "down_proj": ((EXPERTS, HIDDEN, INTERMEDIATE), (EXPERTS, HIDDEN)),
    }
    assert found["down_proj"].weight.data_ptr() == experts.down_proj.data_ptr()
    apart = expert_weights(dense_experts(MixtralExperts))
    assert list(apart) == ["gate_proj", "up_proj", "down_proj"]
    assert list(expert_weights(dense_experts(MixtralExperts), joint=True)) == ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("names", [["gate_proj"], ["up_proj"], ["gate_proj", "up_proj"]], ids=str)
def test_projections_that_the_experts_do_not_have_are_refused(names: list[str]):
    experts = dense_experts(DeepseekV4Experts)
    layer = grouped_layers(experts)["gate_up_proj"]
    with pytest.raises(ConfigError, match="DeepseekV4Experts has no projections"):
        PifaExperts.of(experts, dict.fromkeys(names, layer))


def grouped_layer(rank: int = 3) -> PifaGroupedLinear:
    return PifaGroupedLinear.from_factors([factorize(low_rank(9, 6, rank)) for _ in range(EXPERTS)])


def test_factors_of_other_shapes_or_ranks_are_refused():
    with pytest.raises(RankError, match=r"\[\(9, 6, 2\), \(9, 6, 3\)\]"):
        PifaGroupedLinear.from_factors([factorize(low_rank(9, 6, rank)) for rank in (2, 3)])
    with pytest.raises(RankError, match="got rank 7"):
        PifaGroupedLinear(EXPERTS, 6, 9, 7)


def test_the_order_follows_the_pivots():
    layer, other = grouped_layer(), grouped_layer()
    x, ends = torch.randn(5, 6), torch.tensor([1, 2, 2, 5])
    want = other(x, ends)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x, ends), want)
    layer, other = grouped_layer(), grouped_layer()
    want = other(x, ends)
    for name in ("w_pivot", "coeff"):
        getattr(layer, name).data = getattr(other, name).data
    layer.pivots.copy_(other.pivots)
    assert torch.equal(layer(x, ends), want)
    layer.pivots.data[:] = torch.arange(3)  # leaves no trace
    refresh(layer)
    assert layer.order is None


def test_pivots_that_are_the_first_rows_need_no_order():
    layer = grouped_layer()
    layer.pivots = torch.arange(3, dtype=torch.int32).repeat(EXPERTS, 1)
    x, ends = torch.randn(5, 6), torch.tensor([1, 2, 2, 5])
    y = layer(x, ends)
    assert layer.order is None
    assert torch.equal(y[:1, :3], x[:1] @ layer.w_pivot[0].T)


def test_compiled_it_trains_as_it_does_in_eager():
    experts = dense_experts(MixtralExperts).float()
    layers = grouped_layers(experts, ["down_proj"], rank=7)
    pifa, given = PifaExperts.of(experts, layers), routed(dtype=torch.float32)
    compiled = torch.compile(pifa, backend="aot_eager", fullgraph=True)  # gradients are traced, no code is built
    found = []
    for call in (pifa, compiled):
        pifa.zero_grad()
        call(*given).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in pifa.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # sums of 18 rows in another order

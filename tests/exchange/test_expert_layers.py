"""Experts taken apart into layers compute the same, share their memory, and are put together again."""

import copy

import pytest
import torch
from expert_models import EXPERTS, dense_experts, expert_classes, routed, tiny_mixtral
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from pifa_compiler import factorize
from pifa_compiler.exchange.expert_layers import (
    ExpertLayers,
    experts_as_layers,
    find_experts,
    projection_of,
    put_together,
)
from pifa_compiler.experts import PifaExperts, expert_weights
from pifa_compiler.modules import layer_of

PLACE = "model.layers.0.mlp.experts"


def taken_apart(experts: nn.Module) -> ExpertLayers:
    weights = expert_weights(experts)
    assert not isinstance(weights, str), weights
    return ExpertLayers(experts, weights)


@torch.no_grad()
def check_class(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    experts, given = dense_experts(kind), routed()
    want = experts(*given)
    # Some classes compute in float32, whatever comes.
    assert_close(taken_apart(experts)(*given), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", [AriaExperts, GptOssExperts, MixtralExperts, MuseSparkExperts, NemotronHExperts])
def test_layers_compute_what_the_experts_do(kind):
    check_class(kind)


@pytest.mark.slow
def test_so_they_do_for_every_class_of_transformers():
    for kind in expert_classes():
        check_class(kind)


def test_a_token_may_be_routed_to_none():
    torch.manual_seed(0)
    model = tiny_mixtral().double()
    model.set_experts_implementation("eager")  # torch.nn.functional.grouped_mm knows no float64
    experts = model.get_submodule(PLACE)
    x, index, weights = torch.randn(5, 32).double(), torch.tensor([[0, EXPERTS]] * 5), torch.rand(5, 2).double()
    assert_close(taken_apart(experts)(x, index, weights), experts(x, index, weights))


def test_layers_are_views_and_stand_there_no_longer_than_asked():
    model = tiny_mixtral()
    experts = model.get_submodule(PLACE)
    with experts_as_layers(model) as found:
        layers = model.get_submodule(PLACE)
        assert found.layers == {PLACE: layers}
        up = layers.get_submodule("up_proj.2").weight
        assert torch.equal(up, experts.gate_up_proj[2, 48:])
        assert up.untyped_storage().data_ptr() == experts.gate_up_proj.untyped_storage().data_ptr()
    assert model.get_submodule(PLACE) is experts


def test_a_projection_is_named_after_the_layer_that_it_becomes():
    model = tiny_mixtral()
    with experts_as_layers(model):
        both = (f"{PLACE}.pifa.gate_proj", f"{PLACE}.pifa.up_proj")
        for name in ("gate_proj", "up_proj"):
            found = projection_of(model, f"{PLACE}.{name}.3")
            assert (found.path, found.experts, found.together) == (f"{PLACE}.pifa.{name}", EXPERTS, both)
        assert projection_of(model, f"{PLACE}.down_proj.0").together == (f"{PLACE}.pifa.down_proj",)
        assert projection_of(model, "model.layers.0.self_attn.q_proj") is None


def hooked(model: nn.Module) -> None:
    model.get_submodule(PLACE).register_forward_hook(lambda *_: None)


def tied(model: nn.Module) -> None:
    model.get_submodule(PLACE).down_proj = nn.Parameter(model.lm_head.weight.expand(EXPERTS, 64, 32))


def used_twice(model: nn.Module) -> None:
    model.other = model.get_submodule(PLACE)


def spread(model: nn.Module) -> None:
    model.get_submodule(PLACE)._is_expert_parallel = True


def empty(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "has forward hooks"),
        (tied, "down_proj is tied to lm_head.weight"),
        (used_twice, "is used elsewhere too"),
        (spread, "spread over processes"),
        (empty, "they have no values"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_may_not_be_exchanged_is_left_with_its_reason(change, reason):
    model = tiny_mixtral()
    change(model)
    found = find_experts(model)
    assert not found.layers
    assert all(reason in why for why in found.left.values()), found.left
    entries = found.reports(model)
    assert {entry.name for entry in entries} >= {f"{PLACE}.gate_up_proj", f"{PLACE}.down_proj"}
    assert all(reason in entry.skipped and not entry.target for entry in entries)


def test_a_model_without_experts_has_none():
    found = find_experts(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)))
    assert not found.layers
    assert not found.left


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("down_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_layers_are_put_together_whatever_ranks_their_solutions_have(names):
    """The second expert has a rank of its own; what is left out stays dense."""
    torch.manual_seed(0)
    model = tiny_mixtral().double()
    model.set_experts_implementation("eager")
    experts = copy.deepcopy(model.get_submodule(PLACE))
    with experts_as_layers(model) as found:
        stand_in, layers = found.layers[PLACE], dict[str, nn.Module]()
        wanted = copy.deepcopy(stand_in)
        for name in names:
            for expert in range(EXPERTS):
                dense = stand_in.layer(name, expert)
                factors = factorize(dense.weight.detach(), rank=5 if expert == 1 else 9)
                layers[f"{PLACE}.{name}.{expert}"] = layer_of(factors, dense)
                wanted.layer(name, expert).weight.data = factors.dense()
        others = {"lm_head": nn.Linear(2, 2)}
        made = put_together(found, left := {**layers, **others})
    assert left == others
    pifa = made[PLACE]
    assert isinstance(pifa, PifaExperts)
    assert {layer.rank for layer in pifa.pifa.values()} == {9}
    x, (index, weights) = torch.randn(9, 32).double(), routed()[1:]
    assert_close(pifa(x, index, weights), wanted(x, index, weights))
    assert not torch.allclose(pifa(x, index, weights), experts(x, index, weights))


def test_a_gate_of_the_experts_own_keeps_gate_and_up_together():
    layers = taken_apart(dense_experts(GptOssExperts))
    assert layers.projections == ("gate_up_proj", "down_proj")
    weight = layers.layer("gate_up_proj", 1)
    x = torch.randn(3, weight.in_features).double()
    own = layers.experts
    assert_close(weight(x), F.linear(x, own.gate_up_proj[1].mT, own.gate_up_proj_bias[1]))

"""`compress` on mixtures of experts: what becomes of experts, of routers, and of experts that few tokens reach."""

import copy

import pytest
import torch
from expert_models import EXPERTS, tiny_mixtral
from torch import Tensor, nn
from transformers import MixtralForCausalLM

import pifa_compiler as pc
from pifa_compiler.compress import measure
from pifa_compiler.errors import PifaError
from pifa_compiler.experts import PifaExperts, PifaGroupedLinear
from pifa_compiler.reconstruction.expert_means import FEW_TOKENS

PLACE = "model.layers.0.mlp.experts"
PATHS = [f"{PLACE}.pifa.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


def config(**changes: object) -> pc.CompressConfig:
    return pc.CompressConfig(**{"density": 0.6, "rank_multiple": 1, **changes})


def tokens(seed: int, shape: tuple[int, int] = (2, 16), vocabulary: int = 64) -> dict[str, Tensor]:
    """Token ids, common and rare ones."""
    generator = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(1, vocabulary + 1).float()
    ids = torch.multinomial(often, shape[0] * shape[1], replacement=True, generator=generator)
    return {"input_ids": ids.view(shape)}


def entries(report: pc.Report) -> dict[str, pc.LayerReport]:
    return {layer.name: layer for layer in report.layers}


def test_a_projection_of_all_experts_becomes_one_layer_of_one_rank():
    model = tiny_mixtral()
    dense = sum(parameter.numel() for parameter in model.parameters())
    report = pc.compress(model, [tokens(0)], config())
    experts, found = model.get_submodule(PLACE), entries(report)
    assert isinstance(experts, PifaExperts)
    assert [*experts.named_parameters(recurse=False)] == []
    for path in PATHS:
        layer, entry = model.get_submodule(path), found[path]
        assert isinstance(layer, PifaGroupedLinear)
        assert entry.rank == layer.rank
        assert entry.shape == (EXPERTS, layer.out_features, layer.in_features)
        assert entry.stored_before == EXPERTS * 48 * 32
        assert entry.stored_after == sum(x.numel() for x in (layer.w_pivot, layer.coeff, layer.pivots))
    assert found[PATHS[0]].rank == found[PATHS[1]].rank  # they share an order, which the next takes up
    assert model.get_submodule(PATHS[0]).order is model.get_submodule(PATHS[1]).order is None
    assert f"row order absorbed by {PATHS[2]}" in found[PATHS[0]].notes
    assert "decides which experts a token goes to" in found["model.layers.0.mlp.gate"].skipped
    assert report.density <= 0.6
    linears = sum(module.weight.numel() for module in tiny_mixtral().modules() if isinstance(module, nn.Linear))
    router = model.model.layers[0].mlp.gate.weight.numel()
    stored = sum(layer.stored_after for layer in report.layers)
    assert report.linear_density == stored / (linears + router + EXPERTS * 3 * 48 * 32)
    assert f"{report.linear_density:.4f} with the linears that do not count for it" in str(report)
    left = sum(layer.stored_before for layer in report.layers if not layer.target)
    rest = dense - sum(layer.stored_before for layer in report.layers)
    assert report.params_after <= 0.6 * (dense - left - rest) + left + rest
    assert not any("Experts" in other.kind for other in report.others)


class OneByOne(nn.Module):
    """Experts as linear layers: each computes all tokens, and counts where it was chosen."""

    class Expert(nn.Module):
        def __init__(self, gate_up: Tensor, down: Tensor) -> None:
            super().__init__()
            hidden, width = gate_up.shape[1], down.shape[1]
            self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
            self.down_proj, self.act = nn.Linear(width, hidden, bias=False), nn.SiLU()
            for layer, weight in zip(self.children(), (*gate_up.chunk(2), down), strict=False):
                layer.weight.data = weight.detach().clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        weights = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        self.experts = nn.ModuleList(self.Expert(*each) for each in weights)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        shares = [(weights * (index == number)).sum(dim=1, keepdim=True) for number in range(len(self.experts))]
        return sum(expert(x) * share for expert, share in zip(self.experts, shares, strict=True))


def decaying(layers: int, experts: int, **changes: object) -> MixtralForCausalLM:
    """A Mixtral whose weights have singular values that decay, as those of trained ones do."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_key_value_heads": 4}
    model = tiny_mixtral(**sizes, num_hidden_layers=layers, num_local_experts=experts, **changes)
    for name, parameter in model.named_parameters():
        if "embed" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            if not name.endswith(("lm_head.weight", "gate.weight")):
                left, values, right = torch.linalg.svd(parameter.detach(), full_matrices=False)
                values = 3 * values * torch.exp(-0.05 * torch.arange(values.shape[-1]))
                parameter.data = left @ (values[..., None] * right)
    return model


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Relative error of the logits."""
    lost = sum((model(**batch).logits - dense(**batch).logits).square().sum() for batch in batches)
    return float((lost / sum(dense(**batch).logits.square().sum() for batch in batches)) ** 0.5)


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), pytest.param(2, 8, marks=pytest.mark.slow)])
def test_experts_lose_no_more_than_as_linears(layers, experts):
    """Within a tenth: one rank for all experts is a bound that linears have not; they know no tokens of others."""
    dense = decaying(layers, experts)
    calibration, held_out = [[tokens(seed, (4, 64), 256) for seed in seeds] for seeds in (range(2), range(9, 12))]
    apart, together = copy.deepcopy(dense), copy.deepcopy(dense)
    for layer in apart.model.layers:
        layer.mlp.experts = OneByOne(layer.mlp.experts)
    assert error(apart, dense, held_out) < 1e-5
    for model in (apart, together):
        report = pc.compress(model, calibration, config())
        assert report.density <= 0.6
        assert len(report.factorized) >= 3 * layers
    assert report.model_density <= 0.7  # embedding and head, which stay, are less than a quarter of the model
    losses = error(together, dense, held_out), error(apart, dense, held_out)
    assert losses[0] <= 1.1 * losses[1], losses


def test_experts_that_no_token_reaches_take_the_mean_of_the_others():
    model, batch = decaying(1, EXPERTS, num_experts_per_tok=1), tokens(0, (4, 64), 256)
    with torch.no_grad():  # of v x, -v x, v x / 2 and 0 one of the first two is the greatest
        gate = model.model.layers[0].mlp.gate.weight
        gate[1:] = torch.tensor([[-1.0], [0.5], [0.0]]) * gate[0]
    inputs = []
    dense = copy.deepcopy(model)
    dense.get_submodule(PLACE).register_forward_pre_hook(lambda _, args: inputs.append(args))
    dense(**batch)
    ((x, index, weights),) = inputs
    assert int(index.max()) == 1
    report = pc.compress(model, [batch], config())
    for path in PATHS:
        assert any(note.startswith(FEW_TOKENS) for note in entries(report)[path].notes)
    last = torch.full_like(index, EXPERTS - 1)
    wanted, got = (each.get_submodule(PLACE)(x, last, weights) for each in (dense, model))
    assert (got - wanted).norm() < 0.5 * wanted.norm()  # nothing learned of them would be 1


def test_padding_does_not_count():
    """What stands where the mask hides it changes nothing."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 6:] = 0
    found = []
    for seed in (0, 1):
        model, batch = tiny_mixtral(), tokens(0)
        other = tokens(seed)["input_ids"]
        batch["input_ids"] = torch.where(mask.bool(), batch["input_ids"], other)
        report = pc.compress(model, [{**batch, "attention_mask": mask}], config(gradients=False))
        assert not any("padding" in note for note in report.notes)
        found.append((entries(report), model.get_submodule(PATHS[2]).w_pivot))
    for path in PATHS:
        assert found[0][0][path].error == pytest.approx(found[1][0][path].error, rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_gate_and_up_lie_in_one_parameter_and_stay_dense_together():
    model = tiny_mixtral()
    weights = model.get_submodule(PLACE).gate_up_proj
    report = pc.compress(model, [tokens(0)], config(skip=("*.up_proj",)))
    found = entries(report)
    assert all("skipped by pattern '*.up_proj'" in found[path].skipped for path in PATHS[:2])
    experts = model.get_submodule(PLACE)
    assert experts.gate_up_proj is weights
    assert list(experts.pifa) == ["down_proj"]
    report = pc.compress(model := tiny_mixtral(), [tokens(0)], config(ranks={"*.gate_proj": 31, "*.up_proj": 4}))
    found = entries(report)
    assert "would not be smaller" in found[PATHS[0]].skipped
    assert found[PATHS[1]].skipped == f"lies in one parameter with {PATHS[0]}, which stays dense"
    assert list(model.get_submodule(PLACE).pifa) == ["down_proj"]


def test_statistics_can_be_shared_by_several_calls():
    dense, batches = tiny_mixtral(), [tokens(0), tokens(1)]
    statistics = measure(dense, batches, gradients=False)
    assert {name for name in statistics.gram if "experts" in name} == {
        f"{PLACE}.{name}.{expert}.weight" for name in ("gate_proj", "up_proj", "down_proj") for expert in range(EXPERTS)
    }
    found = []
    for given in (None, statistics):
        model = copy.deepcopy(dense)
        report = pc.compress(model, batches, config(method="svd-llm"), statistics=given)
        assert {layer.name for layer in report.factorized} >= set(PATHS)
        found.append(model(**batches[0]).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_an_error_leaves_the_experts_as_they_were(monkeypatch):
    model = tiny_mixtral()
    before = {name: parameter for name, parameter in model.named_parameters()}

    def fails(*_: object) -> None:
        raise PifaError("no")

    monkeypatch.setattr(PifaExperts, "of", fails)
    with pytest.raises(PifaError):
        pc.compress(model, [tokens(0)], config())
    assert [*before] == [name for name, _ in model.named_parameters()]
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert type(model.get_submodule(PLACE)).__name__ == "MixtralExperts"

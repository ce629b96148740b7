"""Row orders absorbed by the layers behind: in modules, by `compress` and by `compact`."""

import copy

import pytest
import torch
import transformers
from graphs import with_nearest_weights
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import pifa_compiler as pc
from pifa_compiler.exchange.absorb import absorb_orders, enclosed_sites, layer_sites
from pifa_compiler.exchange.allowed import Exchangeable
from pifa_compiler.exchange.enclosure import Enclosure
from pifa_compiler.graph.capture import capture
from pifa_compiler.linear import PifaLinear


class GatedMlp(nn.Module):
    """gate and up meet in a product, down reads it; linears are low-rank pairs or dense."""

    def __init__(self, pairs: bool, bias: bool = True):
        super().__init__()

        def linear(inputs: int, outputs: int, rank: int) -> nn.Module:
            if not pairs:
                return nn.Linear(inputs, outputs, bias=bias)
            return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))

        self.gate, self.up, self.down = linear(16, 40, 6), linear(16, 40, 6), linear(40, 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_compact_absorbs_the_order_of_gate_and_up_without_loss():
    model, x = GatedMlp(pairs=True).double(), torch.randn(5, 16).double()
    wanted = model(x)
    report = pc.compact(model, x)
    assert all(isinstance(layer, PifaLinear) for layer in (model.gate, model.up, model.down))
    assert model.gate.order is None
    assert model.up.order is None
    assert model.down.order is not None  # its output joins the residual stream
    assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    notes = {layer.name: layer.notes for layer in report.layers}
    assert notes["gate"] == notes["up"] == ("row order absorbed by down",)


def test_compact_without_an_example_says_that_orders_stay():
    model = GatedMlp(pairs=True)
    report = pc.compact(model)
    assert model.gate.order is not None
    assert any("no example was given" in note for note in report.notes)
    assert "no example was given" in str(report)


@pytest.mark.parametrize("bias", [True, False])
def test_compress_gives_gate_and_up_one_order_which_down_absorbs(bias: bool):
    model = GatedMlp(pairs=False, bias=bias)
    x, before = torch.randn(64, 16), copy.deepcopy(model)
    report = pc.compress(model, [x], pc.CompressConfig(density=0.6, rank_multiple=1))
    assert model.gate.order is None
    assert model.up.order is None
    # In a wrong order the hidden features would give something as far from the dense output as any other vector.
    wanted, nearest = before(x), with_nearest_weights(before, report)(x)
    assert (model(x) - wanted).norm() < (nearest - wanted).norm() < wanted.norm()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = GatedMlp(pairs=False, bias=bias)
    for name, layer in list(model.named_children()):
        setattr(other, name, PifaLinear(layer.in_features, layer.out_features, layer.rank, bias=bias))
    other.load_state_dict(state)  # the absence of an order survives saving
    assert other.gate.order is None
    assert_close(other(x), model(x))


@pytest.mark.parametrize("method", ["optimal", "two-sided"])
def test_compressing_all_of_an_mlp_at_full_rank_changes_nothing(method: str):
    """At a rank where nothing is lost, absorbing must not either."""
    damping = 0 if method == "optimal" else pc.CompressConfig().damping
    model, x = GatedMlp(pairs=False).double(), torch.randn(200, 16).double()
    for layer in (model.gate, model.up, model.down):
        weight = torch.randn(layer.out_features, 4).double() @ torch.randn(4, layer.in_features).double()
        layer.weight.data = weight
    wanted = model(x).detach()
    pc.compress(model, [x], pc.CompressConfig(method=method, ranks={"*": 4}, damping=damping))
    assert model.gate.order is None
    if method == "optimal":
        assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    else:  # sums of outputs, in float32, are divided by a Gram matrix that the damping alone keeps from 0
        assert (model(x) - wanted).norm() <= torch.finfo(torch.float32).eps / damping * wanted.norm()


def test_ranks_that_differ_keep_their_orders():
    model, x = GatedMlp(pairs=False), torch.randn(64, 16)
    pc.compress(model, [x], pc.CompressConfig(ranks={"gate": 5, "up": 6}, density=0.6, rank_multiple=1))
    assert model.gate.order is not None
    assert model.up.order is not None


def test_layers_without_independent_rows_in_common_keep_their_orders():
    model, x = GatedMlp(pairs=False).requires_grad_(False), torch.randn(64, 16)
    rows = model.gate.out_features // 2
    for layer, mine in ((model.gate, slice(rows)), (model.up, slice(rows, None))):
        low_rank = torch.randn(rows, 3) @ torch.randn(3, 16)
        layer.weight.zero_()
        layer.weight[mine] = low_rank
    wanted = model(x)
    pc.compact(model, x)
    assert model.gate.order is not None or model.up.order is not None
    assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)  # lossless up to float32 rounding


def test_a_dense_layer_behind_takes_the_order_and_a_tied_one_does_not():
    class Tied(nn.Module):
        def __init__(self, tied: bool):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
            self.table = nn.Embedding(16, 40)
            if tied:
                self.fc2.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(x))) + self.table.weight.sum()

    for tied in (False, True):
        model, x = Tied(tied).double(), torch.randn(5, 16).double()
        model.fc1.weight.data = torch.randn(40, 5).double() @ torch.randn(5, 16).double()
        wanted = model(x)
        pc.compact(model, x)
        assert (model.fc1.order is None) is not tied
        assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


def test_llama_has_orders_left_in_attention_and_down_only():
    model = tiny_llama()
    sites = layer_sites(capture(model, [torch.arange(8)[None]]).graph)
    assert {name.rpartition(".")[2] for site in sites for name in site.sources} == {"gate_proj", "up_proj"}
    assert all(site.readers[0].endswith("down_proj") for site in sites)
    assert absorb_orders(model, sites) == {}  # nothing is in PIFA form yet


TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MLPS = {
    "LlamaForCausalLM": TEXT,
    "MistralForCausalLM": {**TEXT, "num_key_value_heads": 1},
    "Qwen2ForCausalLM": {**TEXT, "num_key_value_heads": 1},
    "GemmaForCausalLM": {**TEXT, "num_key_value_heads": 1, "head_dim": 8},
    "GPT2LMHeadModel": {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTNeoXForCausalLM": TEXT,
    "PhiForCausalLM": TEXT,
    "OPTForCausalLM": {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "FalconForCausalLM": TEXT,
    "BertForMaskedLM": TEXT,  # its two linears lie in two modules
}


@pytest.mark.parametrize("name", MLPS)
def test_the_code_of_transformers_shows_who_reads_the_hidden_features_of_an_mlp(name: str):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**TOKENS, **MLPS[name]})).eval()
    graph = capture(model, [torch.arange(8)[None]]).graph
    sites, reasons = enclosed_sites(layer_sites(graph), Exchangeable(model, graph), Enclosure(model))
    assert (len(sites), reasons) == (1, {})


def test_the_model_is_not_touched_where_new_layers_are_made():
    model, x = GatedMlp(pairs=True), torch.randn(5, 16)
    pc.compact(model)  # without an example, orders stay
    graph = capture(model, [x]).graph
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules, layers = list(model.modules()), {}
    assert set(absorb_orders(model, layer_sites(graph), layers)) == {"gate", "up"}
    assert layers.keys() == {"gate", "up", "down"}
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(model.get_submodule(name) is not layer for name, layer in layers.items())

"""Saved and loaded models whose experts are in PIFA form."""

import json
import shutil

import pytest
import torch
from expert_models import put_experts_in_pifa_form, tiny_mixtral
from safetensors.torch import load_file, save_file

from pifa_compiler.checkpoint import load_pretrained, save_pretrained
from pifa_compiler.checkpoint.inspect import inspect
from pifa_compiler.errors import CheckpointError
from pifa_compiler.experts import PifaExperts
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "qk_rope_head_dim": 8}
ROUTED |= {
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4},
    "DeepseekV3": ROUTED,
    "GptOss": {"num_local_experts": 4, "layer_types": ["full_attention"]},
    "NemotronH": {
        "n_routed_experts": 4,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 24,
    },
}
IDS = torch.arange(12).reshape(2, 6)
EXPERTS = "model.layers.0.mlp.experts"


def tiny(name):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    return kind._from_config(kind.config_class(**{**SIZES, **MODELS[name]})).eval()


@torch.no_grad()
def assert_same(loaded, model):
    got, wanted = loaded.state_dict(), model.state_dict()
    assert got.keys() == wanted.keys()
    assert [key for key in got if got[key].dtype != wanted[key].dtype or not torch.equal(got[key], wanted[key])] == []
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("names", [None, ["gate_proj", "up_proj", "gate_up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_save_load_save_is_bit_equal(name, names, tmp_path):
    model = tiny(name)
    put_experts_in_pifa_form(model, names=names)
    save_pretrained(model, tmp_path / "first")
    loaded = load_pretrained(tmp_path / "first")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "second")  # with transformers' own reverse of what it does to experts
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second"), model)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    # A program that does not know PIFA has to see something that does not fit.
    settings = json.loads((tmp_path / "second" / "config.json").read_text())
    assert settings["quantization_config"]["format_version"] == 3
    for key in ("quantization_config", "transformers_weights"):
        settings.pop(key, None)
    (tmp_path / "second" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")


def test_gate_and_up_may_be_one_layer(tmp_path):
    model = tiny_mixtral()
    put_experts_in_pifa_form(model, joint=True)
    save_pretrained(model, tmp_path / "m")
    assert_same(load_pretrained(tmp_path / "m"), model)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert settings["experts"] == {EXPERTS: {"gate_up_proj": 8, "down_proj": 8}}
    assert settings["ranks"] == {}


def test_linears_and_experts_are_saved_together(tmp_path):
    model = tiny_mixtral()
    layer = model.model.layers[0].self_attn.o_proj
    model.model.layers[0].self_attn.o_proj = PifaLinear.from_factors(factorize(layer.weight.data, rank=5))
    put_experts_in_pifa_form(model)
    save_pretrained(model, tmp_path / "m")
    assert_same(load_pretrained(tmp_path / "m", dtype=torch.float32), model)
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "m").layers[0].mlp.experts, PifaExperts)
    layers = {layer.name: (layer.shape, layer.rank) for layer in inspect(tmp_path / "m").layers}
    assert layers == {
        f"{EXPERTS}.pifa.gate_proj": ((4, 48, 32), 8),
        f"{EXPERTS}.pifa.up_proj": ((4, 48, 32), 8),
        f"{EXPERTS}.pifa.down_proj": ((4, 32, 48), 8),
        "model.layers.0.self_attn.o_proj": ((32, 32), 5),
    }
    (first,) = (layer for layer in inspect(tmp_path / "m").layers if layer.name.endswith("up_proj"))
    assert (first.stored_before, first.stored_after) == (4 * 48 * 32, 4 * (8 * (48 + 32 - 8) + 8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny("Qwen3Moe")
    put_experts_in_pifa_form(model)
    folder = tmp_path_factory.mktemp("saved") / "m"
    save_pretrained(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "m")


def assert_refused(folder, message):
    """By our loader and by transformers' own."""
    for load in (load_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "wanted `experts`, a table of tables of ranks, of format 3 or newer"),
        ({"experts": {EXPERTS: 8}}, "wanted `experts`, a table of tables"),
        ({"experts": {EXPERTS: {}}}, "wanted `experts`, a table of tables"),
        ({"experts": [EXPERTS]}, "wanted `experts`, a table of tables"),
        ({"experts": {}}, "wanted `ranks`"),
        ({"experts": {EXPERTS: {"down_proj": "8"}}}, "down_proj: wanted a rank of 1 or more, got '8'"),
        ({"experts": {EXPERTS: {"down_proj": 25}}}, r"down_proj: the config says rank 25, wanted 1\.\.24"),
        ({"experts": {EXPERTS: {"down_proj": 8}}}, "in PIFA form in the config or in the file, not in both"),
        ({"experts": {EXPERTS: {"down_proj": 8, "w2": 8}}}, "has gate_proj, up_proj, down_proj"),
        ({"experts": {"model.norm": {"down_proj": 8}}}, "Qwen3MoeRMSNorm is no class of experts"),
        ({"experts": {"model.layers.7.mlp.experts": {"down_proj": 8}}}, "which Qwen3MoeForCausalLM does not have"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("pivots", lambda t: t + 100, "wanted 8 ascending row numbers"),
        ("pivots", lambda t: t.flip(-1), "unsorted or repeated"),
        ("pivots", lambda t: t[:3], r"pivots: wanted \[4, 8\]"),
        ("pivots", lambda t: t.long(), "as int32"),
        ("w_pivot", lambda t: t[0], r"w_pivot: wanted \[4, 8, 32\]"),
        ("coeff", lambda t: t[:, 1:], r"coeff: wanted \[4, 16, 8\]"),
        ("coeff", lambda t: t.int(), "got I32"),
        ("coeff", lambda t: None, r"coeff is missing"),
    ],
)
def test_damaged_tensors_are_refused(part, change, message, folder):
    path, name = folder / "model.safetensors", f"{EXPERTS}.pifa.gate_proj.{part}"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    kept = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    assert_refused(folder, message)


def test_experts_that_no_loader_could_put_back_are_not_saved(tmp_path):
    model = tiny_mixtral()
    put_experts_in_pifa_form(model)
    model.config.num_local_experts = 8
    with pytest.raises(CheckpointError, match="could not be loaded again"):
        save_pretrained(model, tmp_path / "m")

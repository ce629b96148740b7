"""The layer, and where it is used: models of transformers before and after `compact(attention=True)`."""

import copy

import pytest
import torch
from graphs import low_rank
from torch import nn
from torch.nn import functional as F

import pifa_compiler as pc
from pifa_compiler.basis_linear import BasisLinear
from pifa_compiler.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(2, 14).view(2, 6)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
MLA = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4},
    **{"kv_lora_rank": 32, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
WHISPER = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8},
    **{"max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1},
}
IMAGES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "image_size": 32,
}


def make(kind: str, config: str, **settings: object) -> nn.Module:
    """A model with weights of about 1 / sqrt(in), so that attention is not uniform, and biases that are not zero."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn_like(parameter) * scale + (parameter.ndim == 1)
    return model


def llama(**changes: object) -> nn.Module:
    settings = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    return make("LlamaForCausalLM", "LlamaConfig", **(settings | changes))


# name: model, its inputs, its attentions, what is in a basis in each and how much of that is left
MODELS = {
    "llama": (llama, {"input_ids": IDS}, 2, {"v_proj": 0.8125}),
    "phi3": (
        lambda: make(
            "Phi3ForCausalLM", "Phi3Config", **SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0
        ),
        {"input_ids": IDS},
        2,
        {"qkv_proj": 0.953125},
    ),
    "gpt2": (
        lambda: make("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_head=4, n_layer=2),
        {"input_ids": IDS},
        2,
        {"c_attn": 0.84375},
    ),
    "opt": (
        lambda: make("OPTForCausalLM", "OPTConfig", **SMALL, ffn_dim=48, word_embed_proj_dim=32),
        {"input_ids": IDS},
        2,
        {"k_proj": 0.78125, "v_proj": 0.78125},
    ),
    "bert": (
        lambda: make("BertForMaskedLM", "BertConfig", **SMALL, intermediate_size=48),
        {"input_ids": IDS},
        2,
        {"key": 0.78125, "value": 0.78125},
    ),
    "vit": (
        lambda: make("ViTForImageClassification", "ViTConfig", **IMAGES),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
        1,
        {"k_proj": 0.78125, "v_proj": 0.78125},
    ),
    "whisper": (
        lambda: make("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40).sin(), "decoder_input_ids": IDS},
        3,
        {"k_proj": 0.78125, "v_proj": 0.78125},
    ),
    "deepseek-v2": (
        lambda: make("DeepseekV2ForCausalLM", "DeepseekV2Config", **MLA, q_lora_rank=None),
        {"input_ids": IDS},
        2,
        {"kv_b_proj": 0.765625},  # a quarter less, but for the order
    ),
    "deepseek-v3": (
        lambda: make("DeepseekV3ForCausalLM", "DeepseekV3Config", **MLA, q_lora_rank=16),
        {"input_ids": IDS},
        2,
        {"kv_b_proj": 0.765625},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_with_less(name: str, tmp_path):
    build, inputs, attentions, left = MODELS[name]
    model = build()
    with torch.no_grad():
        wanted = model(**inputs).logits
    generates = name not in ("bert", "vit")
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**given, **options) if generates else None
    report = pc.compact(model, inputs, attention=True)
    assert {
        layer.name.rpartition(".")[2]: layer.stored_after / layer.stored_before for layer in report.in_basis
    } == left
    assert len(report.in_basis) == attentions * len(left)
    assert report.params_before - report.params_after == sum(
        layer.stored_before - layer.stored_after for layer in report.in_basis
    )
    with torch.no_grad():
        got = model(**inputs).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5  # some tens of roundings, each 6e-8 times a growth of 5
    if tokens is not None:
        assert torch.equal(model.generate(**given, **options), tokens)  # with a cache of other keys and values
    pc.save_pretrained(model, tmp_path / "saved", report=report)
    loaded = pc.load_pretrained(tmp_path / "saved", verify=True)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, got)
    assert sum(isinstance(layer, BasisLinear) for layer in loaded.modules()) == len(report.in_basis)


def test_half_precision_has_as_many_bases_as_keep_its_precision():
    model, bases = llama(hidden_size=96, num_attention_heads=12, num_key_value_heads=12), {}
    with torch.no_grad():
        wanted = model(IDS).logits
    for dtype, most in ((torch.float16, 16), (torch.bfloat16, 4)):
        half = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            dense_error = float((half(IDS).logits - wanted).norm())
        report = pc.compact(half, IDS, attention=True)
        bases[dtype] = [layer.groups for layer in half.modules() if isinstance(layer, BasisLinear)]
        # A number's rounding is uniform in half an eps of it, so that the weight's error is eps / 2 sqrt 3 at most.
        assert max(layer.quality.error for layer in report.in_basis) < most * torch.finfo(dtype).eps / 12**0.5
        with torch.no_grad():
            assert float((half(IDS).logits - wanted).norm()) < most * dense_error
    assert 1 <= min(bases[torch.float16]) <= max(bases[torch.float16]) < min(bases[torch.bfloat16])
    assert pc.compact(half, IDS, attention=True).in_basis == []  # a second run finds nothing


class Attention(nn.Module):
    """Plain attention, with one thing besides."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.trick = trick

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (4, 8)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (4, 8)).transpose(1, 2)
        if self.training and self.trick == "branch":
            v = v.relu()
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        if self.trick == "gate":
            mixed = mixed * x.sigmoid()
        out = self.o(mixed)
        return out + v.sum() if self.trick == "reads twice" else out


class Keeping(Attention):
    """Keeps its values for others, but not while it is captured."""

    def forward(self, x):
        v = self.v(x).unflatten(-1, (4, 8)).transpose(1, 2)
        if self.training:
            self.seen = v
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        ("reads twice", "reads them too"),
        ("gate", "stands between attention and a linear"),
        ("branch", "does more than move them on one branch"),
        ("keeps", "keeps them"),
        ("hook", "hooks"),
    ],
    ids=str,
)
def test_heads_that_others_read_are_left_with_their_reason(trick: str, words: str):
    torch.manual_seed(0)
    attention = Keeping(trick) if trick == "keeps" else Attention(trick)
    model, x = nn.Sequential(nn.LayerNorm(32), attention).eval(), torch.randn(2, 5, 32)
    if trick == "hook":
        model[1].v.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        wanted = model(x)
        report = pc.compact(model, x, attention=True)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert type(model[1].v) is nn.Linear
    assert words in " ".join(next(layer.notes for layer in report.layers if layer.name == "1.v"))


def test_a_layer_computes_its_dense_weight_and_can_be_trained():
    torch.manual_seed(0)
    for plain, heads, d, d_in, groups in ((0, 4, 8, 32, 1), (5, 4, 8, 33, 2), (0, 6, 1, 7, 3)):
        layer = BasisLinear(d_in, plain + heads * d, d, heads, groups)
        for row in layer.order:
            row.copy_(torch.randperm(d_in))
        x = torch.randn(2, 3, d_in, requires_grad=True)
        wanted = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted)
        assert layer(x[:, :0]).shape == (2, 0, plain + heads * d)
        layer(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        other = BasisLinear(d_in, plain + heads * d, d, heads, groups)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("sizes", [(32, 31, 8, 4, 1), (32, 32, 8, 4, 3), (8, 32, 8, 4, 1), (32, 32, 8, 0, 1)], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...]):
    with pytest.raises(ConfigError, match="do not fit"):
        BasisLinear(*sizes)


def test_damaged_folders_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = llama()
    pc.compact(model, IDS, attention=True)
    pc.save_pretrained(model, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".order"))
    for damaged in ({name: tensors[name].clone().fill_(3)}, {name: None}):
        changed = {key: value for key, value in (tensors | damaged).items() if value is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="every input once"):
            pc.load_pretrained(tmp_path / "saved")


def test_layers_in_pifa_form_take_up_a_change_and_are_not_put_in_a_basis():
    model = llama()
    first, second = (block.self_attn for block in model.model.layers)
    first.o_proj.weight.data = low_rank(32, 32, 9)
    second.v_proj.weight.data = low_rank(16, 32, 5)
    with torch.no_grad():
        wanted = model(IDS).logits
        report = pc.compact(model, IDS, attention=True)
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in report.in_basis] == ["model.layers.0.self_attn.v_proj"]
    notes = {layer.name: layer.notes for layer in report.layers}
    assert "has taken up the change of basis" in " ".join(notes["model.layers.0.self_attn.o_proj"])
    assert "in PIFA form" in " ".join(notes["model.layers.1.self_attn.v_proj"])

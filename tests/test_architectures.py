"""Tiny models of many architectures: `compress` compresses them, or says in its own words why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pifa_compiler as pc

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
MLP = {**SIZES, "intermediate_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**MLP, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
LATENT = {
    **{**MLP, **TOKENS, "num_key_value_heads": 4, "max_position_embeddings": 64, "moe_intermediate_size": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES |= {"image_size": 16, "patch_size": 4}
BOTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BOTH |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 96, **TOKENS}
BOTH |= {"decoder_start_token_id": 1}

Call = dict[str, Tensor]


def text(length: int = 16) -> Call:
    return {"input_ids": torch.randint(3, 96, (2, length))}


def translated() -> Call:
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    return {**text(), "attention_mask": mask, "decoder_input_ids": torch.randint(3, 96, (2, 8))}


def image() -> Call:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def sound() -> Call:
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, 300:] = 0
    return {"input_values": torch.randn(2, 400), "attention_mask": mask}


def speech() -> Call:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 96, (2, 8))}


def clip() -> Any:
    words = {**MLP, **TOKENS, "projection_dim": 16, "max_position_embeddings": 32}
    return transformers.CLIPConfig(text_config=words, vision_config={**IMAGES, "projection_dim": 16}, projection_dim=16)


def plain(config: str, options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(transformers, config)(**options)


QUICK: dict[str, tuple[Callable[[], Any], Callable[[], Call]]] = {
    "CLIPModel": (clip, lambda: {**text(), **image()}),
    "DeepseekV2ForCausalLM": (plain("DeepseekV2Config", {**LATENT, "head_dim": 8}), text),
    "Wav2Vec2Model": (
        plain(
            "Wav2Vec2Config",
            {
                **{**MLP, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4)},
                **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
            },
        ),
        sound,
    ),
    "BertModel": (plain("BertConfig", MLP), text),
}
SLOW: dict[str, tuple[Callable[[], Any], Callable[[], Call]]] = {
    "DeepseekV3ForCausalLM": (plain("DeepseekV3Config", LATENT), text),
    "RwkvForCausalLM": (plain("RwkvConfig", {**MLP, "context_length": 32}), text),
    "FalconForCausalLM": (plain("FalconConfig", {**SIZES, **TOKENS}), text),
    "MixtralForCausalLM": (plain("MixtralConfig", {**GROUPED, "num_local_experts": 4}), text),
    "Qwen3ForCausalLM": (plain("Qwen3Config", {**GROUPED, "head_dim": 8}), text),
    "Gemma2ForCausalLM": (plain("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}), text),
    "Phi3ForCausalLM": (plain("Phi3Config", GROUPED), text),
    "GPTJForCausalLM": (
        plain("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 96, **TOKENS}),
        text,
    ),
    "BloomForCausalLM": (plain("BloomConfig", {**SIZES, "n_head": 4, "n_layer": 2, **TOKENS}), text),
    "MambaForCausalLM": (plain("MambaConfig", {**MLP, **TOKENS, "state_size": 4}), text),
    "RobertaForMaskedLM": (plain("RobertaConfig", {**MLP, **TOKENS, "max_position_embeddings": 40}), text),
    "DistilBertModel": (
        plain("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96}),
        text,
    ),
    "ElectraModel": (plain("ElectraConfig", {**MLP, "embedding_size": 16}), text),
    "AlbertModel": (plain("AlbertConfig", {**MLP, "embedding_size": 16}), text),
    "T5ForConditionalGeneration": (
        plain(
            "T5Config",
            {
                **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
                "decoder_start_token_id": 0,
            },
        ),
        translated,
    ),
    "BartForConditionalGeneration": (plain("BartConfig", {**BOTH, "max_position_embeddings": 64}), translated),
    "WhisperForConditionalGeneration": (
        plain("WhisperConfig", {**BOTH, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}),
        speech,
    ),
    "ViTForImageClassification": (plain("ViTConfig", IMAGES), image),
    "Dinov2Model": (plain("Dinov2Config", IMAGES), image),
    "SiglipVisionModel": (plain("SiglipVisionConfig", IMAGES), image),
}


def check(name: str, config: Callable[[], Any], make_call: Callable[[], Call]) -> pc.Report | None:
    """Compresses; the outputs stay finite, and the report is true of the model. None if that was refused."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(config()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [make_call() for _ in range(2)]
    try:
        report = pc.compress(model, batches, pc.CompressConfig(density=0.6, rank_multiple=1))
    except pc.PifaError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return None
    with torch.no_grad():
        outputs = model(**batches[0])
    assert all(torch.isfinite(value).all() for value in outputs.values() if isinstance(value, Tensor))
    pifa = {key for key, module in model.named_modules() if isinstance(module, pc.PifaLinear)}
    assert pifa == {layer.name for layer in report.factorized} != set()
    assert report.density <= 0.6
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert report.params_after == stored + sum(model.get_submodule(key).rank for key in pifa)
    kept = sum(layer.stored_after for layer in report.factorized)
    assert report.untouched == report.params_after - kept
    held = {id(own): own.numel() for key, own in model.named_parameters()}
    assert sum(held.values()) == stored
    assert sum(other.numbers for other in report.others) <= report.untouched
    return report


NOTES = {
    "CLIPModel": ["no logits"],
    "DeepseekV2ForCausalLM": [],
    "Wav2Vec2Model": ["not called with token ids", "13 linears whose inputs have other rows than attention_mask"],
    "BertModel": ["no logits"],
}


@pytest.mark.parametrize("name", QUICK)
def test_models_that_were_refused_are_compressed_and_what_is_lacking_is_noted(name: str):
    report = check(name, *QUICK[name])
    assert report is not None
    assert len(report.notes) == len(NOTES[name])
    for note, words in zip(report.notes, NOTES[name], strict=True):
        assert words in note


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_architecture_is_compressed_or_refused_in_our_own_words(name: str):
    check(name, *SLOW[name])

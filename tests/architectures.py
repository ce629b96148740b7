"""Tiny random models of many architectures, with calls of them: what `test_architectures` goes through.

README.md lists them (`benchmarks/tables.py`), so an entry here is a promise that the tests keep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        kind: of architectures that belong together.
        shown: its name for people.
        make: a model with random weights.
        call: keyword arguments to call it with.
        notes: words of the notes that the report of `compress` has, one of each.
        dense: what beside heads, embeddings, norms and convolutions stays as it is: the class of a module.
        follows_other_code: whether `torch.compile` computes otherwise than the model, whatever the backend.
    """

    kind: str
    shown: str
    make: Callable[[], nn.Module]
    call: Callable[[], Call]
    notes: tuple[str, ...] = ()
    dense: str | None = None
    follows_other_code: bool = False


NO_TOKENS = ("not called with token ids",)
NO_LOGITS = ("gives no logits",)
BOTH_SIDES = ("depend on later tokens",)
IN_PARTS = ("captured in parts", "captured in parts, which its predictions")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
MLP = {**SIZES, "intermediate_size": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**MLP, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **TOKENS}
LATENT = {
    **{**MLP, **TOKENS, "num_key_value_heads": 4, "max_position_embeddings": 64, "moe_intermediate_size": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
JAMBA = {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
RELATIVE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
RELATIVE |= {"decoder_start_token_id": 0}
TRANSLATION = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
TRANSLATION |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 96, **TOKENS}
TRANSLATION |= {"decoder_start_token_id": 1, "max_position_embeddings": 64}
SPEECH = {**TRANSLATION, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
SPEECH |= {"suppress_tokens": None, "begin_suppress_tokens": None}
SOUND = {**MLP, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES |= {"image_size": 16, "patch_size": 4}
DISENTANGLED = {**MLP, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
PICTURE, IMAGE_STARTS, IMAGE_ENDS = 95, 93, 92
PICTURES = {"image_token_id": PICTURE, "video_token_id": 94}
PICTURES |= {"vision_start_token_id": IMAGE_STARTS, "vision_end_token_id": IMAGE_ENDS}


def text() -> Call:
    return {"input_ids": torch.randint(3, 90, (2, 16))}


def translated() -> Call:
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    return {**text(), "attention_mask": mask, "decoder_input_ids": torch.randint(3, 96, (2, 8))}


def image(size: int = 16) -> Call:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def text_and_image() -> Call:
    return {**text(), **image()}


def text_with_image() -> Call:
    ids = torch.randint(3, 90, (2, 24))
    ids[:, 2:18] = PICTURE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image()}


def text_with_patches() -> Call:
    ids = text()["input_ids"]
    ids[:, 2:8] = torch.tensor([IMAGE_STARTS, *[PICTURE] * 4, IMAGE_ENDS])
    patches = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = {"mm_token_type_ids": (ids == PICTURE).int(), "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, **kinds, **patches}


def sound() -> Call:
    mask = torch.ones(2, 400, dtype=torch.int64)
    mask[1, 300:] = 0
    return {"input_values": torch.randn(2, 400), "attention_mask": mask}


def speech() -> Call:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 96, (2, 8))}


def of(name: str, settings: Mapping[str, Any], config: str | None = None) -> Callable[[], nn.Module]:
    """A model of transformers by its class, its config's class (that of the same model) and settings."""

    def make() -> nn.Module:
        import transformers

        stem = name.removesuffix("Model")
        for head in ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForImageClassification"):
            stem = stem.removesuffix(head)
        made: nn.Module = getattr(transformers, name)(getattr(transformers, config or f"{stem}Config")(**settings))
        return made

    return make


def clip() -> nn.Module:
    import transformers

    words = {**MLP, **TOKENS, "projection_dim": 16, "max_position_embeddings": 32}
    config = {"text_config": words, "vision_config": {**IMAGES, "projection_dim": 16}, "projection_dim": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(**config))


def siglip() -> nn.Module:
    import transformers

    words = {**MLP, **TOKENS, "projection_size": 32, "max_position_embeddings": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=words, vision_config=dict(IMAGES)))


def llava() -> nn.Module:
    import transformers

    tower = transformers.CLIPVisionConfig(**IMAGES, projection_dim=16)
    words = transformers.LlamaConfig(**GROUPED)
    config = transformers.LlavaConfig(vision_config=tower, text_config=words, image_token_index=PICTURE)
    return transformers.LlavaForConditionalGeneration(config)


def pali_gemma() -> nn.Module:
    import transformers

    tower = transformers.SiglipVisionConfig(**IMAGES, vision_use_head=False, projection_dim=32)
    words = transformers.GemmaConfig(**HEADS_OF_8)
    config = {"vision_config": tower, "text_config": words, "projection_dim": 32, "image_token_index": PICTURE}
    return transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**config))


ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
TEXT_OF_QWEN = {**GROUPED, "max_position_embeddings": 128, "rope_parameters": ROTARY}
TOWER_OF_QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2}
QWEN2_VL = {**PICTURES, "text_config": {**TEXT_OF_QWEN, "num_hidden_layers": 1}}
QWEN2_VL |= {"vision_config": {**TOWER_OF_QWEN, "depth": 1, "embed_dim": 32, "mlp_ratio": 2}}
QWEN2_5_VL = {**PICTURES, "text_config": TEXT_OF_QWEN}
QWEN2_5_VL |= {
    "vision_config": {
        **{**TOWER_OF_QWEN, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16},
        "fullatt_block_indexes": [1],
    }
}


class Pooled(nn.Module):
    """Attention between two inputs of other widths, by torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(32, 4, kdim=24, vdim=24), nn.Linear(32, 32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        found: Tensor = self.head(self.attention(x, memory, memory)[0])
        return found


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)


DECODER, MIXED, STATE = "decoders", "with experts", "with a state"
ENCODER, TRANSLATOR, VISION = "encoders", "encoder-decoders", "vision"
AUDIO, SEVERAL, PLAIN = "speech", "text and images", "modules of torch"


def _decoder(shown: str, name: str, settings: Mapping[str, Any], kind: str = DECODER) -> Architecture:
    return Architecture(kind, shown, of(f"{name}ForCausalLM", settings, f"{name}Config"), text)


def _encoder(shown: str, name: str, settings: Mapping[str, Any]) -> Architecture:
    return Architecture(ENCODER, shown, of(f"{name}Model", settings), text, NO_LOGITS)


def _translator(shown: str, name: str, settings: Mapping[str, Any], make_call: Callable[[], Call]) -> Architecture:
    return Architecture(TRANSLATOR, shown, of(name, settings), make_call)


def _vision(shown: str, name: str, settings: Mapping[str, Any], size: int = 16) -> Architecture:
    return Architecture(VISION, shown, of(name, settings), lambda: image(size), NO_TOKENS)


ARCHITECTURES = (
    _decoder("Llama", "Llama", GROUPED),
    _decoder("Mistral", "Mistral", GROUPED),
    _decoder("Qwen2", "Qwen2", GROUPED),
    _decoder("Qwen3", "Qwen3", HEADS_OF_8),
    _decoder("Gemma", "Gemma", HEADS_OF_8),
    _decoder("Gemma 2", "Gemma2", {**HEADS_OF_8, "sliding_window": 8}),
    Architecture(
        *(DECODER, "Gemma 3"),
        of("Gemma3ForCausalLM", {**HEADS_OF_8, "sliding_window": 8}, "Gemma3TextConfig"),
        text,
    ),
    _decoder("Phi", "Phi", GROUPED),
    _decoder("Phi-3", "Phi3", GROUPED),
    _decoder("SmolLM3", "SmolLM3", GROUPED),
    _decoder("OLMo 2", "Olmo2", GROUPED),
    _decoder("Granite", "Granite", GROUPED),
    _decoder("Cohere", "Cohere", GROUPED),
    _decoder("GLM-4", "Glm4", HEADS_OF_8),
    _decoder("Nemotron", "Nemotron", HEADS_OF_8),
    _decoder("StableLM", "StableLm", GROUPED),
    _decoder("StarCoder2", "Starcoder2", GROUPED),
    Architecture(DECODER, "GPT-2", of("GPT2LMHeadModel", GPT, "GPT2Config"), text),
    _decoder("GPT-J", "GPTJ", {**GPT, "rotary_dim": 4}),
    _decoder(
        *("GPT-Neo", "GPTNeo"),
        {
            **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 96, "window_size": 8, **TOKENS},
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    _decoder("GPT-NeoX", "GPTNeoX", {**MLP, **TOKENS, "max_position_embeddings": 64}),
    _decoder("GPT-BigCode", "GPTBigCode", GPT),
    _decoder("CodeGen", "CodeGen", {**GPT, "rotary_dim": 4}),
    _decoder("OPT", "OPT", {**SIZES, **TOKENS, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    _decoder("BLOOM", "Bloom", {**SIZES, **TOKENS, "n_head": 4, "n_layer": 2}),
    _decoder("Falcon", "Falcon", {**SIZES, **TOKENS}),
    _decoder("MPT", "Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96, **TOKENS}),
    _decoder("DeepSeek-V2", "DeepseekV2", {**LATENT, "head_dim": 8}, MIXED),
    _decoder("DeepSeek-V3", "DeepseekV3", LATENT, MIXED),
    _decoder("Mixtral", "Mixtral", {**GROUPED, "num_local_experts": 4}, MIXED),
    _decoder("Qwen2-MoE", "Qwen2Moe", {**EXPERTS, "moe_intermediate_size": 16}, MIXED),
    _decoder("Qwen3-MoE", "Qwen3Moe", {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 32}, MIXED),
    _decoder("OLMoE", "Olmoe", EXPERTS, MIXED),
    _decoder(
        *("GPT-OSS", "GptOss"),
        {**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        MIXED,
    ),
    Architecture(
        *(MIXED, "Llama 4"),
        of(
            "Llama4ForCausalLM",
            {**HEADS_OF_8, "num_local_experts": 4, "intermediate_size_mlp": 64, "moe_layers": [1]},
            "Llama4TextConfig",
        ),
        text,
        (),
        "Llama4TextExperts",
    ),
    _decoder("Jamba", "Jamba", {**JAMBA, "use_mamba_kernels": False}, MIXED),
    Architecture(STATE, "Mamba", of("MambaForCausalLM", {**MLP, **TOKENS, "state_size": 4}), text),
    Architecture(
        *(STATE, "Mamba-2"),
        of(
            "Mamba2ForCausalLM",
            {**SIZES, **TOKENS, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ),
        text,
    ),
    Architecture(STATE, "Falcon Mamba", of("FalconMambaForCausalLM", {**MLP, **TOKENS, "state_size": 4}), text),
    Architecture(STATE, "RWKV", of("RwkvForCausalLM", {**MLP, "context_length": 32}), text),
    Architecture(
        *(STATE, "RecurrentGemma"),
        of("RecurrentGemmaForCausalLM", {**GROUPED, "lru_width": 32, "num_hidden_layers": 3}),
        text,
    ),
    _encoder("BERT", "Bert", MLP),
    Architecture(
        *(ENCODER, "RoBERTa"),
        of("RobertaForMaskedLM", {**MLP, **TOKENS, "max_position_embeddings": 40}),
        text,
        BOTH_SIDES,
    ),
    _encoder("ALBERT", "Albert", {**MLP, "embedding_size": 16}),
    _encoder("ELECTRA", "Electra", {**MLP, "embedding_size": 16}),
    _encoder("DistilBERT", "DistilBert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96}),
    _encoder("DeBERTa-v2", "DebertaV2", {**DISENTANGLED, "max_relative_positions": 16}),
    _encoder("ModernBERT", "ModernBert", {**MLP, **TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    _encoder("MPNet", "MPNet", {**MLP, **TOKENS}),
    _encoder("XLNet", "XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 96}),
    _translator("T5", "T5ForConditionalGeneration", RELATIVE, translated),
    _translator("mT5", "MT5ForConditionalGeneration", RELATIVE, translated),
    _translator("BART", "BartForConditionalGeneration", TRANSLATION, translated),
    _translator("Pegasus", "PegasusForConditionalGeneration", TRANSLATION, translated),
    _translator("M2M-100", "M2M100ForConditionalGeneration", TRANSLATION, translated),
    Architecture(TRANSLATOR, "Marian", of("MarianMTModel", TRANSLATION, "MarianConfig"), translated),
    Architecture(AUDIO, "Whisper", of("WhisperForConditionalGeneration", SPEECH), speech),
    Architecture(AUDIO, "Wav2Vec2", of("Wav2Vec2Model", SOUND), sound, (*NO_TOKENS, "padding, if there is any")),
    Architecture(
        *(AUDIO, "HuBERT"), of("HubertModel", SOUND), lambda: {"input_values": torch.randn(2, 400)}, NO_TOKENS
    ),
    _vision("ViT", "ViTForImageClassification", IMAGES),
    _vision("DeiT", "DeiTModel", IMAGES),
    _vision("BEiT", "BeitModel", IMAGES),
    _vision("DINOv2", "Dinov2Model", IMAGES),
    _vision(
        *("Swin", "SwinModel"),
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        32,
    ),
    _vision("ConvNeXt", "ConvNextModel", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, 32),
    Architecture(SEVERAL, "CLIP", clip, text_and_image, NO_LOGITS),
    Architecture(SEVERAL, "SigLIP", siglip, text_and_image, NO_LOGITS),
    Architecture(SEVERAL, "LLaVA", llava, text_with_image),
    Architecture(SEVERAL, "PaliGemma", pali_gemma, text_with_image, IN_PARTS, follows_other_code=True),
    Architecture(SEVERAL, "Qwen2-VL", of("Qwen2VLForConditionalGeneration", QWEN2_VL), text_with_patches, IN_PARTS),
    Architecture(
        SEVERAL, "Qwen2.5-VL", of("Qwen2_5_VLForConditionalGeneration", QWEN2_5_VL), text_with_patches, IN_PARTS
    ),
    Architecture(
        *(PLAIN, "nn.MultiheadAttention", Pooled),
        lambda: {"x": torch.randn(16, 2, 32), "memory": torch.randn(12, 2, 24)},
        NO_TOKENS,
    ),
    Architecture(PLAIN, "nn.TransformerEncoder", encoder, lambda: {"src": torch.randn(2, 16, 32)}, NO_TOKENS),
)

"""Models of transformers, tiny and random, through the backend: whatever it rewrites in them, they compute the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pifa_compiler.passes import Record, Skip
from torch import nn
from torch._inductor import compile_fx

# What these models and Dynamo warn of on the way (caches looked through, slow fallbacks) is the same without us.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
BERT = SIZES | {"intermediate_size": 48, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
OPT = BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
JAMBA = LLAMA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
LATENT = LLAMA | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
QWEN_MOE = LLAMA | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("MambaForCausalLM", SIZES | {"state_size": 4}),
    "Mamba2": ("Mamba2ForCausalLM", SIZES | {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "Jamba": ("JambaForCausalLM", JAMBA | {"num_experts_per_tok": 1, "use_mamba_kernels": False}),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "Qwen2Moe": ("Qwen2MoeForCausalLM", QWEN_MOE),
    "Gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 8}),
    "Gemma3Text": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 8}),
    "DeepseekV3": ("DeepseekV3ForCausalLM", LATENT),
    "T5": ("T5ForConditionalGeneration", T5),
    "Bart": ("BartModel", BART),
    "Falcon": ("FalconForCausalLM", SIZES | {"num_attention_heads": 4}),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "OPT": ("OPTForCausalLM", OPT),
    "Bert": ("BertModel", BERT),
    "Rwkv": ("RwkvForCausalLM", SIZES | {"context_length": 64}),
}


def tiny(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A frozen model, the weights of every other linear of rank 4, and a call."""
    class_name, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, class_name)(config).eval().requires_grad_(False)
    embedded = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) >= 24 and p.data_ptr() not in embedded]
    for matrix in matrices[::2]:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix.copy_((u[:, :4] * s[:4]) @ v[:4])
    ids = torch.randint(2, 60, (2, 12))
    return model, {"input_ids": ids} | ({"decoder_input_ids": ids} if name in ("T5", "Bart") else {})


def compare(name: str) -> None:
    model, call = tiny(name)
    report: list[Record] = []
    compiled: Callable[..., Any] = torch.compile(model, backend="pifa", options={"report": report})
    wanted, got = model(**call)[0], compiled(**call)[0]
    # Sums of some dozen float32 terms in another order, through two layers.
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    done = [r for r in report if r.rule == "FactorizeLinear" and not isinstance(r.outcome, Skip)]
    assert len(done) > 0


QUICK = {"Mamba", "Jamba", "Llama", "Mixtral", "Gemma3Text", "DeepseekV3", "T5", "Falcon", "GPT2", "Bert"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_model_computes_the_same_behind_all_passes(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, example_inputs, **options: gm.forward)
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_compiled(name: str):
    compare(name)

"""Random models and tokenizers, made in memory, for tests that need something shaped like a language model."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("<s>", "</s>", "<unk>", *(f"w{i}" for i in range(61)))


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A two-layer Llama with random weights and 64 embedding rows, in evaluation mode."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # far from uniform, so that sampling and perplexity have something to see
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def tiny_tokenizer(words: tuple[str, ...] = WORDS, **options: object) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words split at white space; `w5` is token 8."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 8} | options),
    )

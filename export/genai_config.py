"""`genai_config.json`: what onnxruntime-genai has to know to generate text from a KV-cache export."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drafts import draft_in
from ..errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "genai_config.json"


def genai_config(model: "PreTrainedModel", file_name: str, pad_token_id: int | None = None) -> dict[str, Any]:
    """The configuration for a model that `to_onnx(..., kv_cache=True)` wrote as `file_name`.

    Args:
        model: the model that was exported.
        file_name: of the ONNX file, in the same folder.
        pad_token_id: of the tokenizer; None takes the model's own, or its first end-of-text token.

    Raises:
        ExportError: the model has no end-of-text token, so that generation would never stop.
    """
    from .causal_lm import CausalLmWithCache

    config = model.config.get_text_config(decoder=True)
    cached = CausalLmWithCache(model)
    heads, key_size, value_size = cached.layers[0]
    if any(shape != (heads, key_size, key_size) for shape in cached.layers) or key_size != value_size:
        raise ExportError("onnxruntime-genai wants caches of one size in all layers; this model's differ")
    ends = _first(model, "eos_token_id")
    if ends is None:
        raise ExportError("the model has no eos_token_id, and onnxruntime-genai needs one; set it in its config")
    end = ends[0] if isinstance(ends, list) else ends
    pad = next((x for x in (pad_token_id, _first(model, "pad_token_id")) if x is not None), end)
    begin = _first(model, "bos_token_id")
    longest = int(getattr(config, "max_position_embeddings", 2048))
    return {
        "model": {
            "type": "llama",  # a decoder with keys and values; nothing of that family itself is meant by it
            "bos_token_id": end if begin is None else begin,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "context_length": longest,
            "vocab_size": int(config.vocab_size),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file_name,
                "hidden_size": int(config.hidden_size),
                "head_size": key_size,
                "num_attention_heads": int(config.num_attention_heads),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(cached.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False},
    }


def write_genai_config(
    model: "PreTrainedModel",
    onnx_file: str | Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes `genai_config.json` beside an export, and the tokenizer's files if there is one; returns its path.

    Tokenizer files that are there already stay as they are, unless `overwrite`.

    Raises:
        ExportError: see `genai_config`; or it is there already and `overwrite` is not set, or cannot be written.
    """
    file = Path(onnx_file).expanduser().resolve()
    target = file.with_name(FILE)
    if target.exists() and not overwrite:
        raise ExportError(f"{target} exists already; say overwrite (--force), or export into another folder")
    pad = None if tokenizer is None else tokenizer.pad_token_id
    content = json.dumps(genai_config(model, file.name, pad), indent=2) + "\n"
    try:
        with draft_in(file.parent) as draft:
            if tokenizer is not None:
                tokenizer.save_pretrained(draft.new)
            (draft.new / FILE).write_text(content, encoding="utf-8")
            for made in draft.new.iterdir():
                place = file.with_name(made.name)
                if overwrite or not place.exists():
                    made.replace(place)
    except OSError as error:
        raise ExportError(f"{target} could not be written: {error}; choose another place") from error
    return target


def _first(model: "PreTrainedModel", name: str) -> Any:
    """A token's id from the generation config or, where that has none, the model's."""
    found = getattr(model.generation_config, name, None)
    return getattr(model.config, name, None) if found is None else found

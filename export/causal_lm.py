"""Causal language models with plain tensors as inputs and outputs, as an exporter wants them.

Positions are computed in the graph from the attention mask, as `generate` does it: left padding needs no further input.
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_causal_lm(model: nn.Module) -> bool:
    """Whether this is a Hugging Face model that generates text."""
    return callable(getattr(model, "generate", None)) and getattr(model, "config", None) is not None


class CausalLm(nn.Module):
    """(input_ids [batch, sequence], attention_mask [batch, sequence]) -> logits [batch, sequence, vocabulary]."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of every token."""
        positions = _positions(self.model, attention_mask)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        logits: Tensor = output.logits
        return logits

    @property
    def input_names(self) -> list[str]:
        """One name for each tensor, in the order of `forward`."""
        return ["input_ids", "attention_mask"]

    @property
    def output_names(self) -> list[str]:
        """One name for each result."""
        return ["logits"]

    def example(self) -> tuple[Any, ...]:
        """Arguments to capture it with: two rows of three tokens, the first with one of padding."""
        mask = torch.ones(2, 3, dtype=torch.int64, device=self.model.device)
        mask[0, 0] = 0
        return _tokens(self.model, 2, 3), mask

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch and sequence vary."""
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        return sizes, sizes


class CausalLmWithCache(CausalLm):
    """The same with a key/value cache.

    `attention_mask` is [batch, past + sequence]; `past` holds for every layer key and value, each
    [batch, heads, past, head size], and `past` may be 0. The results are the logits of the new tokens and, for every
    layer, key and value with the new tokens added.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model)
        self.layers = _cache_shapes(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> Any:
        """The logits, and the cache as a flat list."""
        from transformers import DynamicCache

        cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True)))
        positions = {
            name: value[:, past[0].shape[2] :] for name, value in _positions(self.model, attention_mask).items()
        }
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        layers: list[Any] = cache.layers
        return output.logits, [part for layer in layers for part in (layer.keys, layer.values)]

    @property
    def input_names(self) -> list[str]:
        """The names that onnxruntime-genai and Optimum use."""
        return [*super().input_names, *self._cache_names("past_key_values")]

    @property
    def output_names(self) -> list[str]:
        """The names that onnxruntime-genai and Optimum use."""
        return ["logits", *self._cache_names("present")]

    def example(self) -> tuple[Any, ...]:
        """Two rows of three tokens behind four of the cache, the first with one of padding."""
        mask = torch.ones(2, 7, dtype=torch.int64, device=self.model.device)
        mask[0, 0] = 0
        generator = torch.Generator().manual_seed(0)
        dtype = next(self.model.parameters()).dtype
        past = [
            torch.randn(2, heads, 4, size, generator=generator).to(self.model.device, dtype)
            for heads, *sizes in self.layers
            for size in sizes
        ]
        return _tokens(self.model, 2, 3), mask, *past

    def empty_example(self) -> tuple[Any, ...]:
        """Arguments of a first pass, with nothing in the cache yet."""
        tokens, mask, *past = self.example()
        return tokens, mask[:, : tokens.shape[1]], *(part[:, :, :0] for part in past)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch, sequence and past vary."""
        batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
        cached = ({0: batch, 2: past},) * (2 * len(self.layers))
        return {0: batch, 1: sequence}, {0: batch, 1: torch.export.Dim.DYNAMIC}, cached

    def _cache_names(self, stem: str) -> list[str]:
        return [f"{stem}.{i}.{part}" for i in range(len(self.layers)) for part in ("key", "value")]


def _positions(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` [batch, tokens] for models that take them; padding, which nothing attends to, stands at 0."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}


def _tokens(model: "PreTrainedModel", batch: int, sequence: int) -> Tensor:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    tokens = torch.randint(0, int(rows), (batch, sequence), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.device)


@torch.no_grad()
def _cache_shapes(model: "PreTrainedModel") -> list[tuple[int, int, int]]:
    """(heads, key size, value size) of every layer's cache, found by running one token.

    Raises:
        ExportError: the model keeps something else than a growing list of keys and values.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    output = model(input_ids=_tokens(model, 1, 1), past_key_values=cache, use_cache=True)
    found = getattr(output, "past_key_values", None)
    if found is not cache or not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ExportError(
            f"{type(model).__name__} has no plain key/value cache (recurrent states, or none at all); "
            "export it without kv_cache"
        )
    if (window := getattr(model.config, "sliding_window", None)) and getattr(model.config, "use_sliding_window", True):
        raise ExportError(
            f"{type(model).__name__} attends to a sliding window of {window} tokens, which an exported cache does not "
            "cut; export it without kv_cache"
        )
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]

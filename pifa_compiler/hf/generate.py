"""Greedy text from a causal language model, eager or compiled, with its time taken; for the command line."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache


_MOST_GRAPHS_IN_A_ROW = 4
"""Steps that may each make a new graph before it is said that all will: the first do, for one reason or another."""


@dataclass(frozen=True)
class Generated:
    """What was written, and how long that took.

    Attributes:
        tokens: the new token ids.
        seconds: from the call to the last token, compilation included.
        step_seconds: of each token after the first, which comes from the pass over the prompt.
    """

    tokens: list[int]
    seconds: float
    step_seconds: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tokens": len(self.tokens), "seconds": self.seconds}


def prompt_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int
) -> Tensor:
    """The prompt as token ids [1, n] on the model's device, special ones added as the tokenizer does it.

    Raises:
        ConfigError: it has no tokens, or leaves no room for the new ones.
    """
    tokens = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64, device=model.device)
    if tokens.shape[1] == 0:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; write a longer one")
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens.shape[1] + max_new_tokens > longest:
        raise ConfigError(
            f"the model takes at most {longest} tokens at once, got {tokens.shape[1]} of the prompt and "
            f"{max_new_tokens} new ones; lower --max-new-tokens"
        )
    return tokens


def compile_step(model: "PreTrainedModel", backend: str) -> Callable[..., Any]:
    """The model compiled for `generate`: one graph, for one token and a cache of fixed size.

    A new size of the cache is a new graph; the pass over the prompt is not compiled, it runs once and for any length.
    """
    return torch.compile(model, backend=backend, dynamic=False)


def static_cache(model: "PreTrainedModel", length: int) -> "StaticCache":
    """A key/value cache of fixed size for `length` tokens, which one compiled graph serves at every token.

    All layers keep all tokens, those of sliding attention too, whose masks hide what lies outside their window.
    transformers' own sliding layers count tokens in a Python integer, which makes a graph of its own for every token.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if isinstance(layer, StaticSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    prompt: Tensor,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    step: Callable[..., Any] | None = None,
    stop: bool = True,
) -> Generated:
    """Writes greedily until the end of the text or for `max_new_tokens`.

    Args:
        model: a causal language model.
        prompt: token ids [1, n].
        max_new_tokens: at most so many.
        progress: called with (tokens done, tokens at most).
        step: what to take every token after the first from, see `compile_step`; None is the model itself.
        stop: whether an end-of-text token ends it.

    Raises:
        ConfigError: the model has no key/value cache.
        CaptureError: `step` cannot be compiled, or not once for all tokens.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._dynamo.utils import counters
    from torch._inductor.exc import InductorError

    cache: Any = None if step is None else static_cache(model, prompt.shape[1] + max_new_tokens)
    take_step: Callable[..., Any] = model if step is None else step  # a compiled module has no truth value
    ends = _end_tokens(model) if stop else set()
    tokens: list[int] = []
    step_seconds: list[float] = []
    compiled_in_a_row = 0
    started = time.perf_counter()
    output = model(input_ids=prompt, past_key_values=cache, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ConfigError(f"{type(model).__name__} returns no key/value cache; only models with one are supported here")
    while True:
        newest = output.logits[:, -1:].argmax(dim=-1)
        tokens.append(int(newest))
        if progress is not None:
            progress(len(tokens), max_new_tokens)
        if len(tokens) == max_new_tokens or tokens[-1] in ends:
            return Generated(tokens, time.perf_counter() - started, step_seconds)
        before, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            output = take_step(input_ids=newest, past_key_values=cache, use_cache=True)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(
                f"torch.compile failed ({reason}); is there a C++ compiler? Or run without it"
            ) from error
        step_seconds.append(time.perf_counter() - before)
        compiled_in_a_row = compiled_in_a_row + 1 if counters["stats"]["unique_graphs"] > graphs else 0
        if compiled_in_a_row == _MOST_GRAPHS_IN_A_ROW:
            raise CaptureError(
                f"{type(model).__name__} compiles to a new graph for every token ({compiled_in_a_row} so far), which "
                "takes longer than it saves; run without --compile"
            )


def _end_tokens(model: "PreTrainedModel") -> set[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found) if isinstance(found, list) else set() if found is None else {int(found)}

"""Greedy text from a causal language model, eager or compiled, with its time taken; for the command line."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """What was written, and how long that took.

    Attributes:
        tokens: the new token ids.
        seconds: from the call to the last token.
        decode_seconds: without the prompt's pass, which gives the first token.
    """

    tokens: list[int]
    seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"tokens": len(self.tokens), "seconds": self.seconds, "tokens_per_second": self.tokens_per_second}


def prompt_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int
) -> Tensor:
    """The prompt as token ids [1, n], special ones added as the tokenizer does it.

    Raises:
        ConfigError: it has no tokens, or leaves no room for the new ones.
    """
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert isinstance(tokens, Tensor)  # noqa: S101 -- narrows the type
    if tokens.shape[-1] == 0:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; write a longer one")
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens.shape[-1] + max_new_tokens > longest:
        raise ConfigError(
            f"the model takes at most {longest} tokens at once, got {tokens.shape[-1]} of the prompt and "
            f"{max_new_tokens} new ones; lower --max-new-tokens"
        )
    return tokens.long()


def compile_decoding(model: "PreTrainedModel", backend: str) -> None:
    """Has every later call of the model compiled.

    Together with `generate`, whose cache keeps its size, two graphs are enough: the prompt's pass, and one token.
    """
    model.compile(backend=backend, dynamic=False)


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    prompt: Tensor,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    stop: bool = True,
) -> Generated:
    """Writes greedily until the end of the text or for `max_new_tokens`.

    Args:
        model: a causal language model.
        prompt: token ids [1, n].
        max_new_tokens: at most so many.
        progress: called with (tokens done, tokens at most).
        stop: whether an end-of-text token ends it.

    Raises:
        ConfigError: the model's cache cannot be given a fixed size.
    """
    raise NotImplementedError

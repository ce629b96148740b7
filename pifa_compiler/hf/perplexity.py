"""Perplexity, as the compression literature measures it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CalibrationError, ConfigError

_ROWS = 256
"""Positions whose cross entropy is taken at once: only so many rows of the model's logits are copied to float32."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean cross entropy of a predicted token.
        tokens: how many tokens were predicted.
        windows, seqlen: how many windows, and of what length.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> PerplexityResult:
    """exp of the mean cross entropy over windows of text, in float32.

    Each window stands alone: its first token is given, each later one predicted from those before it in the window.

    Args:
        model: a causal language model: [1, seqlen] token ids -> logits [1, seqlen, vocabulary], bare or as `.logits`.
        windows: token ids, each [1, seqlen], of one length; see `evaluation_batches`.
        progress: called with (windows done, windows in all) after each.

    Raises:
        ConfigError: there are no windows, or not of one shape [1, 2 or more].
        CalibrationError: the model's logits are not finite.
    """
    shapes = {tuple(window.shape) for window in windows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] != 1 or shape[1] < 2:
        raise ConfigError(
            f"perplexity needs windows of one shape [1, 2 or more tokens], got {sorted(shapes) or 'none'}"
        )
    seqlen = shape[1]
    parameter = next(iter(model.parameters()), torch.empty(0))
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for done, window in enumerate(windows, start=1):
            ids = window.to(parameter.device)
            loss = _cross_entropy(_logits(model, ids)[0, :-1], ids[0, 1:])
            if math.isnan(loss):
                raise CalibrationError(
                    f"window {done} of {len(windows)}: the model's logits hold NaN or Inf; check its weights, and use "
                    "bfloat16 or float32 where float16 overflows"
                )
            total += loss
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(was_training)
    tokens = len(windows) * (seqlen - 1)
    mean = total / tokens
    return PerplexityResult(math.exp(mean) if mean < 709 else math.inf, tokens, len(windows), seqlen)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    # A key/value cache would only be filled and thrown away; modules that are no Hugging Face models have none.
    options: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    output = model(ids, **options)
    logits = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
    assert isinstance(logits, Tensor)  # noqa: S101 -- narrows the type
    return logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """Summed cross entropy of `targets` [n] under `logits` [n, vocabulary]."""
    total = torch.zeros((), dtype=torch.float64)
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="sum").double().cpu()
    return float(total)

"""Attention under a causal mask as causal attention, which computes half as much and gives the same.

A captured graph spells the causal mask out, since `torch.export` cannot know that it always is one. The values show it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known = WeakTensorKeyDictionary()
"""What was found of masks that still exist: all layers of a model read one mask, and nothing writes into it."""


def without_causal_mask(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `aten.scaled_dot_product_attention`, `is_causal` in the place of a mask that says the same."""
    query, key, value, *rest = args
    named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **kwargs}
    mask = named.get("attn_mask")
    if isinstance(mask, Tensor) and query.shape[-2] == key.shape[-2] and _is_causal(mask):
        named |= {"attn_mask": None, "is_causal": True}
    return (query, key, value), named


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask [..., tokens, tokens] lets every token see itself and all before it, and nothing else."""
    known: bool | None = _known.get(mask)
    if known is None:
        known = _known[mask] = _looks_causal(mask)
    return known


def _looks_causal(mask: Tensor) -> bool:
    if mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
        return False
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return torch.equal(mask, causal.expand_as(mask))

"""Where a captured model predicts tokens, known by what it does and not by its class."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .capture import Captured
from .run import Values, ancestors, one_by_one, run_block

_TOKENS = ("decoder_input_ids", "input_ids", "labels")
"""Inputs that predictions may be made after. An encoder-decoder without the first makes it of the last."""


@dataclass(frozen=True)
class Predictions:
    """Where a graph takes token ids [batch, tokens] and where its logits [batch, tokens, vocabulary] are."""

    tokens: Node
    logits: Node


def find_predictions(captured: Captured) -> Predictions | str:
    """Where a captured model takes tokens and predicts the next ones, or why it predicts none.

    A causal language model, or the decoder of an encoder-decoder, is known by what it does: its logits at a token stay
    the same when a later token changes.
    """
    if captured.parts:
        return "the model was captured in parts, which its predictions do not follow from"
    graph = captured.graph.graph
    by_node = dict(zip(graph.find_nodes(op="placeholder"), captured.inputs[0], strict=True))
    whole = [node for node, value in by_node.items() if _is_token_ids(value) and "mask" not in str(node.target)]
    named = [node for name in _TOKENS for node in whole if str(node.target) == name]
    candidates = named or (whole if len(whole) == 1 else [])
    if not candidates:
        return "the model is not called with token ids [batch, 2 or more tokens]"
    found = [_predictions_of(captured, tokens, by_node) for tokens in candidates]
    return next((each for each in found if isinstance(each, Predictions)), found[0])


def _predictions_of(captured: Captured, tokens: Node, by_node: Values) -> Predictions | str:
    """Where logits are that each follow from one token of `tokens` and those before it, or why there are none."""
    (output,) = captured.graph.graph.find_nodes(op="output")
    ids, logits = by_node[tokens], None
    for node in output.all_input_nodes:
        value = node.meta.get("val")
        if logits is None and isinstance(value, Tensor) and value.ndim == 3 and value.shape[2] > int(ids.max()):
            logits = node
    if logits is None:
        return "the model gives no logits [batch, tokens, vocabulary]"
    if tokens not in ancestors(logits):
        return f"its logits do not depend on {tokens.target}"
    # What a linear makes of each token's values cannot hide a later token from them.
    checked = logits.all_input_nodes[0] if logits.target is torch.ops.aten.linear.default else logits
    half = ids.shape[1] // 2
    changed = _with_other_tokens(ids, half)
    before, after = _values_of(captured, checked, [{**by_node, tokens: each} for each in (ids, changed)])
    if before.shape[:2] != ids.shape:
        return f"its output of shape {list(before.shape)} has no row for each of the tokens {list(ids.shape)}"
    rounding = 64 * torch.finfo(before.dtype).eps * float(before.abs().max())
    if not torch.allclose(before[:, :half], after[:, :half], rtol=0, atol=rounding):
        return "its logits at a token depend on later tokens, so it is no causal language model"
    return Predictions(tokens, logits)


def _with_other_tokens(ids: Tensor, start: int) -> Tensor:
    """Token ids [batch, tokens] with others from `start` on.

    Runs of one token, padding or the places of an image, stay where there is anything else, and no token comes that is
    not there.
    """
    alone = torch.ones_like(ids, dtype=torch.bool)
    same = ids[:, 1:] == ids[:, :-1]
    alone[:, 1:] &= ~same
    alone[:, :-1] &= ~same
    alone[:, :start] = False
    changed = ids.clone()
    changed[alone] = ids[alone].roll(1)
    if torch.equal(changed, ids):
        changed[:, start:] = torch.where(ids[:, start:] == 0, 1, (ids[:, start:] - 1).clamp(min=0))
    return changed


def _is_token_ids(value: Any) -> bool:
    integer = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return integer and value.ndim == 2 and value.shape[1] >= 2


@torch.no_grad()
def _values_of(captured: Captured, node: Node, calls: list[Values]) -> list[Tensor]:
    """What `node` computes from each of several inputs of the graph."""
    for block in one_by_one(captured.weights, captured.blocks(node)):
        calls = [run_block(captured.weights, block, values) for values in calls]
    return [values[node] for values in calls]

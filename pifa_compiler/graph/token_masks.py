"""Which tokens of the calibration batches count: padding is found by the masks that a model is called with.

A mask says something about the inputs that it goes with and what is computed from them: `decoder_attention_mask` about
the decoder's tokens, `attention_mask` about the others. Which values are which is read off the captured graph. Where a
mask cannot be laid over a value (frames that a convolution made of samples), that is noted and never passed over.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .picked_tokens import find_picks

_MASK = re.compile(r"(?:(?P<stream>\w+)_)?(?P<kind>attention_mask|key_padding_mask)")
_UNCLEAR = ("mask", "padding_mask")
"""Names under which some models want the tokens that count and others the padding."""

_LATER_FIRST = ("decoder", "tgt", "", "src", "encoder", "memory")
"""A value that is made of several streams has the tokens of the first of these: a decoder reads the encoder as well."""

_LAYERS_NAMED = 8
"""Linears that a note names; of a deep model they are all alike."""

_NO_LABEL = -100
"""A label at which nothing is to be predicted: padding of a decoder that is called without a mask of its own."""

_HIDDEN = -1e4
"""What additive masks add to hide a token: this, or the least number of their dtype."""


@dataclass(frozen=True)
class _Stream:
    """Inputs that one mask is about.

    Attributes:
        mask: the mask's name; None if the model is called without one.
        tokens: for every batch [batch, tokens], True at those that count; None where all do.
        count: how many tokens a batch has, in the symbols of the graph; None if that is not known.
    """

    mask: str | None
    tokens: Sequence[Tensor | None]
    count: str | None


class TokenMasks:
    """The tokens that count, for every value of a graph.

    Args:
        graph: the captured graph.
        inputs: for every batch one value per placeholder, in order.

    Attributes:
        picks: values whose rows are tokens that the model picks.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Sequence[Any]]) -> None:
        self.picks = find_picks(graph)
        placeholders = graph.graph.find_nodes(op="placeholder")
        given = {node: [values[place] for values in inputs] for place, node in enumerate(placeholders)}
        given = {node: values for node, values in given.items() if all(isinstance(value, Tensor) for value in values)}
        self._unclear: list[str] = []
        self._unfitted: dict[str, list[str]] = {}
        masks: dict[str, tuple[Node, Sequence[Tensor | None]]] = {}
        labelled: tuple[Node, Sequence[Tensor | None]] | None = None
        for node, values in given.items():
            name = str(node.target)
            found = _MASK.fullmatch(name)
            if found is not None:
                read = [_tokens_of(value, inverted=found["kind"] == "key_padding_mask") for value in values]
                if any(isinstance(each, str) for each in read):
                    self._unclear.append(f"{name} {list(values[0].shape)}: {next(e for e in read if type(e) is str)}")
                else:
                    masks[found["stream"] or ""] = (node, [each for each in read if not isinstance(each, str)])
            elif name == "labels" and values[0].ndim == 2 and any(bool((value == _NO_LABEL).any()) for value in values):
                labelled = (node, [value != _NO_LABEL for value in values])
            elif name in _UNCLEAR:
                self._unclear.append(f"{name}: pass attention_mask, 1 at tokens that count, where the model takes one")
        if labelled is not None:
            masks.setdefault("decoder", labelled)
        self._streams = {
            stream: _Stream(str(node.target), tokens, _count_of(node)) for stream, (node, tokens) in masks.items()
        }
        self._stream_of = _streams_by_node(graph, given, masks)

    def rows(
        self, node: Node, batch: int, lead: Sequence[int], layers: Iterable[str] = (), picked: Tensor | None = None
    ) -> Tensor | None:
        """Which rows of a value count, [rows], or None where all do.

        Args:
            node: what computes the value.
            batch: the index of the calibration batch.
            lead: the value's shape without its last dimension, the channels; rows are all of it in one.
            layers: the linears that read the value, for the note if the mask does not fit it.
            picked: of a value in `picks`, which tokens its rows are, [rows].
        """
        stream = self._streams.get(self._stream_of.get(node, "none"))
        tokens = None if stream is None else stream.tokens[batch]
        if stream is None or tokens is None or tuple(lead) in ((), (tokens.shape[0],)):  # one row a sample: pooled
            return None
        if node in self.picks:
            fits = picked is not None and stream.count == _size_of(self.picks[node].source)
            laid = tokens.reshape(-1)[picked] if fits else None
        else:
            laid = _lay(tokens, tuple(lead))
        if laid is None:
            known = self._unfitted.setdefault(str(stream.mask), [])
            known += [layer for layer in layers if layer not in known]
        return laid

    def notes(self) -> list[str]:
        """What of the masks could not be used, so far, for the report."""
        found = [
            f"padding, if there is any, was calibrated on, as a mask is not understood: {e}" for e in self._unclear
        ]
        for mask, layers in self._unfitted.items():
            found.append(
                f"padding, if there is any, was calibrated on in {len(layers)} linears whose inputs have other rows "
                f"than {mask}: {_names(layers)}"
            )
        return found


def _count_of(mask: Node) -> str | None:
    """How many tokens a batch has, by a mask [batch, tokens] or [batch, .., tokens], in the symbols of its graph."""
    value = mask.meta.get("val")
    return str(value.shape[0] * value.shape[-1]) if isinstance(value, Tensor) and value.ndim >= 2 else None


def _size_of(source: Node) -> str | None:
    value = source.meta.get("val")
    return str(value.shape[0]) if isinstance(value, Tensor) and value.ndim == 2 else None


def _names(layers: Sequence[str]) -> str:
    more = len(layers) - _LAYERS_NAMED
    return ", ".join(layers[:_LAYERS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _streams_by_node(
    graph: GraphModule,
    given: Mapping[Node, Sequence[Tensor]],
    masks: Mapping[str, tuple[Node, Sequence[Tensor | None]]],
) -> dict[Node, str]:
    """The stream of each node; nodes that read none of the inputs that masks are about are left out."""
    mask_nodes = {node for node, _ in masks.values() if node.target != "labels"}  # a decoder's tokens come of those
    prefixes = {"decoder", "tgt", *masks} - {""}
    sources: dict[str, list[Node]] = {}
    for node in given:
        name = str(node.target)
        if node not in mask_nodes:
            stream = max((p for p in prefixes if name == p or name.startswith(f"{p}_")), key=len, default="")
            sources.setdefault("decoder" if name == "labels" else stream, []).append(node)
    reads: dict[Node, frozenset[str]] = {}
    for stream, nodes in sources.items():
        if stream in masks:  # of images and text only the text has the mask's shape
            tokens = masks[stream][1]
            nodes = [node for node in nodes if _is_about(tokens, given[node])] or nodes
        for node in nodes:
            reads[node] = reads.get(node, frozenset()) | {stream}
    for node in graph.graph.nodes:
        reads[node] = reads.get(node, frozenset()).union(*(reads[parent] for parent in node.all_input_nodes))
    rank = {stream: place for place, stream in enumerate(_LATER_FIRST)}
    return {node: min(sorted(found), key=lambda s: rank.get(s, len(rank))) for node, found in reads.items() if found}


def _is_about(tokens: Sequence[Tensor | None], values: Sequence[Tensor]) -> bool:
    pairs = zip(tokens, values, strict=True)
    return any(mask is not None and value.shape[:2] == mask.shape for mask, value in pairs)


def _lay(tokens: Tensor, lead: tuple[int, ...]) -> Tensor | None:
    """A mask [batch, tokens] over a value of leading dimensions `lead`, one entry a row; None if it does not fit."""
    batch, count = tokens.shape
    if lead == (count, batch) and count != batch:
        return tokens.T.reshape(-1)
    if len(lead) == 3 and lead[0] == batch and lead.count(count) == 1 and lead[1:].count(count) == 1:  # heads
        one_head = tokens[:, :, None] if lead[1] == count else tokens[:, None, :]
        return one_head.expand(lead).reshape(-1)
    return tokens.reshape(-1) if torch.Size(lead).numel() == tokens.numel() else None


def _tokens_of(mask: Tensor, *, inverted: bool) -> Tensor | str | None:
    """The tokens that count, [batch, tokens] bool; None if all do; why it cannot be said.

    Args:
        mask: [batch, tokens], or what hides tokens from attention: [batch, 1, 1, tokens], [batch, heads, tokens,
            tokens] or [batch, tokens, tokens]; bool, 0 and 1, or added to attention scores.
        inverted: whether 1 marks padding, as torch's own attention modules have it.
    """
    visible = _visible(mask, inverted=inverted)
    if isinstance(visible, str):
        return visible
    if visible.ndim == 4:
        if not torch.equal(visible, visible[:, :1].expand_as(visible)):
            return "it differs from head to head"
        visible = visible[:, 0]
    if visible.ndim == 3:
        if visible.shape[1] not in (1, visible.shape[2]):
            return "it is neither [.., 1, tokens] nor [.., tokens, tokens]"
        found = visible[:, 0] if visible.shape[1] == 1 else _tokens_seen(visible)
        if found is None:
            return "tokens see others that neither padding nor causality explains"
        visible = found
    if visible.ndim != 2:
        return "it is not [batch, tokens]"
    return None if bool(visible.all()) else visible


def _visible(mask: Tensor, *, inverted: bool) -> Tensor | str:
    """Where a mask of any dtype lets something be seen, as bool."""
    if not mask.is_floating_point():
        return (mask == 0) if inverted else (mask != 0)
    if bool(((mask == 0) | (mask <= _HIDDEN)).all()):
        return mask == 0  # added to scores; all zeros hide nothing
    if bool(((mask == 0) | (mask == 1)).all()):
        return (mask == 0) if inverted else (mask == 1)
    return "its numbers are neither 0 and 1 nor 0 and -10000 or less"


def _tokens_seen(visible: Tensor) -> Tensor | None:
    """Tokens that count, [batch, tokens], of who sees whom, [batch, tokens, tokens]; None if that is not clear.

    A token that counts sees itself, and none that does not count. In causal masks a padding token may see all, since a
    row of attention without anything to see would be no number.
    """
    counts = visible.diagonal(dim1=1, dim2=2)
    if bool(((visible == counts[:, None, :]) | ~counts[:, :, None]).all()):
        return counts  # every one that counts sees just those that count
    causal = torch.ones(visible.shape[1:], dtype=torch.bool, device=visible.device).tril()
    last = torch.arange(visible.shape[2], device=visible.device) == visible.shape[2] - 1
    counts = counts & (~visible.all(dim=2) | last)
    allowed = causal & counts[:, None, :]
    return counts if bool((~visible | allowed | ~counts[:, :, None]).all()) else None

"""Tokens that a model picks while it runs: an expert computes those that the router sends to it, how many that are.

In a captured graph they are rows of a value, selected by indices whose number only a run shows. What is computed from
them, row by row, are rows of the same tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Pick:
    """What the rows of a value are.

    Attributes:
        tokens: which rows of `source` they are, [rows], int64, ascending.
        source: all tokens, [tokens, channels].
    """

    tokens: Node
    source: Node


def find_picks(graph: GraphModule) -> dict[Node, Pick]:
    """The values of a graph whose rows are tokens that were picked."""
    found: dict[Node, Pick] = {}
    for node in graph.graph.nodes:
        rows = _rows(node)
        if rows is None:
            continue
        if node.target is torch.ops.aten.index_select.default and node.args[1] == 0 and _rows(node.args[2]) == rows:
            found[node] = Pick(node.args[2], node.args[0])
            continue
        for parent in node.all_input_nodes:
            if parent in found and rows == _rows(found[parent].tokens):
                found[node] = found[parent]
    return found


def choices(tokens: Node) -> int | None:
    """How many experts a token goes to, by what says which tokens one of them gets; None if that is not seen."""
    node = tokens
    while node.target is not torch.ops.aten.eq.Scalar:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.ndim == 2 else None


def _rows(node: Node) -> str | None:
    """The number of rows of a value, a symbol, if it depends on what was computed before."""
    value = node.meta.get("val")
    size: object = value.shape[0] if isinstance(value, Tensor) and value.ndim > 0 else None
    return str(size) if isinstance(size, torch.SymInt) and not size.node.has_hint() else None

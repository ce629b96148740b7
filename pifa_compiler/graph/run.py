"""Running a captured graph node by node, or in blocks: for passes over it that look at values on the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from ..errors import CalibrationError, PifaError
from .causal_attention import without_causal_mask
from .weights import Weights

Values = dict[Node, Any]


def call(node: Node, value: Callable[[Node], Any]) -> Any:
    """What a node computes, its arguments looked up by `value`; a causal mask runs as causal attention.

    Raises:
        CalibrationError: the node calls no function, or its function refuses its arguments.
    """
    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    target = _INSTEAD.get(node.target, node.target)
    if not callable(target):
        raise CalibrationError(f"the captured graph calls {node.op} {node.target}, which cannot be run node by node")
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        args, kwargs = without_causal_mask(args, kwargs)
    try:
        return target(*args, **kwargs)
    except (torch.OutOfMemoryError, PifaError):
        raise  # RuntimeErrors as well; the first says nothing about the model
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise CalibrationError(
            f"{node.name} of the captured graph, {node.target}, cannot be computed: {error}"
        ) from error


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten.copy`, which has no derivative: `source` in the shape, strides, dtype and place of `x`."""
    return torch.empty_like(x).copy_(source, non_blocking=non_blocking)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return torch.masked_scatter(x, mask, source.to(x.dtype))


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return torch.index_add(x, dim, index, source.to(x.dtype))


_INSTEAD: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.view.default: torch.reshape,
    torch.ops.aten.masked_scatter.default: _masked_scatter,
    torch.ops.aten.index_add.default: _index_add,
}
"""What runs in the place of operations of functional graphs that cannot be differentiated, or that hold only for the
strides and dtypes they were captured with: in bfloat16, or with gradients, attention gives others."""


def call_node(weights: Weights, node: Node, values: Values) -> Any:
    """What a node computes from `values` and what it reads of `weights`."""

    def value(argument: Node) -> Any:
        return weights.read(str(argument.target)) if argument.op == "get_attr" else values[argument]

    return call(node, value)


def weights_of(nodes: Iterable[Node]) -> set[str]:
    """The names of all weights that nodes read."""
    return {str(read.target) for node in nodes for read in node.all_input_nodes if read.op == "get_attr"}


def ancestors(*nodes: Node, known: Set[Node] = frozenset()) -> set[Node]:
    """All that nodes are computed from, the nodes themselves among them; but for `known`, and what they come from."""
    found = set(nodes) - known
    pending = list(found)
    while pending:
        new = set(pending.pop().all_input_nodes) - found - known
        found |= new
        pending += new
    return found


@dataclass(frozen=True)
class Block:
    """Nodes that are computed together.

    Attributes:
        nodes: in the order of the graph.
        outputs: values that something after the block reads.
        unread: by node, the values that nothing reads any more once it is computed.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    unread: Mapping[Node, list[Node]]


def cut_into_blocks(gm: GraphModule, last: Node, count: int) -> list[Block]:
    """Cuts what `last` needs into about `count` blocks, where few values cross."""
    needed = ancestors(last)
    nodes = [node for node in gm.graph.nodes if node in needed and node.op not in ("placeholder", "get_attr")]
    position = {node: index for index, node in enumerate(nodes)}
    final = {
        node: max((position[user] for user in node.users if user in position), default=-1)
        for node in [*gm.graph.find_nodes(op="placeholder"), *nodes]
    }
    crossing = [0] * len(nodes)
    for node in nodes:
        whole = not isinstance(node.meta.get("val"), tuple | list)
        for index in range(position[node], final[node]):
            crossing[index] += 1 if whole else len(nodes)  # gradients are kept for tensors, not for lists of them
    cuts, size = [0], max(len(nodes) // count, 1)
    while len(nodes) - cuts[-1] > 1.5 * size:
        reach = range(cuts[-1] + max(size // 2, 1), cuts[-1] + size + size // 2 + 1)
        cuts.append(min(reach, key=lambda index: (crossing[index - 1], abs(index - cuts[-1] - size))))
    cuts.append(len(nodes))
    unread: dict[Node, list[Node]] = {}
    for node, at in final.items():
        if at >= 0:
            unread.setdefault(nodes[at], []).append(node)
    blocks = []
    for start, end in pairwise(cuts):
        outputs = tuple(node for node, at in final.items() if at >= end and position.get(node, -1) < end)
        blocks.append(Block(tuple(nodes[start:end]), (*outputs, *((last,) if end == len(nodes) else ())), unread))
    return blocks


def one_by_one(weights: Weights, blocks: Sequence[Block]) -> Iterator[Block]:
    """Blocks in turn: weights of the next are on their way while one is computed, which gives its own back then."""
    for index, block in enumerate(blocks):
        if index + 1 < len(blocks):
            weights.expect(weights_of(blocks[index + 1].nodes))
        yield block
        weights.give_back()


def run_block(
    weights: Weights, block: Block, values: Values, seen: Callable[[Node, Any], None] | None = None
) -> Values:
    """Computes a block from the values that cross into it; what crosses out of it."""
    values = dict(values)
    for node in block.nodes:
        values[node] = call_node(weights, node, values)
        if seen is not None:
            seen(node, values)
        for each in block.unread.get(node, ()):
            values.pop(each, None)
    return {node: values[node] for node in block.outputs if node in values}

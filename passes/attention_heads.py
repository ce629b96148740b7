"""Heads of attention in a graph: which outputs of a linear are one head's values or keys, and what reads them.

Attention is known by what it computes, not by names: probabilities times values, and queries times keys. Between these
products and linears there are operations that only move numbers (view, transpose, split, cat, ...). These are run on
numbers that say where each comes from, so that every layout of heads is understood, and each reader of a head is seen.

A change of basis within a head goes unseen: values' = C^-1 values, if the linears that read the mixed values have C in
their columns; keys' = C^-1 keys and queries' = C^T queries, since only their products are used. Whatever stands between
(RoPE, a norm, a gate) is another reader, and a reason to leave the head as it is.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from .rewrite import Skip

aten = torch.ops.aten

_LINEAR = (aten.linear.default, torch.ops.pifa.linear.default)
_ATTENTION = (aten.scaled_dot_product_attention.default, F.scaled_dot_product_attention)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")

_MOVES = {
    *("view", "reshape", "_unsafe_view", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flatten"),
    *("unflatten", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "repeat"),
    *("repeat_interleave", "movedim", "swapaxes", "swapdims", "index_select", "slice_scatter"),
}
"""Operators, functions and methods by name: every number of their result is one of an operand's numbers."""

_KEEPS = {"clone", "contiguous", "alias", "detach", "_to_copy", "to", "float", "half", "bfloat16", "double", "type_as"}
"""Those whose result has the first operand's numbers in their places, in another dtype or layout perhaps."""

_ASKS = {"new_empty", "new_zeros", "empty_like", "zeros_like", "size", "sym_size", "_assert_tensor_metadata", "dim"}
"""Those that use no number of their operand."""


@dataclass(frozen=True)
class Reader:
    """A linear that takes up the inverse of a head's change of basis.

    Attributes:
        node: the linear.
        kind: "columns" if it reads the mixed values, "rows" if it makes the queries.
        places: which columns, or rows, of its weight belong to the head's channels, in their order.
    """

    node: Node
    kind: Literal["columns", "rows"]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """One head's values or keys.

    Attributes:
        role: which of the two.
        rows: the outputs of the linear that are its channels, in their order.
        readers: what takes up the inverse.
    """

    role: Literal["values", "keys"]
    rows: tuple[int, ...]
    readers: tuple[Reader, ...]


@dataclass
class Heads:
    """The heads that one linear makes.

    Attributes:
        free: those whose basis may be changed.
        left: for a role, why its heads are left.
    """

    free: list[Head] = field(default_factory=list)
    left: dict[str, Skip] = field(default_factory=dict)


def find_heads(gm: GraphModule) -> dict[Node, Heads]:
    """The linears of a canonical graph that make values or keys, in the graph's order, and their heads.

    Needs the sizes that captures leave at their nodes; what has sizes that vary is left.
    """
    walk = _Walk(gm)
    found: dict[Node, Heads] = {}
    for use in walk.uses:
        heads = use.heads(walk)
        entry = found.setdefault(use.source, Heads())
        if isinstance(heads, Skip):
            entry.left[use.role] = heads
        else:
            entry.free += heads
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    return {node: found[node] for node in sorted(found, key=position.__getitem__)}


@dataclass
class _Origin:
    """Where numbers come from: a linear's outputs, or what attention mixed.

    The number at flat index i is channel i % width of token i // width.
    """

    node: Node
    base: int
    end: int
    width: int
    others: dict[int, str] = field(default_factory=dict)  # by channel, who else reads it

    def read(self, ids: Tensor, reader: str) -> None:
        for channel in ((ids - self.base) % self.width).unique().tolist():
            self.others.setdefault(channel, reader)


@dataclass
class _Use:
    """One product that uses the channels of a linear: of probabilities with values, or of queries with keys."""

    role: Literal["values", "keys"]
    source: Node
    origin: _Origin
    channels: Tensor  # [products, head], of the origin
    queries: tuple[_Origin, Tensor] | None = None
    mixed: _Origin | None = None

    def heads(self, walk: "_Walk") -> list[Head] | Skip:
        rows = [tuple(each) for each in self.channels.tolist()]
        readers: dict[tuple[int, ...], dict[Reader, None]] = {}
        if self.queries is not None:
            origin, channels = self.queries
            for row, each in zip(rows, channels.tolist(), strict=True):
                readers.setdefault(row, {})[Reader(origin.node, "rows", tuple(each))] = None
            queries = [reader.places for each in readers.values() for reader in each]
            taken = _why_taken(origin, queries)
            if taken is not None:
                return Skip(f"queries: {taken}")
        else:
            assert self.mixed is not None  # noqa: S101  one of the two
            if self.mixed.others:
                return Skip(f"{next(iter(self.mixed.others.values()))} stands between attention and a linear")
            for linear, ids in walk.reads.get(self.mixed.node, []):
                blocks = _blocks(ids, self.mixed, self.mixed.node, rows)
                if isinstance(blocks, Skip):
                    return blocks
                for row, columns in blocks:
                    readers.setdefault(row, {})[Reader(linear, "columns", columns)] = None
            if set(readers) != set(rows):
                return Skip("no linear reads what attention gives")
        taken = _why_taken(self.origin, list(readers))
        if taken is not None:
            return Skip(taken)
        return [Head(self.role, row, tuple(each)) for row, each in sorted(readers.items())]


def _why_taken(origin: _Origin, heads: Sequence[tuple[int, ...]]) -> str | None:
    """Why channels are not those of these heads alone."""
    channels = [channel for head in heads for channel in head]
    if len(set(channels)) < len(channels):
        return "heads share channels"
    return next((f"{origin.others[channel]} reads them too" for channel in channels if channel in origin.others), None)


def _blocks(
    ids: Tensor, mixed: _Origin, node: Node, rows: Sequence[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]] | Skip:
    """Which columns of a linear read which head, of numbers [tokens, in]: pairs (the head's rows, columns)."""
    unclear = Skip(f"the heads that {node.name} gives are not read whole, one token by one")
    own = (ids >= mixed.base) & (ids < mixed.end)
    columns = own[0].nonzero().squeeze(-1)
    if not torch.equal(own, own[:1].expand_as(own)):
        return unclear
    relative = ids[:, columns] - mixed.base
    channel, token = relative % mixed.width, relative // mixed.width
    order = torch.argsort(token[0] * mixed.width + channel[0])
    columns, channel, token = columns[order], channel[:, order], token[:, order]
    if len(columns) % mixed.width:
        return unclear
    tokens = (mixed.end - mixed.base) // mixed.width // len(rows)
    token = token.unflatten(1, (-1, mixed.width))
    product = token[..., 0] // tokens  # [tokens, blocks]
    whole = bool((channel.unflatten(1, (-1, mixed.width)) == torch.arange(mixed.width)).all())
    if not whole or not bool((token == token[..., :1]).all()):
        return unclear
    number = {row: index for index, row in enumerate(dict.fromkeys(rows))}
    head = torch.tensor([number[row] for row in rows])[product]
    if not bool((head == head[:1]).all()):
        return unclear
    blocks = columns.unflatten(0, (-1, mixed.width)).tolist()
    return iter([(rows[int(index)], tuple(block)) for index, block in zip(product[0], blocks, strict=True)])


class _Walk:
    """Follows numbers through a graph, from the linears near attention on.

    Attributes:
        uses: products that use them.
        reads: for what attention gives, the linears that read it, and the numbers they read, [tokens, in].
    """

    def __init__(self, gm: GraphModule) -> None:
        self.uses: list[_Use] = []
        self.reads: dict[Node, list[tuple[Node, Tensor]]] = {}
        self._origins: list[_Origin] = []
        self._ids: dict[Node, Any] = {}
        sources = _sources(gm)
        for node in gm.graph.nodes:
            if any(operand in self._ids for operand in node.all_input_nodes):
                self._meet(node)
            if node in sources:
                self._start(node, node.meta["val"].shape if "val" in node.meta else node.meta["example_value"].shape)

    def _start(self, node: Node, shape: Sequence[int]) -> _Origin:
        base = self._origins[-1].end if self._origins else 0
        count = torch.Size(shape).numel()
        self._ids[node] = torch.arange(base, base + count).view(*shape)
        self._origins.append(_Origin(node, base, base + count, int(shape[-1])))
        return self._origins[-1]

    def _meet(self, node: Node) -> None:
        name, target = _name(node), node.target
        args: tuple[Any, ...] = node.args
        if name in _ASKS:
            return
        if name in _KEEPS or _is_scaled(node):
            first = args[0] if name in _KEEPS else node.all_input_nodes[0]
            if first in self._ids:
                self._ids[node] = self._ids[first]
            return
        if name in _MOVES or name == "copy" or target is operator.getitem:
            moved = self._move(node, name)
            if moved is not None:
                self._ids[node] = moved
                return
        elif target in _LINEAR and args[0] in self._ids:
            ids = self._ids[args[0]]
            origins = self._origins_of(ids)
            if ids.shape[-1] > 0 and all(origin.node.target not in _LINEAR for origin in origins):
                for origin in origins:
                    self.reads.setdefault(origin.node, []).append((node, ids.flatten(0, -2)))
                self._read(node, node.all_input_nodes[1:])
                return
        elif target in _ATTENTION:
            query, key, value, *rest = _operands(node)
            self._multiply(node, query, key)
            self._mix(node, value, query)
            self._read(node, rest)
            return
        elif target in _PRODUCTS and len(args) == 2:
            first, second = args
            if second in self._ids and first not in self._ids:
                self._mix(node, second, first)
                return
            if second in self._ids:
                self._multiply(node, first, second, transposed=True)
                return
        self._read(node, node.all_input_nodes)

    def _read(self, node: Node, operands: Iterable[Any]) -> None:
        """Notes that a node does with numbers what is not understood."""
        for operand in operands:
            for ids in _leaves(self._ids.get(operand)):
                for origin in self._origins_of(ids):
                    origin.read(ids[(ids >= origin.base) & (ids < origin.end)], node.name)

    def _origins_of(self, ids: Tensor) -> list[_Origin]:
        bases = torch.tensor([origin.base for origin in self._origins])
        known = ids[ids >= 0]
        return [self._origins[index - 1] for index in torch.bucketize(known, bases, right=True).unique().tolist()]

    def _move(self, node: Node, name: str) -> Any:
        """The numbers that a node gives; None if its arguments or the sizes are not known."""

        def value(operand: Node) -> Any:
            if operand in self._ids:
                return self._ids[operand]
            held = operand.meta.get("val", operand.meta.get("example_value"))
            if isinstance(held, Tensor):
                # An index is no number that is moved, and its values are not known.
                return torch.full(_fixed(held.shape), -1) if held.is_floating_point() else None
            return held if isinstance(held, int) else None

        try:
            operands = {operand: value(operand) for operand in node.all_input_nodes}
            if any(held is None for held in operands.values()):
                return None
            moved: Any = torch.fx.map_arg((node.args, node.kwargs), operands.__getitem__)
            args, kwargs = moved
            if name == "copy":
                return args[1].expand(args[0].shape)
            if name in ("view", "_unsafe_view"):  # memory has no say here
                return args[0].reshape(*args[1:])
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)  # noqa: S101  a function
            return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):  # sizes that are symbols
            return None

    def _multiply(self, node: Node, query: Node, key: Node, *, transposed: bool = False) -> None:
        """Queries times keys: [.., tokens, channels] each, the keys' transposed if so."""
        if query not in self._ids or key not in self._ids:
            self._read(node, (query, key))
            return
        of_keys = self._ids[key].transpose(-2, -1) if transposed else self._ids[key]
        pair = _by_product(self._ids[query], of_keys)
        found = [None if ids is None else self._channels(ids) for ids in pair]
        if found[0] is None or found[1] is None:
            self._read(node, (query, key))
            return
        (queries, q_channels), (keys, k_channels) = found[0], found[1]
        both = (q_channels >= 0) & (k_channels >= 0)
        if not bool(both.any()) or not torch.equal(both, both[:1].expand_as(both)):
            self._read(node, (query, key))
            return
        places = both[0].nonzero().squeeze(-1)
        use = _Use("keys", keys.node, keys, k_channels[:, places], queries=(queries, q_channels[:, places]))
        self._claim(use, keys, use.channels, node)
        self._claim(use, queries, q_channels[:, places], node)
        for origin, channels in ((queries, q_channels), (keys, k_channels)):
            for channel in channels[:, ~both[0]].unique().tolist():
                if channel >= 0:
                    origin.others.setdefault(channel, node.name)
        self.uses.append(use)

    def _mix(self, node: Node, value: Node, other: Node) -> None:
        """Probabilities, or whatever does not depend on the values, times values [.., tokens, channels]."""
        if value not in self._ids:
            return
        held = node.meta.get("val", node.meta.get("example_value"))
        batch = held.shape[:-2] if isinstance(held, Tensor) else None
        pair = None if batch is None else _over_products(self._ids[value], batch)
        found = None if pair is None else self._channels(pair)
        if found is None or held is None or bool((found[1] < 0).any()):
            self._read(node, (value,))
            return
        origin, channels = found
        mixed = self._start(node, held.shape)
        use = _Use("values", origin.node, origin, channels, mixed=mixed)
        self._claim(use, origin, channels, node)
        self.uses.append(use)

    def _claim(self, use: _Use, origin: _Origin, channels: Tensor, node: Node) -> None:
        """A channel that two products use is free in neither."""
        for other in self.uses:
            known = [(other.origin, other.channels), *([other.queries] if other.queries else [])]
            for held, taken in known:
                if held is origin:
                    for channel in set(taken.flatten().tolist()) & set(channels.flatten().tolist()):
                        origin.others.setdefault(channel, node.name)
        if origin is use.origin and use.queries is not None and use.queries[0] is origin:
            for channel in set(use.channels.flatten().tolist()) & set(use.queries[1].flatten().tolist()):
                origin.others.setdefault(channel, node.name)

    def _channels(self, ids: Tensor) -> tuple[_Origin, Tensor] | None:
        """Of numbers [products, tokens, head]: the channels [products, head], the same for all tokens; -1 is none.

        None unless they come from one linear, and at each place those of one token stand together.
        """
        known = ids >= 0
        origins = self._origins_of(ids)
        if len(origins) != 1 or origins[0].node.target not in _LINEAR or 0 in ids.shape:
            return None
        (origin,) = origins
        channels = torch.where(known, (ids - origin.base) % origin.width, -1)
        token = (ids - origin.base) // origin.width
        least = torch.where(known, token, origin.end).amin(-1, keepdim=True)
        most = torch.where(known, token, -1).amax(-1, keepdim=True)
        alike = torch.equal(channels, channels[:, :1].expand_as(channels))
        return (origin, channels[:, 0]) if alike and torch.equal(least, most) else None


def _sources(gm: GraphModule) -> set[Node]:
    """The linears from which only operations that move numbers lead to a product."""
    found: set[Node] = set()
    pending: list[Node] = []
    for node in gm.graph.nodes:
        if node.target in _ATTENTION or node.target in _PRODUCTS:
            pending += node.all_input_nodes
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.target == aten.linear.default:
            if _fixed_shape(node) is not None:
                found.add(node)
        elif _name(node) in _MOVES | _KEEPS | {"copy"} or node.target is operator.getitem or _is_scaled(node):
            pending += [operand for operand in node.all_input_nodes if operand not in seen]
            seen |= set(node.all_input_nodes)
    return found


def _fixed_shape(node: Node) -> tuple[int, ...] | None:
    held = node.meta.get("val", node.meta.get("example_value"))
    try:
        return _fixed(held.shape) if isinstance(held, Tensor) else None
    except TypeError:
        return None


def _fixed(shape: Sequence[Any]) -> tuple[int, ...]:
    """Sizes as numbers; a TypeError if one is a symbol."""
    if not all(isinstance(size, int) for size in shape):
        raise TypeError("a size is a symbol")
    return tuple(shape)


def _name(node: Node) -> str:
    """The name of the operator, function or method that a node calls; "" for any other node."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2] if target.namespace == "aten" else ""
    module = str(getattr(target, "__module__", None) or type(target).__module__)
    of_torch = module.partition(".")[0] == "torch" or getattr(torch, getattr(target, "__name__", ""), None) is target
    return str(getattr(target, "__name__", "")) if of_torch else ""


def _is_scaled(node: Node) -> bool:
    """Whether a node multiplies or divides a tensor by a number, or is a dropout that does nothing."""
    if _name(node) == "dropout" or node.target is F.dropout:
        return node.kwargs.get("training", node.args[2] if len(node.args) == 3 else None) is False
    multiplies = node.target is operator.mul or _name(node) == "mul"
    if not (multiplies or node.target is operator.truediv or _name(node) == "div") or len(node.args) != 2:
        return False
    first, second = node.args
    if multiplies and isinstance(first, int | float):
        first, second = second, first
    return isinstance(first, Node) and isinstance(second, int | float) and not node.kwargs


def _operands(node: Node) -> list[Any]:
    """Query, key and value of an attention, and its other operands."""
    named = dict(zip(("query", "key", "value"), node.args, strict=False))
    named |= {key: value for key, value in node.kwargs.items() if key in ("query", "key", "value")}
    main = [named["query"], named["key"], named["value"]]
    return [*main, *(operand for operand in node.all_input_nodes if operand not in main)]


def _leaves(ids: Any) -> Iterator[Tensor]:
    if isinstance(ids, Tensor):
        yield ids
    elif isinstance(ids, list | tuple):
        for each in ids:
            yield from _leaves(each)


def _by_product(first: Tensor, second: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Two operands [.., tokens, channels], as [products, tokens, channels]; heads that several share are repeated."""
    batch = max(first.shape[:-2], second.shape[:-2], key=lambda shape: torch.Size(shape).numel())
    return _over_products(first, batch), _over_products(second, batch)


def _over_products(ids: Tensor, batch: Sequence[int]) -> Tensor | None:
    if ids.ndim < 3:
        return ids[None] if not batch else None
    groups = batch[-1] // ids.shape[-3] if batch and ids.shape[-3] else 1
    if groups > 1 and ids.shape[-3] > 1:
        ids = ids.repeat_interleave(groups, dim=-3)
    try:
        return ids.expand(*batch, *ids.shape[-2:]).flatten(0, -3)
    except RuntimeError:
        return None

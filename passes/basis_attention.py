"""BasisAttention: heads of attention in a basis of inputs, d x d numbers less for each head, and nothing lost.

    v = linear(x, W_v)  ..  linear(attention(q, k, v), W_o)    ->  v' = pifa::basis_linear(x, .., R, ..)  ..  W_o'
    q = linear(x, W_q), k = linear(x, W_k)  ..  q k^T          ->  k' = pifa::basis_linear(x, .., R, ..), q' by W_q'

with R = C^-1 W_v,others for each head, C = W_v,inputs, and W_o' = W_o C; for keys W_q' = C^T W_q (`head_basis`). Keys
and queries between which there is RoPE or a norm stay, and so does the rotated part of others (`find_heads`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import RankError
from ..head_basis import HeadBasis, change_columns, change_rows, find_bases, in_basis
from ..kernels import basis_linear as _registers_the_operator  # noqa: F401
from .attention_heads import Head, Heads, find_heads
from .rewrite import Rewrite, Skip
from .weights import COMPUTED, Weight, read_weight, store_tensor, tensor_at

aten = torch.ops.aten

_LINEAR = (aten.linear.default, torch.ops.pifa.linear.default)


@dataclass(frozen=True)
class Layout:
    """The outputs of a linear: those in front that stay as they are, and heads of equal width one behind the other.

    Attributes:
        heads: in the order of their outputs.
        plain: the number of outputs in front of them.
    """

    heads: tuple[Head, ...]
    plain: int

    def rows_of(self, weight: Tensor) -> Tensor:
        """The rows [heads, d, in] of a weight [out, in]."""
        rows: Tensor = weight[self.plain :].unflatten(0, (len(self.heads), -1))
        return rows


def layout_of(found: Heads, d_out: int, d_in: int) -> Layout | Skip:
    """Which heads of a linear [d_out, d_in] can be in a basis together: all that are free, or those of one role."""
    reason = next(iter(found.left.values()), Skip("heads are as wide as the input"))
    for role in (("values", "keys"), ("values",), ("keys",)):
        heads = sorted((head for head in found.free if head.role in role), key=lambda head: head.rows[0])
        if not heads:
            continue
        width = len(heads[0].rows)
        start = d_out - len(heads) * width
        rows = [row for head in heads for row in head.rows]
        if any(len(head.rows) != width for head in heads) or rows != list(range(start, d_out)):
            reason = Skip("its heads are not of one width, one behind the other at the end of its outputs")
        elif width < d_in:
            return Layout(tuple(heads), start)
    return reason


@dataclass(frozen=True)
class _Found:
    layout: Layout
    bases: Sequence[HeadBasis]
    weights: Mapping[Node, Weight]  # of the linear and of its readers
    biases: Mapping[Node, Tensor | None]


class BasisAttention(Rewrite):
    """Linears that make values or keys -> a product with fewer inputs, added to some of the inputs themselves."""

    targets = (aten.linear.default,)
    _heads: Mapping[Node, Heads]

    def candidates(self, gm: GraphModule) -> Iterable[Node]:
        """The linears that make values or keys."""
        self._heads = find_heads(gm)
        return self._heads

    def match(self, gm: GraphModule, node: Node) -> _Found | Skip:
        """The heads, their bases, and the weights that change with them."""
        own = read_weight(gm, node.args[1])
        if isinstance(own, Skip):
            return own
        layout = layout_of(self._heads[node], *own.tensor.shape)
        if isinstance(layout, Skip):
            return layout
        uses = Counter(_name_of_weight(linear) for linear in gm.graph.nodes if linear.target in _LINEAR)
        weights, biases = {node: own}, {}
        for linear in dict.fromkeys((node, *(reader.node for head in layout.heads for reader in head.readers))):
            weight = COMPUTED if linear._erased else read_weight(gm, linear.args[1])
            bias = None if linear._erased else _bias_of(linear)
            biases[linear] = None if bias is None else tensor_at(gm, bias)
            if isinstance(weight, Skip) or (bias is not None and biases[linear] is None):
                return Skip(f"{linear.name}: {weight.reason if isinstance(weight, Skip) else 'bias is computed'}")
            if uses[_name_of_weight(linear)] > 1:
                return Skip(f"{weight.name} is used more than once")
            weights[linear] = weight
        try:
            bases = find_bases(layout.rows_of(own.tensor))
        except RankError as error:
            return Skip(str(error))
        return _Found(layout, bases, weights, biases)

    def rewrite(self, gm: GraphModule, node: Node, found: _Found) -> Node:
        """Writes the changes into the readers' weights, and the linear as products with the rests."""
        exact = {linear: weight.tensor.double().clone() for linear, weight in found.weights.items()}
        biases = {linear: None if bias is None else bias.double().clone() for linear, bias in found.biases.items()}
        changes = torch.cat([basis.change for basis in found.bases])
        for head, change in zip(found.layout.heads, changes, strict=True):
            for reader in head.readers:
                if reader.kind == "columns":
                    change_columns(exact[reader.node], reader.places, change)
                else:
                    change_rows(exact[reader.node], biases[reader.node], reader.places, change)
        for linear, weight in found.weights.items():
            if linear is node:
                continue
            with gm.graph.inserting_before(linear):
                new = exact[linear].to(weight.tensor.dtype)
                linear.update_arg(1, store_tensor(gm, weight.name, "in_basis", new))
                bias, held = _bias_of(linear), found.biases[linear]
                changed = biases[linear]
                if (
                    isinstance(bias, Node)
                    and changed is not None
                    and held is not None
                    and linear.target in self.targets
                ):
                    linear.update_arg(2, store_tensor(gm, str(bias.target), "in_basis", changed.to(held.dtype)))
        own = found.weights[node]
        plain, rest, order, bias = in_basis(exact[node], biases[node], found.layout.plain, found.bases)

        def stored(name: str, value: Tensor | None) -> Node | None:
            if value is None or not len(value):
                return None
            return store_tensor(gm, own.name, name, value.to(own.tensor.dtype) if value.is_floating_point() else value)

        tensors = (stored("plain", plain), stored("rest", rest), stored("order", order), stored("bias", bias))
        return gm.graph.call_function(torch.ops.pifa.basis_linear.default, (node.args[0], *tensors))


def _name_of_weight(linear: Node) -> str:
    weight: Any = linear.args[1]
    weight = weight.args[0] if isinstance(weight, Node) and weight.target is aten.t.default else weight
    return str(weight.target) if isinstance(weight, Node) else ""


def _bias_of(linear: Node) -> Any:
    place = 4 if linear.target is torch.ops.pifa.linear.default else 2
    return linear.args[place] if len(linear.args) > place else None

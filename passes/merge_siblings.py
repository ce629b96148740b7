"""MergeSiblings: linears in PIFA form on the same input (query, key and value; gate and up) share their products.

    pifa::linear_cpu(x, w1, c1, o1), pifa::linear_cpu(x, w2, c2, o2)
        ->  y = pifa::linear_siblings_cpu(x, [w1, w2], [c1, c2], [o1, o2]); y[0], y[1]

    pifa::linear_gemm(x, w1, c1), pifa::linear_gemm(x, w2, c2)
        ->  z, n = pifa::linear_siblings_gemm(x, [w1, w2], [c1, c2]); cat(z_1, n_1), cat(z_2, n_2)

    the same of one shape, over many tokens
        ->  y = pifa::linear_siblings_batched(x, [w1, w2], [c1, c2]); y[..., 0, :], y[..., 1, :]

    pifa::linear_triton(x, w1, c1, o1, b1), pifa::linear_triton(x, w2, c2, o2, b2)
        ->  y = pifa::linear_siblings_triton(x, [w1, w2], [c1, c2], [o1, o2], [b1, b2]); y[0], y[1]

It works on what `Lower` leaves. On CPUs, for one or a few tokens, the call itself is a good part of a small layer's
time, and all threads stream the pivot rows together, then the coefficients. On GPUs two launches take the place of two
for every sibling, and fill the chip; Inductor fuses what is behind them. For GEMMs the pivot rows are moved in memory,
one behind the other, and so are the coefficients: the model's own tensors, so that nothing is held twice. Over many
tokens siblings of several shapes stay apart where an order is undone: from two buffers it takes two reads of all.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import linear_cpu as _defines_cpu  # noqa: F401
from ..kernels.linear_siblings_gemm import GROUPED_TOKENS
from ..kernels.side_by_side import lay_side_by_side, may_be_laid
from .effects import writes_between
from .lower import hint_of
from .rewrite import Rewrite, Skip
from .weights import tensor_at, value_of

aten, pifa = torch.ops.aten, torch.ops.pifa

_TRITON = "pifa.linear_triton.default"
"""By name: its operator is there once a graph has it."""


@dataclass(frozen=True)
class _Found:
    siblings: list[Node]  # in the order of the graph
    w_pivots: list[Tensor]
    coeffs: list[Tensor]
    batched: bool = False


class MergeSiblings(Rewrite):
    """Several linears of one device form on one x -> one operator for all of them."""

    targets = (pifa.linear_cpu.default, pifa.linear_gemm.default)
    is_about_speed_only = True

    def candidates(self, gm: GraphModule) -> list[Node]:
        """Calls of the forms that have an operator for siblings."""
        return [node for node in gm.graph.nodes if node.op == "call_function" and self._is_one(node)]

    def match(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        """The linears to merge with `node`, itself first; None if it has none behind it."""
        x = node.all_input_nodes[0]
        siblings = sorted(user for user in x.users if user.target == node.target and user.args[0] is x)
        if len(siblings) < 2 or siblings[0] is not node:
            return None
        operands = {operand for sibling in siblings for operand in sibling.all_input_nodes[1:]}
        if any(operand.op not in ("get_attr", "placeholder") for operand in operands):
            return Skip("siblings stay apart: a weight is computed in the graph")
        if writes_between(node, siblings[-1]):
            return Skip("siblings stay apart: the graph may write in place between them")
        look = tensor_at if node.target == pifa.linear_gemm.default else value_of
        weights = [[look(gm, sibling.args[place]) for sibling in siblings] for place in (1, 2)]
        w_pivots, coeffs = ([t for t in column if t is not None] for column in weights)
        if node.target != pifa.linear_cpu.default and len(w_pivots) + len(coeffs) < 2 * len(siblings):
            return Skip("siblings stay apart: their weights are not known")
        if node.target == pifa.linear_gemm.default and not (may_be_laid(w_pivots) and may_be_laid(coeffs)):
            return Skip("siblings stay apart: their weights cannot be moved, others use the same memory")
        if node.target == pifa.linear_gemm.default and _has_many_tokens(gm, x):
            batched = len({(w.shape, c.shape) for w, c in zip(w_pivots, coeffs, strict=True)}) == 1
            ordered = any(user.target is aten.index_select.default for each in siblings for user in each.users)
            if not batched and ordered:
                return Skip("siblings stay apart: of several shapes, over many tokens, with orders to undo")
            return _Found(siblings, w_pivots, coeffs, batched)
        return _Found(siblings, w_pivots, coeffs)

    def rewrite(self, gm: GraphModule, node: Node, found: _Found) -> Node:
        """Calls the joint operator at the first sibling's place and takes its results apart."""
        operands = [[self._at_hand(gm, arg) for arg in sibling.args[1:]] for sibling in found.siblings]
        w_pivots, coeffs, *others = (list(column) for column in zip(*operands, strict=True))
        x = node.args[0]
        numbers = range(len(found.siblings))
        if node.target == pifa.linear_gemm.default:
            lay_side_by_side(found.w_pivots)
            lay_side_by_side(found.coeffs)
            products = pifa.linear_siblings_batched if found.batched else pifa.linear_siblings_gemm
            joint = gm.graph.call_function(products.default, (x, w_pivots, coeffs))
            if found.batched:
                results = [gm.graph.call_function(aten.select.int, (joint, -2, i)) for i in numbers]
            else:
                results = _taken_apart(gm, joint, found)
        else:
            joint = gm.graph.call_function(_whole_of(node), (x, w_pivots, coeffs, *others))
            results = [gm.graph.call_function(operator.getitem, (joint, i)) for i in numbers]
        results[0]._rename(str(joint.target).split(".")[1])  # records name what stands there by its form
        for sibling, result in zip(found.siblings[1:], results[1:], strict=True):
            result.meta = dict(sibling.meta)
            sibling.replace_all_uses_with(result)
            gm.graph.erase_node(sibling)
        return results[0]

    def _is_one(self, node: Node) -> bool:
        return node.target in self.targets or str(node.target) == _TRITON

    def _at_hand(self, gm: GraphModule, arg: Any) -> Any:
        """The operand where the first sibling stands: attributes are read again there, inputs precede every call."""
        if not isinstance(arg, Node) or arg.op == "placeholder":
            return arg
        again = gm.graph.get_attr(str(arg.target))
        again.meta = dict(arg.meta)
        return again


def _has_many_tokens(gm: GraphModule, x: Node) -> bool:
    value = value_of(gm, x)
    numbers = None if value is None else hint_of(value.numel() // value.shape[-1])
    return numbers is not None and numbers > GROUPED_TOKENS


def _whole_of(node: Node) -> Any:
    """The operator that does all that siblings such as `node` do, orders and biases too."""
    if node.target == pifa.linear_cpu.default:
        return pifa.linear_siblings_cpu.default
    from ..kernels import linear_triton_siblings as _defines_triton  # noqa: F401  imports triton

    return pifa.linear_siblings_triton.default


def _taken_apart(gm: GraphModule, joint: Node, found: _Found) -> list[Node]:
    """What each sibling gives, from all y_p side by side and all y_n side by side."""

    def call(target: Any, *args: Any) -> Node:
        return gm.graph.call_function(target, args)

    z, rest = (call(operator.getitem, joint, part) for part in (0, 1))
    results, from_z, from_rest = [], 0, 0
    for w_pivot, coeff in zip(found.w_pivots, found.coeffs, strict=True):
        end_z, end_rest = from_z + w_pivot.shape[0], from_rest + coeff.shape[0]
        parts = [call(aten.slice.Tensor, z, -1, from_z, end_z), call(aten.slice.Tensor, rest, -1, from_rest, end_rest)]
        results.append(call(aten.cat.default, parts, -1))
        from_z, from_rest = end_z, end_rest
    return results

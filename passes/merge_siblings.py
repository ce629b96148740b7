"""MergeSiblings: linears in PIFA form on the same input (query, key and value; gate and up) become one call.

    pifa::linear_cpu(x, w1, c1, o1), pifa::linear_cpu(x, w2, c2, o2)
        ->  y = pifa::linear_siblings_cpu(x, [w1, w2], [c1, c2], [o1, o2]); y[0], y[1]

It works on what `Lower` leaves on CPUs. For one or a few tokens the call itself is a good part of a small layer's time,
and all threads stream the pivot rows together, then the coefficients. For many tokens the native code runs one first
GEMM over the joint pivot rows where these are few. Whether it pays on GPUs has not been measured.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..kernels import linear_cpu as _defines_the_operator  # noqa: F401
from .effects import writes_between
from .rewrite import Rewrite, Skip

pifa = torch.ops.pifa


class MergeSiblings(Rewrite):
    """Several pifa::linear_cpu on one x -> one pifa::linear_siblings_cpu."""

    targets = (pifa.linear_cpu.default,)
    is_about_speed_only = True

    def match(self, gm: GraphModule, node: Node) -> list[Node] | Skip | None:
        """The linears to merge with `node`, itself first; None if it has none behind it."""
        x = node.all_input_nodes[0]
        siblings = sorted(user for user in x.users if user.target in self.targets and user.args[0] is x)
        if len(siblings) < 2 or siblings[0] is not node:
            return None
        operands = {operand for sibling in siblings for operand in sibling.all_input_nodes[1:]}
        if any(operand.op not in ("get_attr", "placeholder") for operand in operands):
            return Skip("siblings stay apart: a weight is computed in the graph")
        if writes_between(node, siblings[-1]):
            return Skip("siblings stay apart: the graph may write in place between them")
        return siblings

    def rewrite(self, gm: GraphModule, node: Node, found: list[Node]) -> Node:
        """Calls the joint operator at the first sibling's place and takes its results apart."""
        operands = [[self._at_hand(gm, arg) for arg in sibling.args[1:]] for sibling in found]
        w_pivots, coeffs, orders = (list(column) for column in zip(*operands, strict=True))
        joint = gm.graph.call_function(pifa.linear_siblings_cpu.default, (node.args[0], w_pivots, coeffs, orders))
        results = [gm.graph.call_function(operator.getitem, (joint, index)) for index in range(len(found))]
        for sibling, result in zip(found[1:], results[1:], strict=True):
            result.meta = dict(sibling.meta)
            sibling.replace_all_uses_with(result)
            gm.graph.erase_node(sibling)
        return results[0]

    def _at_hand(self, gm: GraphModule, arg: Any) -> Any:
        """The operand where the first sibling stands: attributes are read again there, inputs precede every call."""
        if not isinstance(arg, Node) or arg.op == "placeholder":
            return arg
        again = gm.graph.get_attr(str(arg.target))
        again.meta = dict(arg.meta)
        return again

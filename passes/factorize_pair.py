"""FactorizePair: linear(linear(x, V), U, b) -> pifa::linear(x, w_pivot, coeff, order, b)."""

import torch
from torch.fx import GraphModule, Node

from ..errors import RankError
from ..factors import PifaFactors, factorize_losslessly, stored_numbers
from ..kernels import linear as _registers_the_operator  # noqa: F401
from .effects import writes_between
from .rewrite import Rewrite, Skip
from .weights import SUBCLASS, Weight, is_subclass, read_weight, release, store_factors

aten = torch.ops.aten


class FactorizePair(Rewrite):
    """linear(linear(x, V), U, b), V [r, in], U [out, r] -> pifa::linear(x, w_pivot, coeff, order, b)."""

    targets = (aten.linear.default,)

    def match(self, gm: GraphModule, node: Node) -> tuple[Weight, PifaFactors] | Skip | None:
        """The second weight, in whose place the factors go, and the factors."""
        inner = node.args[0]
        if not isinstance(inner, Node) or inner.target is not aten.linear.default:
            return None
        u, v = read_weight(gm, node.args[1]), read_weight(gm, inner.args[1])
        if isinstance(u, Skip):
            return u
        if isinstance(v, Skip):
            return v
        if len(inner.users) > 1:
            return Skip("the value between the two linears has another user")
        if is_subclass(gm, inner.args[0]):
            return SUBCLASS
        if writes_between(inner, node):  # to the input perhaps, which would be read later than before
            return Skip("the graph may write in place between the two linears")
        if len(inner.args) > 2 and inner.args[2] is not None:
            return Skip("there is a bias between the two linears")
        if u.tensor.dtype is not v.tensor.dtype or u.tensor.device != v.tensor.device:
            return Skip("the two weights differ in dtype or device")
        (d_out, width), d_in = u.tensor.shape, v.tensor.shape[1]
        if width >= min(d_out, d_in):
            return Skip(f"the pair is not low-rank: width {width} between {d_in} inputs and {d_out} outputs")
        try:
            factors = factorize_losslessly((u.tensor, v.tensor))
        except RankError as error:
            return Skip(str(error))
        pair, pifa = width * (d_out + d_in), stored_numbers(d_out, d_in, factors.rank)
        if pifa >= pair:
            return Skip(f"PIFA would store {pifa} numbers at rank {factors.rank}, the pair stores {pair}")
        return u, factors

    def rewrite(self, gm: GraphModule, node: Node, found: tuple[Weight, PifaFactors]) -> Node:
        """Stores the factors and calls `pifa::linear` on them."""
        u, factors = found
        bias = node.args[2] if len(node.args) > 2 else None
        stored = store_factors(gm, u.name, factors)
        x = node.all_input_nodes[0].args[0]
        new = gm.graph.call_function(torch.ops.pifa.linear.default, (x, *stored, bias))
        release(gm, node)
        return new

"""Lower: pifa::linear -> the form that is fastest on the device and at the shape at hand.

`FORMS` names the choices of every device type; the plain subgraph, which is the operator's own body, is what every
backend sees where no form is named. Forms are parts of the graph, so the compiler fuses them with what surrounds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import linear as _registers_the_operator  # noqa: F401
from .rewrite import Rewrite, Skip
from .weights import tensor_at

aten = torch.ops.aten

Build = Callable[[GraphModule, Node, int], Node]


@dataclass(frozen=True)
class Case:
    """What a form is chosen by.

    Attributes:
        device: type of the device, such as "cpu".
        dtype: of the weights.
        rank: rows of w_pivot.
        d_out: output features.
        tokens: rows of x, or of the example that was traced where they vary; None if unknown.
        ordered: whether the stored order differs from the output order.
    """

    device: str
    dtype: torch.dtype
    rank: int
    d_out: int
    tokens: int | None
    ordered: bool


def gather_from_both(gm: GraphModule, node: Node, rank: int) -> Node:
    """Reads every output row out of the product that holds it; the products are never joined in one buffer."""
    x, w_pivot, coeff, order, bias = node.args
    call = gm.graph.call_function
    y_pivot = call(aten.linear.default, (x, w_pivot))
    y_other = call(aten.linear.default, (y_pivot, coeff))
    from_pivot = call(aten.index_select.default, (y_pivot, -1, call(aten.clamp.default, (order, None, rank - 1))))
    place = call(aten.clamp.default, (call(aten.sub.Tensor, (order, rank)), 0))
    from_other = call(aten.index_select.default, (y_other, -1, place))
    y = call(aten.where.self, (call(aten.lt.Scalar, (order, rank)), from_pivot, from_other))
    return y if bias is None else call(aten.add.Tensor, (y, bias))


def choose_cpu(case: Case) -> Build | Skip:
    """The form on a CPU, by measurement under Inductor (r = d/2, one core; times relative to the plain subgraph)."""
    if case.tokens is None or case.tokens > 8:
        return Skip("plain subgraph: as fast as any other form at this many tokens")
    return gather_from_both


FORMS: Mapping[str, Callable[[Case], Build | Skip]] = {"cpu": choose_cpu}


class Lower(Rewrite):
    """pifa::linear -> the form that `FORMS` chooses; a `Skip` says why it stays the plain subgraph.

    Args:
        gradients: whether the graph will be differentiated; the plain subgraph is used then.
    """

    targets = (torch.ops.pifa.linear.default,)

    def __init__(self, *, gradients: bool = False) -> None:
        self.gradients = gradients

    def match(self, gm: GraphModule, node: Node) -> tuple[Build, int] | Skip:
        if self.gradients:
            return Skip("plain subgraph: gradients are needed")
        case = _case(gm, node)
        if case is None:
            return Skip("plain subgraph: the shapes of the factors are unknown")
        if case.device not in FORMS:
            return Skip(f"plain subgraph: no other form on {case.device}")
        if not case.ordered or case.rank == case.d_out:
            return Skip("plain subgraph: there is no row order to undo")
        build = FORMS[case.device](case)
        return build if isinstance(build, Skip) else (build, case.rank)

    def rewrite(self, gm: GraphModule, node: Node, found: tuple[Build, int]) -> Node:
        build, rank = found
        return build(gm, node, rank)


def _case(gm: GraphModule, node: Node) -> Case | None:
    x, w_pivot, coeff, order, _ = node.args
    pivot_value, coeff_value, result = _value(gm, w_pivot), _value(gm, coeff), _value(gm, node)
    if pivot_value is None or coeff_value is None:
        return None
    rank, d_out = pivot_value.shape[0], pivot_value.shape[0] + coeff_value.shape[0]
    tokens = None if result is None else _hint(result.numel()) // d_out
    return Case(pivot_value.device.type, pivot_value.dtype, rank, d_out, tokens, order is not None)


def _value(gm: GraphModule, node: Any) -> Tensor | None:
    """A tensor of the node's shape, dtype and device: its own value, or the fake one that the capture left."""
    value = tensor_at(gm, node)
    if value is None:
        value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def _hint(number: int | torch.SymInt) -> int:
    return int(number.node.hint) if isinstance(number, torch.SymInt) else number

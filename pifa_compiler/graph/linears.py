"""The linears of a captured graph: the names of their weights, and how often each is read."""

from collections import Counter

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import linear  # noqa: F401  registers pifa::linear
from .weights import Weights


def weight_name(node: Node) -> str:
    """State-dict name of a linear node's weight; the name of the node that computes it, if one does."""
    weight = node.args[1]
    if isinstance(weight, Node) and weight.target is torch.ops.aten.t.default:
        weight = weight.args[0]
    return str(weight.target) if isinstance(weight, Node) and weight.op == "get_attr" else str(weight)


def read_weight(weights: Weights, node: Node) -> Tensor:
    """The weight [out, in] of a canonical linear node that reads one."""
    found: Tensor = weights.read(weight_name(node))
    return found.T if is_transposed(node) else found


def is_transposed(node: Node) -> bool:
    """Whether a canonical linear node reads its weight from storage of shape [in, out]."""
    weight = node.args[1]
    return isinstance(weight, Node) and weight.target is torch.ops.aten.t.default


def linears_in_order(graph: GraphModule) -> list[str]:
    """Names of the layers whose weights the graph's linears read, in the order of their first use."""
    return [name.removesuffix(".weight") for name in linears_by_weight(graph)]


def linears_by_weight(graph: GraphModule) -> dict[str, tuple[Node, ...]]:
    """The dense linears of the graph that read each weight, in order, by its state-dict name."""
    found: dict[str, list[Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        found.setdefault(weight_name(node), []).append(node)
    return {name: tuple(nodes) for name, nodes in found.items()}


def uses_of_weights(graph: GraphModule) -> Counter[str]:
    """How many linears of the graph, dense or in PIFA form, read each weight, by its state-dict name."""
    targets = (torch.ops.aten.linear.default, torch.ops.pifa.linear.default)
    return Counter(weight_name(node) for node in graph.graph.nodes if node.target in targets)

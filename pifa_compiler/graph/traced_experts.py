"""Experts in a captured graph: the first of a module is traced, and its nodes are copied for the others.

Tracing takes a fraction of a second for an expert, and a model may have thousands, which differ in nothing but their
weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import CaptureError


class TracedExperts(nn.Module):
    """Experts with layers of their own, which are computed one after the other.

    Attributes:
        num_experts: how many there are.
        projections: names of the children that hold layers, each an `nn.ModuleList` of one for every expert.
    """

    num_experts: int
    projections: tuple[str, ...]
    _first_only: bool = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], the others [tokens, k] -> [tokens, hidden], as of the experts."""
        result = torch.zeros_like(hidden_states)
        for expert in range(1 if self._first_only else self.num_experts):
            routed = top_k_index == expert
            tokens = routed.any(dim=1).nonzero().squeeze(1)
            shares = (top_k_weights * routed).sum(dim=1).index_select(0, tokens)
            y = self.compute(expert, hidden_states.index_select(0, tokens)) * shares.unsqueeze(1)
            result = result.index_add(0, tokens, y.to(result.dtype))
        return result

    def layers(self, projection: str) -> nn.ModuleList:
        """The layers of all experts."""
        found = self._modules[projection]
        assert isinstance(found, nn.ModuleList)  # noqa: S101  that is what these children are
        return found

    def compute(self, expert: int, x: Tensor) -> Tensor:
        """What an expert makes of its tokens, [tokens, hidden]."""
        raise NotImplementedError


@contextmanager
def first_expert_only(model: nn.Module) -> Iterator[None]:
    """While it lasts, all experts of `model` but the first of each module are neither there nor computed."""
    found = [module for module in model.modules() if isinstance(module, TracedExperts)]
    layers = [{name: module.layers(name) for name in module.projections} for module in found]
    try:
        for module, held in zip(found, layers, strict=True):
            module._first_only = True
            module._modules.update({name: nn.ModuleList([each[0]]) for name, each in held.items()})
        yield
    finally:
        for module, held in zip(found, layers, strict=True):
            module._first_only = False
            module._modules.update(held)


def copy_first_expert(graph: GraphModule, model: nn.Module) -> None:
    """Completes a graph that was captured under `first_expert_only`, in place.

    The number of tokens that an expert gets is one symbol for all of a module; nothing but its own rows has it.

    Raises:
        CaptureError: the nodes of the first expert are not those of `TracedExperts.forward`.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, TracedExperts)}
    for end in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.index_add.default):
        path, _ = next(reversed((end.meta.get("nn_module_stack") or {"": ("", "")}).values()))
        if path in found:
            _copy(graph, found[path], path, end)
    if found:
        graph.recompile()


def _copy(graph: GraphModule, experts: TracedExperts, path: str, end: Node) -> None:
    """Copies the nodes that add the first expert's output to the result, up to `end`, which adds it."""
    first = _nodes_of_first(end, path)
    start, behind, readers, last = end.args[0], end.next, list(end.users), end
    for expert in range(1, experts.num_experts):
        made: dict[Node, Node] = {start: last}  # type: ignore[dict-item]  # `_nodes_of_first` has looked
        with graph.graph.inserting_before(behind):
            for node in first:
                for read in node.all_input_nodes:
                    name = _of_expert(str(read.target), experts, path, expert)
                    if read.op == "get_attr" and name is not None:
                        made[read] = _get_attr(graph, experts, path, name, read)
                made[node] = graph.graph.node_copy(node, partial(_or_same, made))
                made[node].meta["nn_module_stack"] = {
                    key: (_of_expert(f"{place}.", experts, path, expert) or place, kind)
                    for key, (place, kind) in (node.meta.get("nn_module_stack") or {}).items()
                }
        made[first[0]].args = (first[0].args[0], expert)
        last = made[end]
    for reader in readers:
        reader.replace_input_with(end, last)


def _nodes_of_first(end: Node, path: str) -> list[Node]:
    """Of the nodes between the result that `end` adds to and `end`, those that it needs."""
    needed, found, node = {end}, list[Node](), end
    while node is not end.args[0] and node.op == "call_function":
        if node in needed:
            needed.update(node.all_input_nodes)
            found.append(node)
        node = node.prev
    if node is not end.args[0] or found[-1].target is not torch.ops.aten.eq.Scalar or found[-1].args[1] != 0:
        raise CaptureError(f"the graph of the experts {path} begins with {found[-1]}, wanted the choice of the first")
    return found[::-1]


def _of_expert(name: str, experts: TracedExperts, path: str, expert: int) -> str | None:
    """The name of what belongs to another expert as `name` does to the first; None if it does not belong to that."""
    for projection in experts.projections:
        if name.startswith(own := f"{path}.{projection}.0."):
            return f"{path}.{projection}.{expert}.{name[len(own) :]}".removesuffix(".")
    return None


def _get_attr(graph: GraphModule, experts: TracedExperts, path: str, name: str, first: Node) -> Node:
    """Reads a parameter of an expert, which the graph gets if it does not have it yet."""
    place, _, key = name.rpartition(".")
    try:
        layer = graph.get_submodule(place)
    except AttributeError:
        graph.add_submodule(place, layer := nn.Module())
    layer.register_parameter(key, experts.get_parameter(name.removeprefix(f"{path}.")))
    node = graph.graph.get_attr(name)
    node.meta = dict(first.meta)
    return node


def _or_same(made: dict[Node, Node], node: Node) -> Node:
    return made.get(node, node)

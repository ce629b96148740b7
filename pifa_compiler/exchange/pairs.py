"""Low-rank pairs: linears V and U that follow each other, U(V(x)), with nothing else that reads the values between.

A pair becomes one layer. Where a module is nothing but the pair, it stands in that module's place; elsewhere in the
place of the first linear, with an identity in that of the second, which remembers whose second it is.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node, Tracer

from ..graph.linears import uses_of_weights, weight_name
from ..linear import PifaLinear
from ..modules import bias_of, is_plain_linear, module_at, weight_of
from ..passes import Canonicalize, run_passes
from .allowed import Exchangeable, caller_of_layer, why_marked
from .enclosure import Enclosure

_SECOND_OF = "second_of"
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Pair:
    """Two linears of which the second reads what the first computes.

    Attributes:
        first, second: names of V [rank, in] and U [out, rank].
        place: name of the module that their one layer replaces: the module that is nothing but the pair, or `first`.
        reason: why they have to stay two; None if they need not.
    """

    first: str
    second: str
    place: str
    reason: str | None

    @property
    def is_whole(self) -> bool:
        """Whether the pair is all that the module at `place` is."""
        return self.place != self.first


def find_pairs(
    model: nn.Module, graph: GraphModule, exchangeable: Exchangeable, enclosure: Enclosure
) -> Iterator[Pair]:
    """The pairs that a graph shows, each linear in one of them: in one that can be one layer where there is one."""
    found = list(_all_pairs(model, graph, exchangeable, enclosure))
    taken: set[str] = set()
    for pair in sorted(found, key=lambda pair: pair.reason is not None):
        if not {pair.first, pair.second} & taken:
            taken |= {pair.first, pair.second}
            yield pair


def _all_pairs(
    model: nn.Module, graph: GraphModule, exchangeable: Exchangeable, enclosure: Enclosure
) -> Iterator[Pair]:
    uses = uses_of_weights(graph)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        inner = node.args[0]
        if not isinstance(inner, Node) or inner.target is not node.target or list(inner.users) != [node]:
            continue
        weights = [weight_name(linear) for linear in (inner, node)]
        first, second = (weight.removesuffix(".weight") for weight in weights)
        if any(uses[weight] > 1 or not is_plain_linear(module_at(model, weight[:-7])) for weight in weights):
            continue
        called_by = {caller_of_layer(inner, first), caller_of_layer(node, second)}
        place = first.rpartition(".")[0]
        whole = bool(place) and called_by == {place} and _is_nothing_else(model.get_submodule(place))
        if not whole or exchangeable.why_shared(place) is not None:
            place = first
        reason = _why_two(model, first, second)
        for name in (first, second):
            if reason is None and (left := exchangeable.why_not(name)) is not None:
                reason = f"{name}: {left}"
        reason = reason or enclosure.why_open((first,), (second,), called_by)
        yield Pair(first, second, place, reason)


def chain_of(module: nn.Module) -> tuple[str, str] | None:
    """The names of two linears if a module is a chain of them and nothing else: its forward is U(V(x))."""
    names = list(module._modules)
    if len(names) != 2 or any(True for _ in module.parameters(recurse=False)):
        return None
    if not all(is_plain_linear(child) for child in module.children()):
        return None
    if type(module) is nn.Sequential:
        return names[0], names[1]
    chains = {_traced_chain(module, training) for training in (True, False)}
    return chains.pop() if len(chains) == 1 else None


def identity_behind(first: str) -> nn.Identity:
    """What stands where the second linear of a pair stood, whose first is the child `first` of the same module."""
    identity = nn.Identity()
    setattr(identity, _SECOND_OF, first)
    return identity


def split_pairs(model: nn.Module) -> dict[str, str]:
    """The pairs of a model that are a layer and an identity, from the name of the one to that of the other."""
    found = {}
    for name, module in model.named_modules():
        first = vars(module).get(_SECOND_OF) if isinstance(module, nn.Identity) else None
        if isinstance(first, str):
            parent, _, _ = name.rpartition(".")
            path = f"{parent}.{first}" if parent else first
            if isinstance(module_at(model, path), PifaLinear):
                found[path] = name
    return found


def trace(model: nn.Module) -> GraphModule:
    """The graph of a model for any input, in evaluation mode, canonical; nothing of the model is changed.

    Raises:
        Whatever the model's own code raises when it is handed values that are not there yet.
    """
    stand_in = _structure_of(model, {})
    for module in stand_in.modules():
        module.training = False
    graph = GraphModule(stand_in, _Tracer().trace(stand_in))
    run_passes(graph, [Canonicalize()])
    return graph


class _Tracer(Tracer):
    """Traces through all but torch's own modules and layers in PIFA form."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one node of the graph."""
        return type(m) is PifaLinear or super().is_leaf_module(m, module_qualified_name)


class _PartsTracer(Tracer):
    """Traces a module's own code only: whatever it calls is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one node of the graph."""
        return True


def _structure_of(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """Modules like those of `module` that share its parameters; what their code sets is set on them."""
    if id(module) not in known:
        other = known[id(module)] = copy.copy(module)
        for table in _TABLES:
            vars(other)[table] = dict(vars(module)[table])
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else _structure_of(child, known)
    return known[id(module)]


def _traced_chain(module: nn.Module, training: bool) -> tuple[str, str] | None:
    stand_in = _structure_of(module, {})
    for part in stand_in.modules():
        part.training = training
    try:
        graph = _PartsTracer().trace(stand_in)
    except (torch.fx.proxy.TraceError, TypeError, AttributeError, ValueError, RuntimeError):
        return None  # its forward depends on values: it is more than a chain
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs, (result,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    chained = (
        len(inputs) == 1
        and [node.op for node in calls] == ["call_module", "call_module"]
        and calls[0].args == (inputs[0],)
        and calls[1].args == (calls[0],)
        and result.args == (calls[1],)
    )
    return (str(calls[0].target), str(calls[1].target)) if chained else None


def _is_nothing_else(module: nn.Module) -> bool:
    """Whether a layer can stand in a module's place: a chain with no functions, values or marks of its own."""
    kind = type(module)
    added = {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}
    own = {name for name in added if not name.startswith("__")} if kind is not nn.Sequential else set()
    values = {name for name in vars(module).keys() - vars(nn.Module()).keys() if not name.startswith("_")}
    if values or not own <= {"forward", "extra_repr", "reset_parameters"}:
        return False
    return why_marked(module) is None and chain_of(module) is not None


def _why_two(model: nn.Module, first: str, second: str) -> str | None:
    """Why the product of two linears would not be a smaller layer, by their shapes."""
    v, u = (weight_of(model.get_submodule(name)) for name in (first, second))
    if bias_of(model.get_submodule(first)) is not None:
        return "there is a bias between the two linears"
    if u.shape[1] >= min(u.shape[0], v.shape[1]):
        return f"the pair is not low-rank: width {u.shape[1]} between {v.shape[1]} inputs and {u.shape[0]} outputs"
    if u.dtype is not v.dtype or u.device != v.device:
        return "the two weights differ in dtype or device"
    return None

"""AbsorbOrder: the row order of a linear in PIFA form moves into the columns of the linears behind it.

    linear(act(pifa::linear(x, w, c, order, b)), W)                ->  linear(act(pifa::linear(x, w, c, None, b')), W')
    linear(act(pifa::linear(x, .., order)) * pifa::linear(x, .., order), W)          likewise, with one order for both

where `act` is elementwise: it does the same to every output, whatever their order. b' is the bias in stored
order and W' has the columns of W in stored order, so nothing is left to undo while the model runs. That holds between
the linears of an MLP; a residual add, RoPE or a norm in between mixes orders and keeps the gather.
"""

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ..kernels import linear as _registers_the_operator  # noqa: F401
from .effects import ELEMENTWISE_MODULES, may_write
from .rewrite import Rewrite, Skip
from .weights import constant_at, store_tensor, tensor_at, value_of

aten, pifa = torch.ops.aten, torch.ops.pifa

_LINEAR = (aten.linear.default, pifa.linear.default)
# ATen operators carry a tag that says whether they are elementwise. These are methods of tensors by name, and functions
# of torch by identity: another function of the same name may do anything.
_METHODS = {
    *("relu", "tanh", "sigmoid", "exp", "erf", "square", "sqrt", "abs", "neg", "add", "sub", "mul", "div", "pow"),
    *("clamp", "float", "double", "half", "bfloat16", "to", "type_as", "contiguous"),
}
_FUNCTIONS = {
    *(F.silu, F.gelu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.hardswish),
    *(F.hardtanh, F.hardsigmoid, F.logsigmoid, F.tanh, F.sigmoid, F.dropout),
    *(torch.relu, torch.selu, torch.celu, torch.tanh, torch.sigmoid, torch.exp, torch.erf, torch.square, torch.sqrt),
    *(torch.abs, torch.neg, torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.clamp),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.abs),
}
_MOVES_NOTHING = (aten.clone.default, aten._to_copy.default, aten.contiguous.default)


@dataclass(frozen=True)
class Site:
    """Linears whose outputs meet in elementwise operations only, and the linears that read the result.

    Attributes:
        sources: the linears in front, in graph order; all must have one row order for it to be absorbed.
        readers: the linears behind.
    """

    sources: tuple[Node, ...]
    readers: tuple[Node, ...]


def find_site(gm: GraphModule, linear: Node) -> Site | Skip:
    """The site that a linear (`aten.linear` or `pifa::linear`) is a source of, or what its order cannot pass."""
    sources: set[Node] = set()
    readers: set[Node] = set()
    seen, pending = {linear}, [linear]
    while pending:
        node = pending.pop()
        if node.target in _LINEAR:
            sources.add(node)
        else:
            for operand in node.all_input_nodes:
                if operand in seen or _is_one_for_all(gm, operand):
                    continue
                if operand.target not in _LINEAR and not _is_elementwise(operand):
                    return Skip(f"row order stays: {operand.name} joins in its own order")
                seen.add(operand)
                pending.append(operand)
        for user in node.users:
            if user.target in _LINEAR and user.args[0] is node and node not in user.args[1:]:
                readers.add(user)
            elif _is_elementwise(user):
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
            else:
                return Skip(f"row order stays: {user.name} reads the outputs in order")
    if not readers:
        return Skip("row order stays: nothing reads the outputs")
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    return Site(tuple(sorted(sources, key=position.__getitem__)), tuple(sorted(readers, key=position.__getitem__)))


def find_sites(gm: GraphModule) -> Iterator[Site]:
    """All sites of a graph."""
    known: set[Node] = set()
    for node in gm.graph.nodes:
        if node.target in _LINEAR and node not in known:
            site = find_site(gm, node)
            if isinstance(site, Site):
                known.update(site.sources)
                yield site


@dataclass(frozen=True)
class _Found:
    site: Site
    place: Tensor  # the output row of every stored row, [out]


class AbsorbOrder(Rewrite):
    """The row order of `pifa::linear` goes into the columns of the linears that read its outputs elementwise."""

    targets = (pifa.linear.default,)
    is_about_speed_only = True

    def match(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        """The site, and the order that its sources share."""
        if node.args[3] is None:
            return None
        site = find_site(gm, node)
        if isinstance(site, Skip):
            return site
        orders = [_order_of(gm, source) for source in site.sources]
        first = orders[0]
        if first is None or any(order is None or not torch.equal(order, first) for order in orders):
            return Skip("row order stays: outputs of other order meet it; factorize_jointly gives them one")
        biases = [value_of(gm, source.args[4]) for source in site.sources if source.args[4] is not None]
        if any(bias is None or bias.shape != first.shape for bias in biases):
            return Skip("row order stays: a bias is not known to have one number for each output")
        for reader in site.readers:
            if constant_at(gm, reader.args[1]) is None:
                return Skip(f"row order stays: the weight of {reader.name} behind it is no constant of the graph")
        return _Found(site, torch.argsort(first))

    def rewrite(self, gm: GraphModule, node: Node, found: _Found) -> Node:
        """Reorders the readers' columns and the biases, and drops the order."""
        for reader in found.site.readers:
            weight = constant_at(gm, reader.args[1])
            assert weight is not None  # noqa: S101  `match` has read it
            with gm.graph.inserting_before(reader):
                columns = store_tensor(gm, weight.name, "stored_order", weight.tensor[:, found.place])
            reader.update_arg(1, columns)
        for source in found.site.sources:
            order, bias = source.args[3], source.args[4]
            if isinstance(bias, Node) and isinstance(order, Node):
                with gm.graph.inserting_before(source):
                    place = store_tensor(gm, str(order.target), "place", found.place)
                    in_stored_order = gm.graph.call_function(aten.index_select.default, (bias, 0, place))
                source.update_arg(4, in_stored_order)
            source.update_arg(3, None)
        return gm.graph.call_function(pifa.linear.default, node.args)


def _order_of(gm: GraphModule, source: Node) -> Tensor | None:
    order = source.args[3] if source.target is pifa.linear.default else None
    return tensor_at(gm, order) if isinstance(order, Node) and order.op == "get_attr" else None


def _is_elementwise(node: Node) -> bool:
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return type(module) in ELEMENTWISE_MODULES and not may_write(node) and not _draws(module)
    if node.op not in ("call_function", "call_method") or may_write(node):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            return _keeps_last_dimension(node)
        if target is aten.dropout.default:
            return node.args[2] is False
        known = torch.Tag.pointwise in target.tags or target in _MOVES_NOTHING
        return known and torch.Tag.nondeterministic_seeded not in target.tags
    if target is F.dropout:
        return inspect.signature(F.dropout).bind(*node.args, **node.kwargs).arguments.get("training") is False
    return target in (_METHODS if node.op == "call_method" else _FUNCTIONS)


def _draws(module: nn.Module) -> bool:
    """Whether a module draws a random number for every entry, which another entry would get in another order."""
    return isinstance(module, nn.Dropout) and module.training


def _keeps_last_dimension(node: Node) -> bool:
    before, after = (n.meta.get("val") for n in (node.all_input_nodes[0], node))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape[-1] == after.shape[-1]


def _is_one_for_all(gm: GraphModule, operand: Node) -> bool:
    """Whether an operand is the same for all features of a token, so that their order does not matter to it."""
    value = value_of(gm, operand)
    if value is not None:
        return value.ndim == 0 or bool(value.shape[-1] == 1)
    return operand.meta.get("val", operand.meta.get("example_value")) is not None

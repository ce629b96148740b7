"""What a call in a graph does besides giving a result: whether it may write, and whether it may go when it is unread.

Decided by what the call *is*: the schema of an ATen operator, the operator behind a function or method of torch, or one
of a few Python functions that are known by identity. Whatever is not known to be free of effects is assumed to have
some, so that a pass can only err on the safe side.
"""

import inspect
import operator
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

aten = torch.ops.aten

_UNDECLARED = {
    *(aten.batch_norm, aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm),
    *(aten._batch_norm_impl_index, aten.instance_norm),
}
"""Operators that write running statistics, of which their schemas say nothing."""

_OPERATORS = {
    *(operator.getitem, operator.matmul, operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.floordiv, operator.mod, operator.pow, operator.neg, operator.pos, operator.abs, operator.invert),
    *(operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, operator.not_, operator.index),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
}
_FUNCTIONS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.silu, F.mish, F.hardswish, F.hardtanh, F.hardsigmoid),
    *(
        F.tanh,
        F.sigmoid,
        F.softsign,
        F.tanhshrink,
        F.threshold,
        F.glu,
        F.softmax,
        F.log_softmax,
        F.softmin,
        F.normalize,
    ),
    *(F.dropout, F.alpha_dropout, F.layer_norm, F.rms_norm, F.group_norm, F.embedding, F.pad, F.cross_entropy),
}
"""Functions of torch that are written in Python and write nothing, unless `inplace` or `max_norm` is passed."""

_METHODS = {
    *("size", "dim", "stride", "float", "double", "half", "bfloat16", "int", "long", "bool", "cpu", "cuda"),
    *("__getitem__", "new_tensor", "get_device", "data_ptr", "is_floating_point", "is_complex", "is_contiguous"),
}
"""Methods of tensors that write nothing and have no ATen operator of their name."""

ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh),
    *(nn.Sigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid, nn.Dropout, nn.Identity),
)
"""Modules of torch that do the same to every feature, whatever the order."""

_MODULES = (*ELEMENTWISE_MODULES, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Softmax, nn.Flatten)

_PLACES = (
    *((torch, ""), (torch._C._nn, ""), (torch._C._VariableFunctions, "")),
    *((torch.linalg, "linalg_"), (torch.fft, "fft_"), (torch.special, "special_")),
)
"""Where torch's built-in functions are, and how the names of those there begin."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def may_write(node: Node) -> bool:
    """Whether a node may change something that exists already: an operand, a running statistic, state of torch."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        return not _is_plain_module_call(node)
    if node.op == "call_method":
        return not (node.target in _METHODS or _is_pure(getattr(aten, str(node.target), None), node.kwargs))
    target: Any = node.target
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable) or target.overloadpacket in _UNDECLARED
    if isinstance(target, OpOverloadPacket):
        return not _is_pure(target, node.kwargs)
    if target is getattr:
        return False
    if isinstance(target, BuiltinFunctionType):
        known = target in _OPERATORS or _is_pure(_operator_behind(target), node.kwargs)
        return not known
    return target not in _FUNCTIONS or _is_asked_to_write(target, node)


def writes_between(first: Node, last: Node) -> bool:
    """Whether a node between two others, in the graph's order, may write."""
    node = first.next
    while node is not last:
        if may_write(node):
            return True
        node = node.next
    return False


def is_removable(node: Node) -> bool:
    """Whether an unread node can go: it writes nothing and draws no random numbers, which would shift other draws."""
    if node.op in ("placeholder", "output") or may_write(node):
        return False
    if node.op in ("get_attr", "call_module"):
        return True
    target: Any = getattr(aten, node.target, None) if isinstance(node.target, str) else node.target
    if target in (F.dropout, F.alpha_dropout):
        return False
    if isinstance(target, BuiltinFunctionType):
        target = _operator_behind(target)
    return not any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(target))


def remove_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    """Removes those of `nodes` that nobody reads any more and that have no effects, and so on with what they read."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.users or not is_removable(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's `forward`: hooks, its own or for all modules, or a patch."""
    return (
        any(getattr(module, name, None) for name in _HOOKS)
        or any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)
        or "forward" in module.__dict__
    )


def inside_transforms(graph: Graph) -> set[Node]:
    """The nodes that run within a transform of `torch.func` (vmap, grad, vjp, jvp, ...), as Dynamo writes them out."""
    inside: set[Node] = set()
    depth = 0
    for node in graph.nodes:
        depth -= node.op == "call_function" and node.target in _LEAVES
        if depth > 0:
            inside.add(node)
        depth += node.op == "call_function" and node.target in _ENTERS
    return inside


def _levels(ending: str) -> set[Callable[..., Any]]:
    places = [torch._C._functorch, getattr(torch._functorch, "predispatch", None)]
    return {getattr(place, name) for place in places for name in dir(place) if name.endswith(ending)}


_ENTERS, _LEAVES = _levels("_increment_nesting"), _levels("_decrement_nesting")


def _is_plain_module_call(node: Node) -> bool:
    module = node.graph.owning_module
    called = None if module is None else module.get_submodule(str(node.target))
    if called is None or type(called) not in _MODULES:
        return False
    return not has_hooks(called) and not getattr(called, "inplace", False)


def _operator_behind(function: BuiltinFunctionType) -> OpOverloadPacket | None:
    """The ATen operator that a built-in function of torch calls; None for any other function."""
    name = function.__name__
    found = any(getattr(place, name.removeprefix(prefix), None) is function for place, prefix in _PLACES)
    return getattr(aten, name, None) if found else None


def _is_pure(packet: OpOverloadPacket | None, kwargs: dict[str, Any]) -> bool:
    """Whether an operator writes nothing when it is called with these keyword arguments, whichever overload it is."""
    if packet is None or packet in _UNDECLARED or kwargs.get("out") is not None:
        return False
    overloads = [overload for overload in _overloads(packet) if not _writes_out_only(overload)]
    return bool(overloads) and not any(overload._schema.is_mutable for overload in overloads)


def _overloads(target: Any) -> list[OpOverload]:
    if isinstance(target, OpOverload):
        return [target]
    if not isinstance(target, OpOverloadPacket):
        return []
    return [getattr(target, name) for name in target.overloads()]


def _writes_out_only(overload: OpOverload) -> bool:
    """Whether all that an overload writes to are buffers that a caller must pass by keyword (`out=`)."""
    written = [argument for argument in overload._schema.arguments if argument.is_write]
    return bool(written) and all(argument.kwarg_only for argument in written)


def _is_asked_to_write(function: Callable[..., Any], node: Node) -> bool:
    try:
        arguments = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return True
    return bool(arguments.get("inplace")) or arguments.get("max_norm") is not None


def is_plain(value: object) -> bool:
    """Whether a value is a tensor and no more: no subclass of `Tensor` that computes in its own way, not nested."""
    from torch._subclasses.fake_tensor import FakeTensor

    known = type(value) in (Tensor, nn.Parameter, FakeTensor)
    return known and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested

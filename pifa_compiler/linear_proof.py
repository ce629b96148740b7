"""`computes_linear`: whether a subclass of `nn.Linear` computes x W^T + b from its own weight and bias, no more."""

import copy
import operator
from types import FunctionType

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.nn import functional as F

_WORDS = frozenset(
    {"weight", "bias", "T", "t", "mT", "transpose", "matmul", "mm", "linear", "forward", "super"}
    | {"F", "nn", "torch", "functional"}
)
"""What the code may name. `training` and flags are not among them, so the one path that is traced is the only one."""

_OWN = {"__init__", "forward", "extra_repr", "reset_parameters"}
_PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
_PARTS = {"_parameters", "_buffers", "_modules"}

_known: dict[tuple[FunctionType, bool], bool] = {}


def computes_linear(module: nn.Module) -> bool:
    """Whether `module`, of a subclass of `nn.Linear`, does what `nn.Linear` does, in training and in evaluation.

    Shown by its code: the class adds nothing but a `forward(self, x)` that names no flag, function or state besides its
    weight and bias, and that, traced, is the product with the transposed weight, plus the bias if there is one.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or module._modules or module._buffers:
        return False
    if module._parameters.keys() != {"weight", "bias"}:
        return False
    classes = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    if not all(issubclass(base, nn.Linear) for base in classes):
        return False  # a mixin
    added = {name for base in classes for name in vars(base) if not _is_about_the_class(name)}
    if not added <= _OWN:
        return False
    forward = kind.forward
    if forward is nn.Linear.forward:
        return True
    if not isinstance(forward, FunctionType):
        return False
    key = (forward, module._parameters["bias"] is not None)
    if key not in _known:
        _known[key] = _names_nothing_else(forward) and _is_linear(_trace(module), has_bias=key[1])
    return _known[key]


def _is_about_the_class(name: str) -> bool:
    return (name.startswith("__") and name.endswith("__") and name in _DUNDERS) or name.startswith("_abc_")


_DUNDERS = {
    *("__module__", "__doc__", "__qualname__", "__annotations__", "__firstlineno__", "__static_attributes__"),
    *("__constants__", "__parameters__", "__abstractmethods__", "__annotate__", "__annotate_func__"),
}


def _names_nothing_else(forward: FunctionType) -> bool:
    code = forward.__code__
    plain = code.co_argcount == 2 and code.co_kwonlyargcount == 0 and not code.co_flags & 0x0C  # no *args, **kwargs
    nested = any(isinstance(constant, type(code)) for constant in code.co_consts)
    inner = set(code.co_freevars) <= {"__class__"}
    return plain and not nested and inner and set(code.co_names) <= _WORDS


def _trace(module: nn.Module) -> Graph | None:
    stand_in = copy.copy(module)  # whatever tracing sets is set on it
    vars(stand_in).update({name: dict(value) for name, value in vars(module).items() if name in _PARTS})
    vars(stand_in).update({name: value.copy() for name, value in vars(module).items() if name.endswith("_hooks")})
    try:
        return Tracer().trace(stand_in)
    except (torch.fx.proxy.TraceError, TypeError, AttributeError, ValueError, RuntimeError):
        return None  # it does more than pass its input on


def _is_linear(graph: Graph | None, *, has_bias: bool) -> bool:
    """Whether a traced forward is x W^T, or x W^T + b, whichever is wanted."""
    if graph is None:
        return False
    values: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "output":
            result = node.args[0]
            return isinstance(result, Node) and values.get(result) == ("x W^T + b" if has_bias else "x W^T")
        value = _value(node, values)
        if value is None:
            return False
        values[node] = value
    return False


def _value(node: Node, values: dict[Node, str]) -> str | None:
    """What a node of a traced forward is, in letters; None for anything that a linear does not need."""
    if node.op == "placeholder":
        return "x"
    if node.op == "get_attr":
        return {"weight": "W", "bias": "b"}.get(str(node.target))
    operands = [*node.args, *(node.kwargs[key] for key in ("input", "weight", "bias") if key in node.kwargs)]
    arguments = [values.get(operand) if isinstance(operand, Node) else operand for operand in operands]
    if node.op == "call_function" and node.target is F.linear and len(operands) == len(node.args) + len(node.kwargs):
        if arguments in (["x", "W"], ["x", "W", None]):
            return "x W^T"
        return "x W^T + b" if arguments == ["x", "W", "b"] else None
    if node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    if node.target in (operator.getitem, getattr):
        return "W^T" if arguments in (["W", "T"], ["W", "mT"]) else None
    if node.target in ("t", torch.t):
        return "W^T" if arguments == ["W"] else None
    if node.target in ("transpose", torch.transpose):
        return "W^T" if arguments in (["W", 0, 1], ["W", 1, 0], ["W", -1, -2], ["W", -2, -1]) else None
    if node.target in _PRODUCTS:
        return "x W^T" if arguments == ["x", "W^T"] else None
    if node.target in (operator.add, torch.add):
        return "x W^T + b" if arguments in (["x W^T", "b"], ["b", "x W^T"]) else None
    return None

"""Canonicalize: every spelling of a linear -> aten.linear(x, weight[, bias]).

    call_module nn.Linear, F.linear(x, w, b)  ->  aten.linear(x, w, b)
    addmm(b, x, m)                            ->  aten.linear(x, t(m), b)      m [in, out], as in GPT-2
    mm(x, m), matmul(x, m), x @ m             ->  aten.linear(x, t(m))
    aten.add(aten.linear(x, w), b)            ->  aten.linear(x, w, b)         in the code of one module, as in Falcon

where m is a real floating-point parameter, and transposes of a weight (`.t()`, `.T`, `.H`, transpose, permute) are
folded into at most one `t`. Calls with further arguments (`out=`, `out_dtype`) and tensors of subclasses stay.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from .effects import has_hooks, is_plain
from .rewrite import Rewrite, Skip
from .weights import SUBCLASS, is_subclass, tensor_at, value_of

aten = torch.ops.aten

_LINEAR = (F.linear, aten.linear.default)
_ADDMM = (torch.addmm, aten.addmm.default)
_ADD = aten.add.Tensor
_MATMUL = (torch.mm, torch.matmul, operator.matmul, aten.mm.default, aten.matmul.default)

# Real matrices only: `H` and `adjoint` of complex ones conjugate as well.
_SWAPS_ALWAYS = {
    *("t", "numpy_T", "mT", "adjoint"),
    *(torch.t, torch.adjoint, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default),
}
_SWAPS_BY_DIMS = {
    *("transpose", "swapaxes", "swapdims", "permute"),
    *(torch.transpose, torch.swapaxes, torch.swapdims, torch.permute),
    *(aten.transpose.int, aten.permute.default),
}


@dataclass(frozen=True)
class _Found:
    """The operands of a linear: `weight` is [out, in], or [in, out] where `transposed`."""

    x: Node
    weight: Node
    transposed: bool
    bias: Any


class Canonicalize(Rewrite):
    """Every spelling of a linear -> aten.linear.default(x, weight[, bias]), weight [out, in]."""

    targets = (*_LINEAR, *_ADDMM, *_MATMUL)
    works_in_transforms = True  # it names the operator that the call ends in

    def candidates(self, gm: GraphModule) -> Iterable[Node]:
        """Calls of `targets`, of `nn.Linear` modules, and of operators that call graphs of their own."""
        return [
            node
            for node in gm.graph.nodes
            if (node.op == "call_function" and (node.target in (*self.targets, _ADD) or _calls_graphs(node)))
            or (node.op == "call_module" and type(gm.get_submodule(str(node.target))) is nn.Linear)
        ]

    def match(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        """The operands of the linear."""
        found: _Found | Skip | None
        if _calls_graphs(node):
            found = _linears_within(gm, node)
        elif node.op == "call_module":
            found = self._match_module(gm, node)
        elif node.target is _ADD:
            found = _match_bias(gm, node)
        elif node.target in _LINEAR:
            found = self._match_linear(gm, node)
        elif node.target in _ADDMM:
            found = self._match_addmm(gm, node)
        else:
            found = self._match_matmul(gm, node)
        operands = [found.x, found.weight, found.bias] if isinstance(found, _Found) else []
        return SUBCLASS if any(is_subclass(gm, operand) for operand in operands) else found

    def rewrite(self, gm: GraphModule, node: Node, found: _Found) -> Node:
        """Writes it as `aten.linear`."""
        if node.op == "call_module":
            weight = gm.graph.get_attr(f"{node.target}.weight")
            has_bias = gm.get_submodule(str(node.target)).bias is not None
            bias = gm.graph.get_attr(f"{node.target}.bias") if has_bias else None
        else:
            weight = gm.graph.call_function(aten.t.default, (found.weight,)) if found.transposed else found.weight
            bias = found.bias
        args = (found.x, weight) if bias is None else (found.x, weight, bias)
        return gm.graph.call_function(aten.linear.default, args)

    def _match_module(self, gm: GraphModule, node: Node) -> _Found | Skip:
        module = gm.get_submodule(str(node.target))
        if has_hooks(module):
            return Skip("module has hooks or a forward of its own, which would no longer run")
        if not (is_plain(module.weight) and (module.bias is None or is_plain(module.bias))):
            return SUBCLASS
        arguments = _arguments(node, "input")
        return _Found(arguments[0], node, False, None) if arguments is not None else Skip(_FURTHER)

    def _match_linear(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        arguments = _arguments(node, "input", "weight", "bias")
        if arguments is None:
            return Skip(_FURTHER)
        x, weight, bias = arguments
        base, transposed = _fold_transposes(gm, weight)
        plain = (x, weight) if bias is None else (x, weight, bias)
        folded = not transposed or (weight.target is aten.t.default and weight.args[0] is base)
        untouched = base is weight or (transposed and folded)
        if node.target is aten.linear.default and node.args == plain and untouched:
            return None
        return _Found(x, base, transposed, bias)

    def _match_addmm(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        arguments = _arguments(node, "input", "mat1", "mat2", "beta", "alpha")
        if arguments is None:
            return Skip(_FURTHER)
        bias, x, matrix, beta, alpha = arguments
        base, transposed = _fold_transposes(gm, matrix)
        if not _is_weight(gm, base):
            return None
        if beta not in (None, 1) or alpha not in (None, 1):
            return Skip(f"addmm scales its terms: beta={beta}, alpha={alpha}")
        rows = value_of(gm, base)
        outputs = None if rows is None else rows.shape[0 if transposed else 1]
        vector = value_of(gm, bias)
        if vector is None or vector.ndim != 1 or vector.shape[0] != outputs:
            return Skip("addmm's first argument is not known to be a bias vector")
        return _Found(x, base, not transposed, bias)

    def _match_matmul(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        arguments = _arguments(node, "input", "mat2" if node.target in (torch.mm, aten.mm.default) else "other")
        if arguments is None:
            return Skip(_FURTHER)
        x, matrix = arguments
        base, transposed = _fold_transposes(gm, matrix)
        return _Found(x, base, not transposed, None) if isinstance(x, Node) and _is_weight(gm, base) else None


def _match_bias(gm: GraphModule, node: Node) -> _Found | None:
    """A linear without a bias, read by this addition of one only, of the same module's code and the same dtype."""
    is_first = isinstance(node.args[0], Node) and node.args[0].target is aten.linear.default
    linear, bias = node.args if is_first else node.args[::-1]
    if not isinstance(linear, Node) or linear.target is not aten.linear.default or len(linear.args) != 2 or node.kwargs:
        return None
    if list(linear.users) != [node] or _caller(linear) != _caller(node):
        return None
    x, matrix = linear.args
    if not isinstance(x, Node) or not isinstance(matrix, Node):
        return None
    base, transposed = _fold_transposes(gm, matrix)
    weight, vector = tensor_at(gm, base), tensor_at(gm, bias)
    if weight is None or vector is None:
        return None
    outputs = torch.Size((weight.shape[1 if transposed else 0],))
    same = vector.shape == outputs and vector.dtype == weight.dtype == _dtype(linear) == _dtype(node)
    return _Found(x, base, transposed, bias) if same else None


def _caller(node: Node) -> Any:
    """In whose code a node was called, if the graph says so."""
    return node.meta.get("nn_module_stack")


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _calls_graphs(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)


def _linears_within(gm: GraphModule, node: Node) -> Skip | None:
    """A record of linears in the graphs that an operator calls, such as the block of a gradient checkpoint."""
    targets = (*Canonicalize.targets, torch.ops.pifa.linear.default)
    for operand in node.all_input_nodes:
        graph = getattr(gm, str(operand.target), None) if operand.op == "get_attr" else None
        if isinstance(graph, GraphModule) and any(inner.target in targets for inner in graph.graph.nodes):
            return Skip(f"linears in the graph that {node.target} calls are left as they are")
    return None


_FURTHER = "the call has arguments that a linear does not have, such as out="


def _arguments(node: Node, *names: str) -> list[Any] | None:
    """The arguments called `names`, however they were passed, or None if there are others.

    `self` is what aten calls `input`.
    """
    kwargs = {"input" if key == "self" else key: value for key, value in node.kwargs.items() if value is not None}
    if len(node.args) > len(names) or not set(kwargs) <= set(names[len(node.args) :]):
        return None
    return [node.args[i] if i < len(node.args) else kwargs.get(name) for i, name in enumerate(names)]


def _fold_transposes(gm: GraphModule, weight: Node) -> tuple[Node, bool]:
    """The node under a chain of transposes of a weight, and whether they swap rows and columns.

    The node itself where what is below is not known to be a real matrix.
    """
    base, transposed = weight, False
    while isinstance(base, Node) and (inner := _transposed_operand(base)) is not None:
        base, swaps = inner
        transposed ^= swaps
    return (base, transposed) if _is_weight(gm, base) else (weight, False)


def _transposed_operand(node: Node) -> tuple[Node, bool] | None:
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    target: str | Callable[..., Any] = node.target
    if target is getattr and node.args[1] in ("T", "mT", "H", "mH"):
        return node.args[0], True
    if target in _SWAPS_ALWAYS:
        return node.args[0], True
    if target in _SWAPS_BY_DIMS and not node.kwargs:
        dims: Any = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
        if sorted(d % 2 for d in dims) == [0, 1]:
            identity = target in ("permute", torch.permute, aten.permute.default) and dims[0] % 2 == 0
            return node.args[0], not identity
    return None


def _is_weight(gm: GraphModule, node: Any) -> bool:
    tensor = tensor_at(gm, node)
    return tensor is not None and tensor.ndim == 2 and tensor.is_floating_point()

"""Canonicalize: every spelling of a linear -> aten.linear(x, weight[, bias]).

    call_module nn.Linear, F.linear(x, w, b)  ->  aten.linear(x, w, b)
    addmm(b, x, m)                            ->  aten.linear(x, t(m), b)      m [in, out], as in GPT-2
    mm(x, m), matmul(x, m), x @ m             ->  aten.linear(x, t(m))

where m is a parameter, and transposes of a weight (`.t()`, `.T`, transpose, permute) are folded into at most one `t`.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from .rewrite import Rewrite, Skip
from .weights import tensor_at

aten = torch.ops.aten

_LINEAR = (F.linear, aten.linear.default)
_ADDMM = (torch.addmm, aten.addmm.default)
_MATMUL = (torch.mm, torch.matmul, operator.matmul, aten.mm.default, aten.matmul.default)

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

    def candidates(self, gm: GraphModule) -> Iterable[Node]:
        """Calls of `targets`, and calls of `nn.Linear` modules."""
        return [
            node
            for node in gm.graph.nodes
            if (node.op == "call_function" and node.target in self.targets)
            or (node.op == "call_module" and type(gm.get_submodule(str(node.target))) is nn.Linear)
        ]

    def match(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        """The operands of the linear."""
        if node.op == "call_module":
            return self._match_module(gm, node)
        if node.target in _LINEAR:
            return self._match_linear(node)
        if node.target in _ADDMM:
            return self._match_addmm(gm, node)
        return self._match_matmul(gm, node)

    def rewrite(self, gm: GraphModule, node: Node, found: _Found) -> Node:
        """Spells it the one way."""
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
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return Skip("module has hooks, which would no longer run")
        x = _arguments(node, "input")[0]
        return _Found(x, node, False, None)

    def _match_linear(self, node: Node) -> _Found | None:
        x, weight, bias = _arguments(node, "input", "weight", "bias")
        base, transposed = _fold_transposes(weight)
        plain = (x, weight) if bias is None else (x, weight, bias)
        folded = not transposed or (weight.target is aten.t.default and weight.args[0] is base)
        untouched = base is weight or (transposed and folded)
        if node.target is aten.linear.default and node.args == plain and untouched:
            return None
        return _Found(x, base, transposed, bias)

    def _match_addmm(self, gm: GraphModule, node: Node) -> _Found | Skip | None:
        bias, x, matrix, beta, alpha = _arguments(node, "input", "mat1", "mat2", "beta", "alpha")
        base, transposed = _fold_transposes(matrix)
        if not _is_matrix(gm, base):
            return None
        if beta not in (None, 1) or alpha not in (None, 1):
            return Skip(f"addmm scales its terms: beta={beta}, alpha={alpha}")
        if _ndim(gm, bias) != 1:
            return Skip("addmm's first argument is not known to be a bias vector")
        return _Found(x, base, not transposed, bias)

    def _match_matmul(self, gm: GraphModule, node: Node) -> _Found | None:
        x, matrix = _arguments(node, "input", "mat2" if node.target in (torch.mm, aten.mm.default) else "other")
        base, transposed = _fold_transposes(matrix)
        return _Found(x, base, not transposed, None) if _is_matrix(gm, base) else None


def _arguments(node: Node, *names: str) -> list[Any]:
    """The arguments called `names`, however they were passed; `self` is what aten calls `input`."""
    kwargs = {"input" if key == "self" else key: value for key, value in node.kwargs.items()}
    return [node.args[i] if i < len(node.args) else kwargs.get(name) for i, name in enumerate(names)]


def _fold_transposes(weight: Node) -> tuple[Node, bool]:
    """The node under a chain of transposes of a matrix, and whether they swap rows and columns."""
    transposed = False
    while isinstance(weight, Node) and (inner := _transposed_operand(weight)) is not None:
        weight, swaps = inner
        transposed ^= swaps
    return weight, transposed


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


def _is_matrix(gm: GraphModule, node: Any) -> bool:
    tensor = tensor_at(gm, node)
    return tensor is not None and tensor.ndim == 2


def _ndim(gm: GraphModule, node: Any) -> int | None:
    if not isinstance(node, Node):
        return None
    value = tensor_at(gm, node)
    if value is None:
        value = node.meta.get("val", node.meta.get("example_value"))
    return value.ndim if isinstance(value, torch.Tensor) else None

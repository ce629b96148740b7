"""How passes see weights: `read_weight` reads the weight of a linear, `store_factors` puts factors where it stood.

Captures hand weights over in three ways: as attributes of the graph module (`get_attr`), as inputs of the graph that a
caller binds to real tensors (`bind_inputs`), or computed in the graph. Fake tensors are never read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ..factors import PifaFactors
from .effects import is_plain, is_removable, may_write
from .rewrite import Skip

aten = torch.ops.aten

COMPUTED = Skip("weight is computed in the graph")
CHANGED = Skip("weight may be changed in the graph")
SUBCLASS = Skip("a tensor is of a subclass, which computes in its own way")

_BOUND, _PASSED, _WITHHELD = "pifa_bound", "pifa_passed", "pifa_withheld"
_USES_VALUES = (aten.linear.default, aten.embedding.default, F.embedding)


@dataclass(frozen=True)
class Weight:
    """The weight of a linear.

    Attributes:
        name: of the attribute or of the graph input that holds it.
        tensor: its values, [out, in]; a view where the stored weight is [in, out].
        node: the `get_attr` or placeholder that holds it.
    """

    name: str
    tensor: Tensor
    node: Node


def bind_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Tells passes which graph inputs are weights: the parameters and buffers among `example_inputs`.

    Other tensors are kept too, to see which of them lie in a weight's memory.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, example_inputs, strict=True):
        if _is_state(value):
            node.meta[_BOUND] = value
        elif is_plain(value) and not isinstance(value, FakeTensor):
            node.meta[_PASSED] = value


def withhold(node: Node, reason: Skip) -> None:
    """Makes `read_weight` answer `reason` for the weight that `node` holds."""
    node.meta[_WITHHELD] = reason


def unbind_inputs(gm: GraphModule) -> None:
    """Forgets what `bind_inputs` and `withhold` told, so that the graph keeps no weight alive."""
    for node in gm.graph.nodes:
        for key in (_BOUND, _PASSED, _WITHHELD):
            node.meta.pop(key, None)


def linear_weights(gm: GraphModule) -> dict[Node, int]:
    """The `get_attr` nodes and bound inputs that are weights of canonical linears; each with its number of linears."""
    uses: dict[Node, int] = {}
    for linear in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        arg = linear.args[1]
        node: Any = arg.args[0] if isinstance(arg, Node) and arg.target is aten.t.default else arg
        if tensor_at(gm, node) is not None:
            uses[node] = uses.get(node, 0) + 1
    return uses


def tensor_at(gm: GraphModule, node: Any) -> Tensor | None:
    """The parameter, buffer or constant that a `get_attr` or a bound input stands for; None for any other node."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get(_BOUND)
    if node.op == "get_attr":
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None


def value_of(gm: GraphModule, node: Any) -> Tensor | None:
    """A tensor of a node's shape, dtype, device and type: its own value, or the fake one that the capture left."""
    value = tensor_at(gm, node)
    if value is None and isinstance(node, Node):
        value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def is_subclass(gm: GraphModule, node: Any) -> bool:
    """Whether a node is known to stand for a tensor of a subclass, or for one that is not laid out in strides."""
    value = value_of(gm, node)
    return value is not None and not is_plain(value)


def read_weight(gm: GraphModule, arg: Any) -> Weight | Skip:
    """The weight that the second argument of a canonical linear stands for, or why it cannot be read."""
    transposed = isinstance(arg, Node) and arg.target is aten.t.default
    node = arg.args[0] if transposed else arg
    tensor = tensor_at(gm, node)
    if tensor is None:
        return COMPUTED
    if not is_plain(tensor):
        return SUBCLASS
    if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.is_meta:
        return Skip(f"weight is not a floating-point matrix: {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    withheld: Skip | None = node.meta.get(_WITHHELD)
    if withheld is not None:
        return withheld
    if any(_is_written(other) for other in _sharing(gm, node, tensor)):
        return CHANGED
    values = tensor.detach()
    return Weight(str(node.target), values.t() if transposed else values, node)


def constant_at(gm: GraphModule, arg: Any) -> Weight | None:
    """A weight, dense or pivot rows, that the graph itself holds and that nobody changes; None for any other."""
    weight = read_weight(gm, arg)
    return weight if isinstance(weight, Weight) and weight.node.op == "get_attr" else None


def store_factors(gm: GraphModule, name: str, factors: PifaFactors) -> tuple[Node, Node, Node]:
    """Keeps `factors` on `gm` beside the weight called `name`; returns the nodes of w_pivot, coeff and order."""
    prefix, _, _ = name.rpartition(".")
    holder, path = _holder(gm, prefix)
    stem = "" if path else f"{name.replace('.', '_')}_"
    values = {"w_pivot": factors.w_pivot, "coeff": factors.coeff, "order": factors.order()}
    nodes = []
    for suffix, value in values.items():
        attribute = _attribute_for(holder, stem + suffix, value)
        nodes.append(gm.graph.get_attr(f"{path}.{attribute}" if path else attribute))
    return nodes[0], nodes[1], nodes[2]


def store_tensor(gm: GraphModule, name: str, suffix: str, value: Tensor) -> Node:
    """Keeps `value` on `gm` as a constant named after the weight `name`; returns its node."""
    prefix, _, attribute = name.rpartition(".")
    holder, path = _holder(gm, prefix)
    stem = f"{attribute}_{suffix}" if path == prefix else f"{name.replace('.', '_')}_{suffix}"
    kept = _attribute_for(holder, stem, value)
    return gm.graph.get_attr(f"{path}.{kept}" if path else kept)


def _attribute_for(holder: nn.Module, stem: str, value: Tensor) -> str:
    """Keeps `value` under the first of stem, stem_1, ... that is free or stored by us and equal: weights are shared."""
    stored: set[str] = holder.__dict__.setdefault("_pifa_stored", set())
    name, copies = stem, 0
    while hasattr(holder, name):
        kept = getattr(holder, name)
        if name in stored and kept.dtype is value.dtype and torch.equal(kept, value):
            return name
        copies += 1
        name = f"{stem}_{copies}"
    holder.register_buffer(name, value)
    stored.add(name)
    return name


def release(gm: GraphModule, node: Node) -> None:
    """Takes the operands off a linear that is about to be replaced, and removes the weights that nothing else reads."""
    operands = node.all_input_nodes
    node.args, node.kwargs = (), {}
    for operand in operands:
        if operand.users or not is_removable(operand):
            continue
        release(gm, operand)
        gm.graph.erase_node(operand)
        if operand.op == "get_attr" and not _readers(gm, operand):
            prefix, _, attribute = str(operand.target).rpartition(".")
            holder, path = _holder(gm, prefix)
            if path == prefix and hasattr(holder, attribute):
                delattr(holder, attribute)


def _readers(gm: GraphModule, node: Node) -> list[Node]:
    """The nodes that hold the same weight: captures make one `get_attr` for each use."""
    return [other for other in gm.graph.find_nodes(op="get_attr") if other.target == node.target]


def _sharing(gm: GraphModule, node: Node, tensor: Tensor) -> Iterator[Node]:
    """The nodes that hold a tensor in the memory of `tensor`, which `node` holds."""
    memory = tensor.untyped_storage()._cdata
    for op in ("placeholder", "get_attr"):
        for other in gm.graph.find_nodes(op=op):
            held = other.meta.get(_PASSED) if (found := tensor_at(gm, other)) is None else found
            if other is node or (held is not None and is_plain(held) and held.untyped_storage()._cdata == memory):
                yield other


def _is_written(node: Node) -> bool:
    """Whether the graph may write to what `node` holds, directly or through a view; errs only on the safe side."""
    seen, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user in seen or user.op == "output":
                continue
            if may_write(user):
                return True
            seen.add(user)
            if user.target not in _USES_VALUES:
                pending.append(user)
    return False


def _is_state(value: Any) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    # Dynamo marks the parameters and buffers of modules that way, and not activations.
    return isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _holder(gm: GraphModule, prefix: str) -> tuple[nn.Module, str]:
    """The submodule of `gm` at `prefix`, made `gm`'s own: a module shared with the captured model is copied shallowly.

    Falls back to `gm` itself, path "", where the graph calls a module on the way.
    """
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    parts = prefix.split(".") if prefix else []
    if any(".".join(parts[: i + 1]) in called for i in range(len(parts))):
        return gm, ""
    module: nn.Module = gm
    for part in parts:
        child = getattr(module, part, None)
        if type(child) is not nn.Module or not child.__dict__.get("_pifa_owned", False):
            own = nn.Module()
            if isinstance(child, nn.Module):
                own._parameters.update(child._parameters)
                own._buffers.update(child._buffers)
                own._modules.update(child._modules)
                own.__dict__.update({k: v for k, v in child.__dict__.items() if isinstance(v, Tensor)})
            own.__dict__["_pifa_owned"] = True
            setattr(module, part, own)
            child = own
        module = child
    return module, prefix

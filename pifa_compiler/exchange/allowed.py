"""`Exchangeable`: which layers of a model may be exchanged for others, and why the rest may not."""

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..linear import PifaLinear
from ..modules import attributes_of_its_own, is_plain_linear, module_at, storage_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TABLES = ("_parameters", "_buffers", "_modules")
_DEPTH = 4
"""How many containers deep a reference is looked for."""


class Exchangeable:
    """What a model tells about its layers: who holds, hooks or reads them beside the layers themselves.

    Args:
        model: the layers' model, as it is now.
        graph: the same captured, or None: then who reads a weight on the way is not known.
        in_files: whether weights on the meta device have their values in files.
    """

    def __init__(self, model: nn.Module, graph: GraphModule | None, *, in_files: bool = False) -> None:
        self.model, self.graph, self.in_files = model, graph, in_files
        self._tensors: dict[tuple[str, int], list[str]] = {}
        self._modules: dict[int, list[str]] = {}
        self._read: dict[str, list[Node]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self._tensors.setdefault(storage_of(tensor), []).append(name)
        for name, module in model.named_modules(remove_duplicate=False):
            self._modules.setdefault(id(module), []).append(name)
        self._note_references()
        if graph is not None:
            for node in graph.graph.find_nodes(op="get_attr"):
                self._read.setdefault(str(node.target).rpartition(".")[0], []).append(node)

    def is_layer(self, name: str) -> bool:
        """Whether `name` is a linear layer, dense or in PIFA form."""
        layer = module_at(self.model, name)
        return type(layer) is PifaLinear or is_plain_linear(layer)

    def why_not(self, name: str) -> str | None:
        """Why the layer called `name`, dense or in PIFA form, has to stay as it is; None if it may be exchanged."""
        layer = module_at(self.model, name)
        if layer is None or not name:
            return "the model itself is the layer; put it into a module" if not name else "there is no such layer"
        if not self.is_layer(name):
            return _why_no_linear(layer)
        if self.graph is None and type(layer) not in (nn.Linear, PifaLinear) and isinstance(layer, nn.Linear):
            return f"layer is a {type(layer).__name__}; without an example it is not known who reads its weight"
        plain = _why_no_plain_weight(layer, in_files=self.in_files)
        return why_marked(layer) or plain or self.why_shared(name) or self._why_read(name)

    def why_shared(self, name: str) -> str | None:
        """Why the module called `name` is not its parent's alone; None if it is."""
        module = self.model.get_submodule(name)
        others = [other for other in self._modules.get(id(module), []) if other != name]
        if others:
            return f"layer is used elsewhere too, as {others[0]}"
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            own = f"{name}.{key}"
            others = [other for other in self._tensors.get(storage_of(tensor), []) if other != own]
            if others:
                return f"{own.rpartition('.')[2]} is tied to {others[0]}"
        return None

    def why_tied(self, parameter: str) -> str | None:
        """What else of the model shares the memory of the parameter called `parameter`; None if nothing does."""
        owner, _, key = parameter.rpartition(".")
        tensor = self.model.get_submodule(owner)._parameters.get(key)
        if tensor is None:
            return None
        others = [other for other in self._tensors.get(storage_of(tensor), []) if other != parameter]
        return f"{key} is tied to {others[0]}" if others else None

    def _why_read(self, name: str) -> str | None:
        """Which part of the graph reads the layer's parameters outside the layer's own code."""
        for node in self._read.get(name, []):
            attribute = str(node.target).rpartition(".")[2]
            for reader in _readers(node):
                if reader.op == "output":
                    return f"{attribute} is an output of the model"
                path, kind = caller_of(reader)
                if path != name:
                    where = f"{kind} itself" + (f" ({path})" if path else "")
                    return f"{attribute} is read by {where}, by {reader.name}, not by the layer's own code alone"
        return None

    def _note_references(self) -> None:
        """Tensors and modules that lie in lists, functions and objects somewhere in the model, not in its tables."""
        known = {id(module) for module in self.model.modules()}
        seen: set[int] = set()
        for name, module in self.model.named_modules():
            for key, value in vars(module).items():
                if key in _TABLES or isinstance(module, GraphModule):
                    continue
                label = f"{name}.{key}".removeprefix(".")
                for leaf in _leaves(value, seen, _DEPTH):
                    if isinstance(leaf, Tensor):
                        self._tensors.setdefault(storage_of(leaf), []).append(label)
                    elif isinstance(leaf, nn.Module) and id(leaf) in known and leaf is not module:
                        self._modules[id(leaf)].append(label)


def why_marked(module: nn.Module) -> str | None:
    """What was put on a module that another in its place would not have: hooks, a forward or attributes of its own."""
    for key, value in vars(module).items():
        if key.endswith("_hooks") and value:
            return f"layer has {key.strip('_').replace('_', ' ')}, which would no longer run"
    if "forward" in vars(module) or "__call__" in vars(module):
        return "layer's forward is replaced on the instance"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "layer was compiled on its own"
    if is_plain_linear(module) or type(module) is PifaLinear:
        parts = module._parameters.keys() | module._buffers.keys() | module._modules.keys()
        for key in sorted(parts - {"weight", "bias", "w_pivot", "coeff", "pivots", "order"}):
            return f"layer has {key} beside its weight, which another layer would not"
        for key, value in attributes_of_its_own(module).items():
            if not _is_value(value):
                return f"layer has {key}, a {type(value).__name__}, which another layer would not"
    return None


def readers_of(graph: GraphModule, name: str) -> list[Node]:
    """The nodes of a captured graph that read the parameter called `name`, transposed or not."""
    nodes = graph.graph.find_nodes(op="get_attr")
    return [reader for node in nodes if node.target == name for reader in _readers(node)]


def caller_of(node: Node) -> tuple[str, str]:
    """(name, class name) of the module in whose code a node of a captured graph was called."""
    stack = calls_of(node)
    return stack[-1] if stack else ("", "the model")


def caller_of_layer(node: Node, name: str) -> str | None:
    """The module in whose code a captured graph shows the module `name` called at `node`; None if it does not."""
    names = [path for path, _ in calls_of(node)]
    if name not in names:
        return None
    return names[names.index(name) - 1] if names.index(name) > 0 else ""


def calls_of(node: Node) -> list[tuple[str, str]]:
    """(name, class name) of the modules that were being called when a node was captured, the outermost first."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else kind.__name__
        found.append((str(path), name.rpartition(".")[2]))
    return found


def _why_no_linear(layer: nn.Module) -> str:
    kind = type(layer).__name__
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return "weight is computed by a parametrization"
    if isinstance(layer, nn.Linear):
        return f"layer is a {kind}, which is not known to compute what nn.Linear does"
    return f"weight belongs to a {kind}, which is no linear layer; put it into an nn.Linear"


def _why_no_plain_weight(layer: nn.Module, *, in_files: bool) -> str | None:
    for key, tensor in (("weight", vars(layer)["_parameters"].get("weight")), *layer._parameters.items()):
        if tensor is None:
            if key == "weight" and not isinstance(layer, PifaLinear):
                return "weight is no parameter: something computes it"
            continue
        if type(tensor) is not nn.Parameter:
            return f"{key} is a {type(tensor).__name__}, a kind of tensor of its own"
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            return f"{key} is no plain floating-point tensor: {tensor.dtype}, {tensor.layout}"
        if tensor.is_meta and not in_files:
            return f"{key} has no values (meta device)"
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            return f"{key} has hooks, which would no longer run"
    return None


def _readers(node: Node) -> Iterator[Node]:
    """What reads a parameter; a transpose that a pass has made is looked through."""
    for user in node.users:
        if user.target is torch.ops.aten.t.default:
            yield from _readers(user)
        else:
            yield user


def _is_value(value: object) -> bool:
    return isinstance(value, _VALUES) or (isinstance(value, tuple) and all(map(_is_value, value)))


def _leaves(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """Tensors and modules in containers, in what a function has captured, and in the attributes of plain objects."""
    if isinstance(value, Tensor | nn.Module):
        yield value
        return
    if isinstance(value, (*_VALUES, type)) or id(value) in seen or depth == 0:
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif isinstance(value, MethodType):
        inner = [value.__self__]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    elif hasattr(value, "__dict__"):
        seen.add(id(value))
        inner = list(vars(value).values())
    for element in inner:
        yield from _leaves(element, seen, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False

"""Capturing a model in parts, where `torch.export` cannot make one graph of it, or makes one that computes something
else: what its submodules are called with, in the calls of the model, is recorded, and each is captured for its own.

The parts are the largest submodules that can be captured. Their graphs become one, in which nothing leads from one part
to another: each starts from what the dense model gives it. Weights keep the names that they have in the whole model.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, CaptureError
from .capture import Batch, Captured, call_of, capture, evaluation_mode
from .linears import linears_by_weight
from .same_values import check_same_values
from .token_masks import TokenMasks
from .weights import WeightsInMemory

_PARTS_NAMED = 8
"""Parts that the note names."""


def capture_whole_or_in_parts(model: nn.Module, batches: Sequence[Batch]) -> Captured:
    """Captures `model` by `capture`, or in parts where that cannot make one graph of it that computes the same.

    Raises:
        CalibrationError: as `capture`.
        CaptureError: no part that holds a linear can be captured either; says why the whole cannot.
    """
    try:
        return _captured(model, batches)
    except CaptureError as error:
        if isinstance(model, GraphModule):
            raise
        try:
            parts = [part for part in _parts_of(model, batches) if linears_by_weight(part.captured.graph)]
        except _CallError:
            raise error from None
        if not parts:
            raise
        return _as_one(model, parts, error)


def _captured(model: nn.Module, batches: Sequence[Batch]) -> Captured:
    found = capture(model, batches)
    check_same_values(model, found, batches[0])
    return found


class _CallError(CaptureError):
    """The model cannot be called with a batch at all."""


@dataclass(frozen=True)
class _Part:
    name: str
    captured: Captured


class _Within(nn.Module):
    """A model of which one submodule is called: its graph has the names of the whole model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._name, part = name, model.get_submodule(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.get_submodule(self._name)(*args, **kwargs)

        forward.__signature__ = inspect.signature(part.forward)  # type: ignore[attr-defined]
        self.forward = forward


@dataclass
class _Calls:
    """What a submodule was called with: the first call in each batch, and how many there were."""

    first: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def _parts_of(model: nn.Module, batches: Sequence[Batch]) -> Iterator[_Part]:
    """The largest submodules that can be captured, in the order of the model."""
    pending = _children(model, "")
    while pending:
        recorded = _record(model, batches, pending)
        deeper: list[str] = []
        for name in pending:
            captured = _capture_part(model, name, recorded[name])
            if captured is None:
                deeper += _children(model, name)
            else:
                yield _Part(name, captured)
        pending = deeper


def _children(model: nn.Module, name: str) -> list[str]:
    """The submodules of one that hold a matrix."""
    children = model.get_submodule(name).named_children()
    held = [child for child, module in children if any(weight.ndim >= 2 for weight in module.parameters())]
    return [f"{name}.{child}".removeprefix(".") for child in held]


def _record(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> Mapping[str, _Calls]:
    """What submodules are called with when the model is called with each batch, in evaluation mode."""
    recorded = {name: _Calls() for name in names}
    weight = next(model.parameters(), None)

    def recorder(calls: _Calls) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if calls.counts[-1] == 0:  # a copy: what comes after may write into it
                calls.first.append(pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs)))
            calls.counts[-1] += 1

        return note

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(recorder(calls), with_kwargs=True)
        for name, calls in recorded.items()
    ]
    try:
        for batch in batches:
            for calls in recorded.values():
                calls.counts.append(0)
            args, kwargs = call_of(model, batch, None if weight is None else weight.device)
            try:
                with evaluation_mode(model), torch.no_grad():
                    model(*args, **kwargs)
            except Exception as failed:  # whatever the model's own code raises
                raise _CallError(f"{type(model).__name__} cannot be called with a batch: {failed}") from failed
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _capture_part(model: nn.Module, name: str, calls: _Calls) -> Captured | None:
    if len(calls.first) != len(calls.counts):  # not called in every batch, or no module that is called at all
        return None
    within = _Within(model, name)
    try:
        return _captured(within, [_by_name(within, *call) for call in calls.first])
    except (CaptureError, CalibrationError):  # then its own parts are tried
        return None


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """A call as a batch: its arguments by name, or all by position where they have no names."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for parameter, value in bound.arguments.items():
        kind = signature.parameters[parameter].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            if bound.kwargs:
                raise CaptureError("arguments without names beside arguments with names cannot be captured")
            return bound.args
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {parameter: value})
    return named


def _as_one(model: nn.Module, parts: Sequence[_Part], error: CaptureError) -> Captured:
    """One graph of several, which have no values in common; their placeholders are named by their parts."""
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    parts = sorted(parts, key=lambda part: place[part.name])
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    graph, held, outputs = Graph(), dict[str, Any](), list[Any]()
    copies: list[dict[Node, Node]] = [{} for _ in parts]
    for index, (part, copied) in enumerate(zip(parts, copies, strict=True)):
        for node in part.captured.graph.graph.find_nodes(op="placeholder"):
            copied[node] = graph.placeholder(f"part{index}_{node.target}")
            copied[node].meta = dict(node.meta)
    for index, (part, copied) in enumerate(zip(parts, copies, strict=True)):
        of_part = part.captured.graph
        outputs.append(graph.graph_copy(of_part.graph, copied))
        for node in of_part.graph.find_nodes(op="get_attr"):
            if not node.users:  # of another part
                graph.erase_node(copied[node])
                continue
            value = attrgetter(str(node.target))(of_part)
            if own.get(str(node.target)) is not value:  # a constant that the part made
                copied[node].target = f"part{index}_{str(node.target).replace('.', '_')}"
            held[str(copied[node].target)] = value
    graph.output(tuple(outputs))
    whole = GraphModule(held, graph)
    batches = zip(*(part.captured.inputs for part in parts), strict=True)
    inputs = [[value for values in batch for value in values] for batch in batches]
    reason, names = str(error).partition("\n")[0], [part.name for part in parts]
    shown = ", ".join(names[:_PARTS_NAMED]) + (f" and {len(names) - _PARTS_NAMED} more" * (len(names) > _PARTS_NAMED))
    return Captured(
        whole,
        inputs,
        TokenMasks(whole, inputs),
        WeightsInMemory(whole),
        device=parts[0].captured.device,
        parts=tuple(names),
        notes=(f"captured in parts, each calibrated on what the dense model calls it with: {shown}; {reason}",),
    )

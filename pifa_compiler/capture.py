"""Capture: a model and its calibration batches as one functional graph of ATen operations."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .errors import CalibrationError, CaptureError
from .passes import Canonicalize, run_passes

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""One call of a model: a tensor (its first argument), a sequence (positional) or a mapping (keyword arguments)."""


@dataclass(frozen=True)
class Captured:
    """A model's graph, with the inputs that its placeholders take.

    Attributes:
        graph: canonical and functional: linears are `aten.linear.default`, nothing is written in place, and weights are
            `get_attr` nodes that carry their state-dict names and share the model's storage.
        inputs: for every batch, one value per placeholder, in order.
        token_masks: for every batch the mask [batch, tokens] of the tokens that count, or None where all do.
    """

    graph: GraphModule
    inputs: list[list[Any]]
    token_masks: list[Tensor | None]


def capture(model: nn.Module, batches: Iterable[Batch]) -> Captured:
    """Captures `model` by `torch.export`, in evaluation mode and without a KV cache.

    Args:
        model: any exportable module; its weights are shared with the graph, not copied.
        batches: calls to capture it for; dimensions that differ between batches become dynamic. Their tensors are moved
            to the device of the model.

    Raises:
        CalibrationError: there is no batch, or the batches differ in more than their shapes.
        CaptureError: `torch.export` cannot express the model as one graph.
    """
    calls = [_call_of(model, batch) for batch in batches]
    if not calls:
        raise CalibrationError("at least one calibration batch is needed, none came")
    flat = [pytree.tree_flatten(call) for call in calls]
    if any(spec != flat[0][1] for _, spec in flat):
        raise CalibrationError("all calibration batches must pass the same arguments; they differ in structure")
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = False  # not eval(): exported graphs refuse to be called so
    try:
        graph = _export(model, calls[0], _dynamic_shapes([values for values, _ in flat], flat[0][1]))
    finally:
        for module, mode in training.items():
            module.training = mode
    run_passes(graph, [Canonicalize()])
    return Captured(graph, [values for values, _ in flat], [kwargs.get("attention_mask") for _, kwargs in calls])


def _call_of(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        args = tuple(batch)
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        kwargs.setdefault("use_cache", False)
    weight = next(model.parameters(), None)
    if weight is None:
        return args, kwargs
    device = weight.device
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda value: value.to(device), (args, kwargs)
    )
    return moved


def _dynamic_shapes(batches: list[list[Any]], spec: pytree.TreeSpec) -> Any:
    """For every input the dimensions that differ between batches, as `torch.export` wants them; None if none does."""
    dynamic: list[dict[int, Any] | None] = []
    for values in zip(*batches, strict=True):
        if not isinstance(values[0], Tensor):
            dynamic.append(None)
            continue
        if any(value.ndim != values[0].ndim for value in values):
            raise CalibrationError("an input has another number of dimensions in some batches; pad or reshape them")
        sizes = [{value.shape[dim] for value in values} for dim in range(values[0].ndim)]
        dynamic.append({dim: torch.export.Dim.AUTO for dim, seen in enumerate(sizes) if len(seen) > 1})
    if not any(dynamic):
        return None
    args, kwargs = pytree.tree_unflatten(dynamic, spec)
    return {**dict(enumerate(args)), **kwargs} if not args else (*args, *kwargs.values())


def _export(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any) -> GraphModule:
    with torch.no_grad(), warnings.catch_warnings():
        # torch's own tree-spec classes warn about torch's own use of them while a program is exported.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*TreeSpec.*")
        try:
            program = torch.export.export(model, *call, dynamic_shapes=dynamic_shapes, strict=False)
            # An empty table decomposes nothing; it makes the graph functional, so that no value changes once made.
            graph: GraphModule = program.run_decompositions({}).module(check_guards=False)
            return graph
        except Exception as error:
            raise CaptureError(
                f"torch.export could not capture {type(model).__name__} as one graph: {error}\n"
                "Compress the submodule that holds the linears, or give batches of one shape"
            ) from error

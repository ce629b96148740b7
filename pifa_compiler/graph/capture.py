"""Capture: a model and its calibration batches as one functional graph of ATen operations."""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, CaptureError
from ..passes import Canonicalize, run_passes
from .run import Block, cut_into_blocks
from .token_masks import TokenMasks
from .traced_experts import copy_first_expert, first_expert_only
from .weights import Weights, WeightsBesideConstants, WeightsInMemory

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""One call of a model: a tensor (its first argument), a sequence (positional) or a mapping (keyword arguments)."""


@dataclass(frozen=True)
class Captured:
    """A model's graph, with the inputs that its placeholders take.

    Attributes:
        graph: canonical and functional: linears are `aten.linear.default`, nothing is written in place, and weights are
            `get_attr` nodes that carry their state-dict names and share the model's storage.
        inputs: for every batch, one value per placeholder, in order.
        masks: which tokens count, by the masks among the inputs.
        weights: where the values of `get_attr` nodes come from.
        block_bytes: how much of the weights a block should read at most; None if that does not matter.
        device: where inputs and weights are.
        parts: the submodules that the graph consists of, each by itself; none where it is all of the model.
        notes: what was out of the ordinary.
    """

    graph: GraphModule
    inputs: list[list[Any]]
    masks: TokenMasks
    weights: Weights
    block_bytes: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def blocks(self, last: Node) -> list[Block]:
        """Cuts what `last` needs into blocks: as many as the root of the number of linears, or as their weights ask.

        With that many, what crosses between blocks and what is made within one take about the same memory.
        """
        linears = self.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        count = math.isqrt(len(linears))
        if self.block_bytes is not None:
            stored = sum(parameter.numel() * parameter.element_size() for parameter in self.graph.parameters())
            count = max(count, math.ceil(stored / self.block_bytes))
        return cut_into_blocks(self.graph, last, max(count, 1))


def capture(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weights: Weights | None = None,
    device: torch.device | None = None,
    block_bytes: int | None = None,
) -> Captured:
    """Captures `model` by `torch.export`, in evaluation mode and without a KV cache.

    Args:
        model: any exportable module; its weights are shared with the graph, not copied.
        batches: calls to capture it for; dimensions that differ between batches become dynamic. Their tensors are moved
            to the device of the model.
        weights: where the weights are, of a model whose own are on the meta device; None for those of the model.
        device: where `weights` come to; None is the CPU.
        block_bytes: see `Captured`.

    Raises:
        CalibrationError: there is no batch, or the batches differ in more than their shapes, or the graph that holds
            for one of them does not for another.
        CaptureError: `torch.export` cannot express the model as one graph, or its weights are of inference mode.
    """
    if weights is not None:
        device = torch.device("cpu") if device is None else device
    elif (weight := next(model.parameters(), None)) is not None:
        device = weight.device
    calls = [call_of(model, batch, device) for batch in batches]
    if not calls:
        raise CalibrationError("at least one calibration batch is needed, none came")
    flat = [pytree.tree_flatten(call) for call in calls]
    if any(spec != flat[0][1] for _, spec in flat):
        raise CalibrationError("all calibration batches must pass the same arguments; they differ in structure")
    for values in zip(*(values for values, _ in flat), strict=True):
        other = next((value for value in values if not _is_like(value, values[0])), values[0])
        if other is not values[0]:
            raise CalibrationError(
                f"all calibration batches must pass the same arguments beside tensors; {values[0]!r} and {other!r} came"
            )
    frozen = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if frozen is not None and not torch.is_inference_mode_enabled():
        raise CaptureError(
            f"{frozen} was made under torch.inference_mode(), where torch.export cannot follow it; make or load the "
            "model outside of it, under torch.no_grad() if need be"
        )
    inputs = [values for values, _ in flat]
    dynamic = _dynamic_dims(inputs)
    if weights is not None:
        model = _with_stand_ins(model, device)
    with evaluation_mode(model), first_expert_only(model):
        graph = _export(model, _example(inputs, dynamic), flat[0][1], dynamic)
    copy_first_expert(graph, model)
    if weights is not None:
        _take_stand_ins_out(graph)
    _check_shapes(graph, inputs)
    run_passes(graph, [Canonicalize()])
    own = WeightsInMemory(graph)
    source = own if weights is None else WeightsBesideConstants(own, weights)
    place = torch.device("cpu") if device is None else device
    return Captured(graph, inputs, TokenMasks(graph, inputs), source, block_bytes, place)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` is in evaluation mode; each of its modules has its own mode again afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:
            module.training = False  # not eval(): exported graphs refuse to be called so
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _with_stand_ins(model: nn.Module, device: torch.device | None) -> nn.Module:
    """A copy whose parameters claim to lie on `device` and hold nothing: its code goes the ways it goes with values."""
    copied = copy.deepcopy(model)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stand_ins: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in stand_ins:
                with mode:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    stand_ins[id(parameter)] = nn.Parameter(values, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = stand_ins[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer.to(device), static_shapes=True)
    return copied


def _take_stand_ins_out(graph: GraphModule) -> None:
    """Puts tensors on the meta device in the place of stand-ins.

    Raises:
        CaptureError: the graph holds a tensor that was made while the model was captured, and so has no values.
    """
    made = [name for name, value in vars(graph).items() if is_fake(value)]
    if made:
        raise CaptureError(
            f"the model makes a tensor of its own while it is called ({made[0]}), which has no values without its "
            "weights; load it into memory and call compress() on it"
        )
    for module in graph.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_fake(parameter):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and is_fake(buffer):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")


def call_of(model: nn.Module, batch: Batch, device: torch.device | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments (by position, by name) that a batch calls a model with: on a device, and without a KV cache."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        args = tuple(batch)
    if _may_cache(model):
        kwargs.setdefault("use_cache", False)
    if device is None:
        return args, kwargs
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda value: value.to(device), (args, kwargs)
    )
    return moved


def _may_cache(model: nn.Module) -> bool:
    """Whether a Hugging Face model, or the language model in one of several, may keep a KV cache."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    configs = [config, *([text(decoder=True)] if callable(text) else [])]
    return any(getattr(each, "use_cache", None) is not None for each in configs)


def _is_like(value: Any, first: Any) -> bool:
    """Whether an argument may stand where another does: a graph is captured for one number, text or flag."""
    return type(value) is type(first) and (not isinstance(first, bool | int | float | str) or value == first)


def _dynamic_dims(batches: list[list[Any]]) -> list[list[int]]:
    """For every input the dimensions that differ between batches."""
    dynamic: list[list[int]] = []
    for values in zip(*batches, strict=True):
        if not isinstance(values[0], Tensor):
            dynamic.append([])
            continue
        if any(value.ndim != values[0].ndim for value in values):
            raise CalibrationError("an input has another number of dimensions in some batches; pad or reshape them")
        sizes = [{value.shape[dim] for value in values} for dim in range(values[0].ndim)]
        dynamic.append([dim for dim, seen in enumerate(sizes) if len(seen) > 1])
    return dynamic


def _example(batches: list[list[Any]], dynamic: list[list[int]]) -> list[Any]:
    """The inputs to capture with: what `torch.export` sees as 1 it takes for always 1, so no dynamic size is that."""

    def ones(values: Iterable[Any]) -> int:
        return sum(value.shape[dim] == 1 for value, dims in zip(values, dynamic, strict=True) for dim in dims)

    example = list(min(batches, key=ones))
    for place, dims in enumerate(dynamic):
        for dim in dims:
            if example[place].shape[dim] == 1:
                example[place] = example[place].repeat_interleave(2, dim)
    return example


def _export(model: nn.Module, example: list[Any], spec: pytree.TreeSpec, dynamic: list[list[int]]) -> GraphModule:
    args, kwargs = pytree.tree_unflatten(example, spec)
    shapes: Any = None
    if any(dynamic):
        each = [dict.fromkeys(dims, torch.export.Dim.AUTO) or None for dims in dynamic]
        by_position, by_name = pytree.tree_unflatten(each, spec)
        shapes = {**dict(enumerate(by_position)), **by_name} if not by_position else (*by_position, *by_name.values())
    with torch.no_grad(), warnings.catch_warnings():
        # torch's own tree-spec classes warn about torch's own use of them while a program is exported.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*TreeSpec.*")
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            # An empty table decomposes nothing; it makes the graph functional, so that no value changes once made.
            graph: GraphModule = program.run_decompositions({}).module(check_guards=False)
            return graph
        except Exception as error:
            raise CaptureError(
                f"torch.export could not capture {type(model).__name__} as one graph: {error}\n"
                "Compress the submodule that holds the linears, or give batches of one shape"
            ) from error


def _check_shapes(graph: GraphModule, batches: list[list[Any]]) -> None:
    """Refuses batches whose sizes the graph was not captured for: `torch.export` may find that a size must be fixed."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    for index, values in enumerate(batches):
        sizes: dict[str, int] = {}
        for node, value in zip(placeholders, values, strict=True):
            captured = node.meta.get("val")
            if not isinstance(value, Tensor) or not isinstance(captured, Tensor):
                continue
            for dim, (size, expected) in enumerate(zip(value.shape, captured.shape, strict=True)):
                # A number, also where it was a symbol until it was found to be fixed, or a symbol, of which all sizes
                # are equal; sizes that are expressions of symbols (2 s, s + 1) are left to the run itself.
                text = str(expected)
                wanted = int(text) if text.isdigit() else sizes.setdefault(text, size)
                if size != wanted:
                    raise CalibrationError(
                        f"the model's graph holds only for inputs whose sizes are those of the batch that it was "
                        f"captured with: in batch {index} dimension {dim} of {node.target} is {size}, and would have "
                        f"to be {wanted}; give batches of one shape"
                    )

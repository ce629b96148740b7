"""Whether a captured graph computes what its model does.

`torch.export` follows a model's code, and code may go another way while it is followed: PaliGemma's attention looks
both ways when it is called, and has a causal mask when it is exported (transformers 5.23). So both are called once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, CaptureError
from .capture import Batch, Captured, call_of, evaluation_mode
from .run import call_node

_ROWS = 1024
"""Rows of an output that are compared at once: logits of all tokens are large, and so would be their difference."""


def check_same_values(model: nn.Module, captured: Captured, batch: Batch) -> None:
    """Calls a model, in evaluation mode, and its graph with the batch that comes first in `captured`.

    Outputs of floating point must agree to the root of the rounding error of the lowest precision among weights and
    outputs, as relative norms: all but half of the digits are left to what rounding does on the way.

    Raises:
        CaptureError: they differ, or one cannot be called. Models whose outputs are random are not refused.
    """
    args, kwargs = call_of(model, batch, captured.device)
    wanted = _of_model(model, args, kwargs)
    got = _of_graph(captured)
    coarsest = max((torch.finfo(value.dtype).eps for value in _floats([*model.parameters(), *wanted])), default=0.0)
    found = _difference(got, wanted)
    if found <= coarsest**0.5:
        return
    again = _difference(_of_model(model, args, kwargs, seed=1), wanted)
    if not again <= coarsest**0.5:
        return
    raise CaptureError(
        f"the graph that torch.export made of {type(model).__name__} computes something else than the model: outputs "
        f"differ by {found:.2g} of their norm, and {coarsest**0.5:.2g} would be rounding"
    )


def _of_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0) -> list[Tensor]:
    try:
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            args, kwargs = _copies((args, kwargs))
            return _floats(pytree.tree_leaves(model(*args, **kwargs)))
    except Exception as error:  # whatever the model's own code raises
        raise CaptureError(f"{type(model).__name__} cannot be called with a batch: {error}") from error


class _NodeByNode(Interpreter):
    """Runs a graph as the sweep does."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.graph)
        self._weights = captured.weights

    def run_node(self, n: Node) -> Any:
        return call_node(self._weights, n, self.env) if n.op == "call_function" else super().run_node(n)


def _of_graph(captured: Captured) -> list[Tensor]:
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            outputs = _NodeByNode(captured).run(*_copies(captured.inputs[0]), enable_io_processing=False)
            return _floats(pytree.tree_leaves(outputs))
    except CalibrationError as error:
        raise CaptureError(f"the graph that torch.export made cannot be computed: {error}") from error


def _copies(values: Any) -> Any:
    """The same values in tensors that may be written into, as some models do with their inputs."""
    return pytree.tree_map_only(Tensor, torch.clone, values)


def _floats(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest of ||a - b|| / ||b|| over pairs of tensors; infinite where there are others, or of other shapes."""
    if [value.shape for value in got] != [value.shape for value in wanted]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    lost = total = 0.0
    rows_of_a, rows_of_b = (x.detach().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (a, b))
    for start in range(0, len(rows_of_b), _ROWS):
        x, y = (rows[start : start + _ROWS].double() for rows in (rows_of_a, rows_of_b))
        same = (x == y) | (x.isnan() & y.isnan())  # infinite ones among them, as in masks
        lost += float((x - y).masked_fill_(same, 0).square_().sum())
        total += float(y.masked_fill(~y.isfinite(), 0).square_().sum())
    return (lost / total) ** 0.5 if total else (0.0 if lost == 0 else float("inf"))

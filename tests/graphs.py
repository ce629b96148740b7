"""Captures of small models, for the tests of passes."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from pifa_compiler.passes.weights import bind_inputs
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from pifa_compiler.report import Report

Capture = Callable[[nn.Module, tuple[Any, ...]], GraphModule]


def low_rank(d_out: int, d_in: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random weight of this rank with entries of about 1 / sqrt(d_in)."""
    u, v = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    return (u @ v / (rank * d_in) ** 0.5).to(dtype)


def with_nearest_weights(dense: nn.Module, report: Report) -> nn.Module:
    """A copy of a dense model with the nearest weights (Eckart-Young) of the ranks that a report gives its layers.

    What `compress` makes must be better than that on what it was calibrated on.
    """
    model = copy.deepcopy(dense)
    for layer in report.factorized:
        weight = model.get_submodule(layer.name).weight.data
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(left[:, : layer.rank] * singular[: layer.rank] @ right[: layer.rank])
    return model


def op_counts(gm: GraphModule) -> dict[Any, int]:
    """How often each operator is called."""
    calls = ("call_function", "call_method", "call_module")
    return dict(Counter(node.target for node in gm.graph.nodes if node.op in calls))


def capture_by_symbolic_trace(model: nn.Module, args: tuple[Any, ...]) -> GraphModule:
    return symbolic_trace(model)


def capture_by_export(model: nn.Module, args: tuple[Any, ...]) -> GraphModule:
    return torch.export.export(model, args, strict=False).module(check_guards=False)


def capture_by_dynamo(model: nn.Module, args: tuple[Any, ...]) -> GraphModule:
    """The graph that a backend receives, its weights bound; call it with `args` alone."""
    captured: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
        captured.append((gm, list(example_inputs)))
        return gm

    torch.compile(model, backend=backend, fullgraph=True)(*args)
    ((gm, example_inputs),) = captured
    bind_inputs(gm, example_inputs)
    inputs = {id(arg): i for i, arg in enumerate(args)}
    places = [inputs.get(id(value)) for value in example_inputs]
    gm.call_with = lambda *new: type(gm).forward(
        gm, *(value if place is None else new[place] for value, place in zip(example_inputs, places, strict=True))
    )
    return gm


def call(gm: GraphModule, *args: Any) -> Any:
    """Runs a captured graph on the model's own arguments."""
    result = getattr(gm, "call_with", gm)(*args)
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


CAPTURES = {"symbolic_trace": capture_by_symbolic_trace, "export": capture_by_export, "dynamo": capture_by_dynamo}

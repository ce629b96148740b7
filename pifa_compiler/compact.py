"""`compact`: low-rank pairs and singular weights become PIFA layers, in place and without loss."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace

from .absorb import absorb_orders, layer_sites
from .capture import Batch, capture
from .checkpoint import describe_if_pretrained, refuse_other_quantization
from .errors import CaptureError
from .factors import PifaFactors, factorize, stored_numbers
from .linear import PifaLinear
from .linears import (
    count_numbers,
    embedding_storages,
    is_plain_linear,
    module_at,
    replace_linear,
    uses_of_weights,
    weight_name,
    weight_of,
)
from .passes import Skip
from .passes.factorize_linear import detect
from .report import LayerReport, Report


def compact(model: nn.Module, example: Batch | None = None) -> Report:
    """Brings every low-rank weight of a model into PIFA form, in place; outputs change by rounding only.

    Found are: modules that are a chain of two linears (`nn.Sequential(V, U)`, or any module whose forward is U(V(x)));
    linears that follow each other anywhere in the model's graph, if it can be captured; and single linears whose weight
    is singular, whoever made them.

    Args:
        model: any module; the layers that change are replaced in it.
        example: one call to capture the model for, as in `compress`, on any device. None takes a Hugging Face model's
            own `dummy_inputs`; without either, pairs are looked for in modules only.

    Returns:
        What was done: an entry for every linear or pair, those left alone with their reason.

    Raises:
        CheckpointError: the model's config says that it is quantized by another method.
    """
    started = time.perf_counter()
    refuse_other_quantization(model)
    report = Report("lossless", None, params_before=count_numbers(model))
    _compact_chains(model, report)
    _compact_graph_pairs(model, example, report)
    _compact_singular(model, report)
    _absorb_orders(model, example, report)
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: place.get(layer.name, len(place)))
    report.params_after = count_numbers(model)
    report.seconds = time.perf_counter() - started
    describe_if_pretrained(model, report)
    return report


def _compact_chains(model: nn.Module, report: Report) -> None:
    """Modules whose whole forward is U(V(x)) + bias: the module itself is replaced."""
    for name, module in list(model.named_modules()):
        if name and (chain := _chain_of(module)) is not None:
            first, second = chain
            factors = _pair_factors(name, first, second, report)
            if factors is not None:
                bias = second.bias if isinstance(second.bias, Tensor) else None
                model.set_submodule(name, _layer(factors, bias, second).train(module.training))


def _chain_of(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    children = list(module.children())
    if len(children) != 2 or not all(type(child) is nn.Linear for child in children):
        return None
    if len(list(module.parameters(recurse=False))) > 0 or _has_hooks(module):
        return None
    try:
        graph = symbolic_trace(module).graph
    except (torch.fx.proxy.TraceError, TypeError, AttributeError, ValueError):
        return None  # its forward depends on values: it is more than a chain
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs, (result,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    chained = (
        len(inputs) == 1
        and [node.op for node in calls] == ["call_module", "call_module"]
        and calls[0].args == (inputs[0],)
        and calls[1].args == (calls[0],)
        and result.args == (calls[1],)
    )
    if not chained:
        return None
    return module.get_submodule(str(calls[0].target)), module.get_submodule(str(calls[1].target))


def _compact_graph_pairs(model: nn.Module, example: Batch | None, report: Report) -> None:
    """Linears that follow each other in the model's graph: the first becomes the PIFA layer, the second an identity."""
    if not any(is_plain_linear(module) for module in model.modules()):
        return
    captured = _capture(model, example, report)
    if captured is None:
        return
    graph = captured.graph
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    uses = uses_of_weights(captured)
    for node in linears:
        inner = node.args[0]
        if not isinstance(inner, Node) or inner not in linears or len(inner.users) > 1:
            continue
        names = [weight_name(linear).removesuffix(".weight") for linear in (inner, node)]
        first, second = (module_at(model, name) for name in names)
        once = uses[weight_name(inner)] == uses[weight_name(node)] == 1
        if not once or first is None or second is None or not (is_plain_linear(first) and is_plain_linear(second)):
            continue
        factors = _pair_factors(names[0], first, second, report)
        if factors is not None:
            bias = second.bias if isinstance(second.bias, Tensor) else None
            model.set_submodule(names[0], _layer(factors, bias, second).train(first.training))
            model.set_submodule(names[1], nn.Identity())


def _absorb_orders(model: nn.Module, example: Batch | None, report: Report) -> None:
    """Row orders go into the layers behind, where the model's graph is known."""
    if not any(isinstance(module, PifaLinear) and module.order is not None for module in model.modules()):
        return
    captured = _capture(model, example, report)
    absorbed = absorb_orders(model, layer_sites(captured)) if captured is not None else {}
    for index, layer in enumerate(report.layers):
        if layer.name in absorbed:
            note = f"row order absorbed by {absorbed[layer.name]}"
            report.layers[index] = replace(layer, notes=(*layer.notes, note))


def _capture(model: nn.Module, example: Batch | None, report: Report) -> GraphModule | None:
    """The model's graph; None, with a note in `report`, if there is nothing to call it with that fits."""
    call = example if example is not None else getattr(model, "dummy_inputs", None)
    if call is None:
        report.note("no example was given: pairs are looked for in modules only, and row orders stay")
        return None
    try:
        return capture(model, [call]).graph
    except CaptureError as error:
        if example is not None:
            raise
        report.note(f"the model's own dummy_inputs do not fit its forward, so its graph was not searched: {error}")
        return None


def _compact_singular(model: nn.Module, report: Report) -> None:
    embedded = embedding_storages(model)
    known = {layer.name for layer in report.layers}
    parents = tuple(f"{name}." for name in known)
    owners: dict[int, int] = {}
    for module in model.modules():
        if is_plain_linear(module):
            address = weight_of(module).untyped_storage().data_ptr()
            owners[address] = owners.get(address, 0) + 1
    for name, module in list(model.named_modules()):
        if not name or not is_plain_linear(module) or name in known or (parents and name.startswith(parents)):
            continue
        weight = weight_of(module)
        d_out, d_in = weight.shape
        address = weight.untyped_storage().data_ptr()
        tied = address in embedded or owners[address] > 1
        found: PifaFactors | Skip = Skip("weight is tied to another module") if tied else detect(weight)
        if isinstance(found, Skip):
            report.layers.append(LayerReport.of_skip(name, (d_out, d_in), found.reason, target=not tied))
            continue
        replace_linear(model, name, found)
        report.layers.append(LayerReport.of_factors(name, (d_out, d_in), found.rank, found.quality))


def _pair_factors(name: str, first: nn.Module, second: nn.Module, report: Report) -> PifaFactors | None:
    """Factors of the pair U(V(x)), recorded in `report`; None, recorded too, where PIFA is not to be had."""
    v, u = weight_of(first), weight_of(second)
    shape, pair = (u.shape[0], v.shape[1]), u.numel() + v.numel()
    reason = None
    if isinstance(first.bias, Tensor):
        reason = "there is a bias between the two linears"
    elif u.shape[1] >= min(shape):
        reason = f"the pair is not low-rank: width {u.shape[1]} between {shape[1]} inputs and {shape[0]} outputs"
    elif u.dtype is not v.dtype or u.device != v.device:
        reason = "the two weights differ in dtype or device"
    if reason is None:
        factors = factorize((u, v))
        if stored_numbers(*shape, factors.rank) < pair:
            report.layers.append(LayerReport.of_factors(name, shape, factors.rank, factors.quality, stored_before=pair))
            return factors
        reason = f"PIFA at rank {factors.rank} would not be smaller than the pair"
    report.layers.append(LayerReport(name, shape, None, reason, True, pair, pair))
    return None


def _layer(factors: PifaFactors, bias: Tensor | None, second: nn.Module) -> PifaLinear:
    trainable = any(parameter.requires_grad for parameter in second.parameters())
    return PifaLinear.from_factors(factors, bias, trainable)


def _has_hooks(module: nn.Module) -> bool:
    hooks: list[Mapping[Any, Any]] = [module._forward_hooks, module._forward_pre_hooks]
    return any(hooks)

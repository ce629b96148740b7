"""`compact`: low-rank pairs and singular weights become PIFA layers, in place and without loss."""

import time
from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule

from .checkpoint import describe_if_pretrained
from .checkpoint.format import refuse_other_quantization
from .errors import CaptureError, RankError
from .exchange.absorb import absorb_orders, enclosed_sites, layer_sites
from .exchange.allowed import Exchangeable
from .exchange.atomic import Exchange
from .exchange.enclosure import Enclosure
from .exchange.expert_layers import ExpertLayers, find_experts, put_together
from .exchange.heads_in_basis import put_heads_in_basis
from .exchange.pairs import Pair, find_pairs, identity_behind, trace
from .experts import layer_name
from .factors import PifaFactors, factorize_losslessly, stored_numbers
from .graph.capture import Batch, Captured, capture
from .linear import PifaLinear
from .modules import attributes_of_its_own, bias_of, count_numbers, is_plain_linear, layer_of, weight_of
from .numerics import own_numerics
from .passes import Skip
from .passes.factorize_linear import detect
from .report import LayerReport, Report

_ZERO = Skip("weight is zero, which has no PIFA form")


@own_numerics()
def compact(model: nn.Module, example: Batch | None = None, *, attention: bool = False) -> Report:
    """Brings every low-rank weight of a model into PIFA form, in place; outputs change by rounding only.

    Found are: linears that follow each other in the model's graph, U(V(x)), of which nothing else uses the parts (a
    module that is nothing but the two, such as `nn.Sequential(V, U)`, becomes one layer); and single linears whose
    weight is singular, whoever made them; experts too, where those of all are. The model is changed once everything is
    computed: an error or an interrupt leaves it as it was. What cannot be shown to be safe is left alone, with its
    reason; code outside the model, which uses parts of it from there, is not seen.

    Args:
        model: any module; the layers that change are replaced in it.
        example: one call to capture the model for, as in `compress`, on any device. None takes a Hugging Face model's
            own `dummy_inputs`; without either, the model is traced without values, where its code allows that.
        attention: whether heads of attention are put into a basis of inputs too (`BasisLinear`): values, and keys where
            nothing stands between them and queries. It takes a call to capture the model for.

    Returns:
        What was done: an entry for every linear or pair, those left alone with their reason.

    Raises:
        CaptureError: the model cannot be captured for `example`.
        CheckpointError: the model's config says that it is quantized by another method.
    """
    started = time.perf_counter()
    refuse_other_quantization(model)
    report = Report("lossless", None, params_before=count_numbers(model))
    captured = _capture(model, example, report)
    graph = _trace(model, report) if captured is None else captured.graph
    new = _NewLayers(model, graph, report)
    new.add_pairs()
    new.add_singular()
    new.add_experts()
    if captured is None and any(isinstance(layer, PifaLinear) for layer in new.layers.values()):
        report.note("row orders stay: without an example it is not known what reads the outputs of a layer")
    elif captured is not None:
        new.absorb(captured.graph)
    if attention and captured is not None:
        new.put_heads_in_basis(captured)
    elif attention:
        report.note("attention stays as it is: without an example it is not known what reads its heads")
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: place.get(layer.name, len(place)))
    with Exchange() as exchange:
        for name, layer in new.layers.items():
            exchange.module(model, name, layer)
        report.params_after = count_numbers(model)
        report.describe_rest(model)
        describe_if_pretrained(model, report, exchange)
        report.seconds = time.perf_counter() - started
        return report


class _NewLayers:
    """The layers that a model is to get, by name, and the entries of its report."""

    def __init__(self, model: nn.Module, graph: GraphModule | None, report: Report) -> None:
        self.model, self.graph, self.report = model, graph, report
        self.layers: dict[str, nn.Module] = {}
        self._exchangeable = Exchangeable(model, graph)
        self._enclosure = Enclosure(model)
        self._places: dict[str, str] = {}  # of the linears of pairs

    def add_pairs(self) -> None:
        """The layers that pairs become."""
        if self.graph is None:
            return
        for pair in find_pairs(self.model, self.graph, self._exchangeable, self._enclosure):
            first, second = (self.model.get_submodule(name) for name in (pair.first, pair.second))
            v, u = weight_of(first), weight_of(second)
            shape, stored = (u.shape[0], v.shape[1]), u.numel() + v.numel()
            factors = _factors_of_pair(pair, u, v)
            self._places.update({pair.first: pair.place, pair.second: pair.place})
            if isinstance(factors, Skip):
                if not self._add_singular_parts(pair):
                    entry = LayerReport(pair.place, shape, None, factors.reason, True, stored, stored)
                    self.report.layers.append(entry)
                continue
            trainable = any(part.weight.requires_grad for part in (first, second))
            layer = PifaLinear.from_factors(factors, bias_of(second), trainable)
            layer.train(self.model.get_submodule(pair.place).training)
            self.layers[pair.place] = layer
            if not pair.is_whole:
                vars(layer).update(attributes_of_its_own(first))
                self.layers[pair.second] = identity_behind(pair.first.rpartition(".")[2]).train(second.training)
            self.report.layers.append(
                LayerReport.of_factors(pair.place, shape, factors.rank, factors.quality, stored_before=stored)
            )

    def add_singular(self) -> None:
        """Single linears whose weight is singular, and why all others stay."""
        for name, module in self.model.named_modules():
            if not name or name in self._places:
                continue
            if is_plain_linear(module):
                self.report.layers.append(self._add_if_singular(name, module))
            elif isinstance(module, nn.Linear):
                shape, reason = (module.out_features, module.in_features), str(self._exchangeable.why_not(name))
                self.report.layers.append(LayerReport.of_skip(name, shape, reason, target=False))

    def add_experts(self) -> None:
        """Projections of experts, all of whose weights are singular, and why the others stay."""
        experts = find_experts(self.model)
        new: dict[str, nn.Module] = {}
        for place, layers in experts.layers.items():
            found = {name: _factors_of_experts(layers, name) for name in layers.projections}
            for name, each in found.items():
                path, shape = layer_name(place, name), (layers.num_experts, *weight_of(layers.layer(name, 0)).shape)
                reasons = [part.reason for other in layers.beside(name) if isinstance(part := found[other], Skip)]
                if reasons or isinstance(each, Skip):
                    self.report.layers.append(LayerReport.of_skip(path, shape, reasons[0], target=True))
                    continue
                parts = [LayerReport.of_factors(path, shape[1:], one.rank, one.quality) for one in each]
                self.report.layers.append(LayerReport.of_experts(path, parts))
                for expert, one in enumerate(each):
                    new[f"{place}.{name}.{expert}"] = layer_of(one, layers.layer(name, expert))
        self.layers.update(put_together(experts, new))
        self.report.layers += experts.reports(self.model)

    def absorb(self, graph: GraphModule) -> None:
        """Row orders go into the layers behind, where the model's graph is known."""
        places = {name: place for name, place in self._places.items() if place in self.layers}
        sites, reasons = enclosed_sites(
            layer_sites(graph, places), self._exchangeable, self._enclosure, self.layers.keys()
        )
        absorbed = absorb_orders(self.model, sites, self.layers)
        notes = {name: f"row order absorbed by {readers}" for name, readers in absorbed.items()}
        for index, layer in enumerate(self.report.layers):
            note = notes.get(layer.name) or (reasons.get(layer.name) if layer.rank is not None else None)
            if note is not None:
                self.report.layers[index] = replace(layer, notes=(*layer.notes, note))

    def put_heads_in_basis(self, captured: Captured) -> None:
        """Heads of attention, where the model's graph and its code show what reads them."""
        done = put_heads_in_basis(self.model, captured, self._exchangeable, self.layers)
        for index, layer in enumerate(self.report.layers):
            layer = done.made.get(layer.name, layer)
            notes = done.notes.get(layer.name, [])
            self.report.layers[index] = replace(layer, notes=(*layer.notes, *notes))

    def _add_singular_parts(self, pair: Pair) -> bool:
        """Whether one of a pair's linears is singular by itself; then both are left to `add_singular`."""
        parts = {name: self.model.get_submodule(name) for name in (pair.first, pair.second)}
        entries = [self._add_if_singular(name, module) for name, module in parts.items()]
        if all(entry.rank is None for entry in entries):
            return False
        for name in parts:
            del self._places[name]
        return True

    def _add_if_singular(self, name: str, module: nn.Module) -> LayerReport:
        weight = weight_of(module)
        shape = (weight.shape[0], weight.shape[1])
        reason = self._exchangeable.why_not(name)
        if reason is not None:
            return LayerReport.of_skip(name, shape, reason, target=False)
        found = detect(weight) if bool(weight.any()) else _ZERO
        if isinstance(found, Skip):
            return LayerReport.of_skip(name, shape, found.reason, target=True)
        self.layers[name] = layer_of(found, module)
        return LayerReport.of_factors(name, shape, found.rank, found.quality)


def _factors_of_experts(layers: ExpertLayers, projection: str) -> list[PifaFactors] | Skip:
    """The factors of a projection of all experts, or why it stays dense."""
    factors = []
    for expert in range(layers.num_experts):
        weight = weight_of(layers.layer(projection, expert))
        found = detect(weight) if bool(weight.any()) else _ZERO
        if isinstance(found, Skip):
            return Skip(f"{projection} of expert {expert}: {found.reason}")
        factors.append(found)
    return factors


def _factors_of_pair(pair: Pair, u: torch.Tensor, v: torch.Tensor) -> PifaFactors | Skip:
    """The factors of u [out, rank] v [rank, in], or why they stay two."""
    if pair.reason is not None:
        return Skip(pair.reason)
    try:
        factors = factorize_losslessly((u, v))
    except RankError as error:  # zero, not finite, or with no room in its dtype
        return Skip(str(error))
    if stored_numbers(u.shape[0], v.shape[1], factors.rank) >= u.numel() + v.numel():
        return Skip(f"PIFA at rank {factors.rank} would not be smaller than the pair")
    return factors


def _capture(model: nn.Module, example: Batch | None, report: Report) -> Captured | None:
    """The model captured; None, with a note in `report`, if there is nothing to call it with that fits."""
    call = example if example is not None else getattr(model, "dummy_inputs", None)
    if call is None:
        report.note("no example was given: the model is traced without values")
        return None
    try:
        return capture(model, [call])
    except CaptureError as error:
        if example is not None:
            raise
        report.note(f"the model's own dummy_inputs do not fit its forward, so it is traced without values: {error}")
        return None


def _trace(model: nn.Module, report: Report) -> GraphModule | None:
    """The model's graph without an example; None if it has no pairs, or, with a note, if its code needs values."""
    if sum(map(is_plain_linear, model.modules())) < 2:
        return None
    try:
        return trace(model)
    except Exception as error:  # noqa: BLE001  the model's own code, on values that are not there
        report.note(f"pairs stay as they are: the model cannot be traced without an example, give one ({error})")
        return None

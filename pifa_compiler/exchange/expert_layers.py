"""`ExpertLayers`: experts of a model as linear layers of their own, while the model is captured and calibrated.

A mixture of experts keeps the weights of all experts in one parameter [experts, out, in]. Here each expert has layers,
whose weights are views of it, and computes the tokens that are routed to it: in a captured graph they are linears like
any other, with inputs of their own. What is made of them is put together as `PifaExperts`, one layer a projection.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..experts import ExpertWeights, PifaExperts, PifaGroupedLinear, expert_weights, layer_name
from ..factors import FactorQuality, PifaFactors, with_rank
from ..graph.traced_experts import TracedExperts
from ..graph.weights import EntryView
from ..linear import PifaLinear
from ..modules import module_at
from ..report import LayerReport
from .allowed import Exchangeable, why_marked
from .atomic import Exchange


class ExpertLayers(TracedExperts):
    """Computes what an experts module does, from layers of its own: `gate_proj.3` is that of the fourth expert.

    Args:
        experts: the module to take over from.
        weights: its projections, as `expert_weights` finds them; they are not copied.
    """

    def __init__(self, experts: nn.Module, weights: Mapping[str, ExpertWeights]) -> None:
        super().__init__()
        self._experts = [experts]  # in a list, since it is no part of this module
        self.projections = tuple(weights)
        self.num_experts = len(next(iter(weights.values())).weight)
        for name, child in experts.named_children():  # an activation, a norm
            self.add_module(name, child)
        for name, each in weights.items():
            trainable = experts.get_parameter(_stored_in(name, self.projections)).requires_grad
            biases = [None] * len(each.weight) if each.bias is None else list(each.bias)
            layers = [_layer(*own, trainable) for own in zip(each.weight, biases, strict=True)]
            self.add_module(name, nn.ModuleList(layers))
        self.train(experts.training)

    @property
    def experts(self) -> Any:
        """The module that it takes over from; these have no class in common."""
        return self._experts[0]

    def compute(self, expert: int, x: Tensor) -> Tensor:
        """See `TracedExperts`."""
        experts = self.experts
        *made, down_proj = (self.layer(name, expert) for name in self.projections)
        if "gate_up_proj" in self.projections:
            hidden = experts._apply_gate(made[0](x))
        elif experts.has_gate:
            hidden = experts.act_fn(made[0](x)) * made[1](x)
        else:
            hidden = experts.act_fn(made[0](x))
        y: Tensor = down_proj(hidden)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        return y

    def without_values(self, projection: str, rank: int) -> PifaGroupedLinear:
        """A layer in PIFA form for a projection of all experts, on the meta device."""
        first = self.layer(projection, 0)
        d_out, d_in = first.weight.shape
        bias, dtype = first.bias is not None, first.weight.dtype
        return PifaGroupedLinear(self.num_experts, d_in, d_out, rank, bias, device="meta", dtype=dtype).eval()

    def stored_in(self, name: str) -> str:
        """The parameter of the experts that `gate_proj.3.weight`, or a bias, is a part of."""
        projection, _, part = name.split(".")
        stored = _stored_in(projection, self.projections)
        return stored if part == "weight" else f"{stored}_{part}"

    def beside(self, projection: str) -> list[str]:
        """The projections that lie in one parameter of the experts with `projection`, itself among them."""
        stored = _stored_in(projection, self.projections)
        return [each for each in self.projections if _stored_in(each, self.projections) == stored]

    def layer(self, projection: str, expert: int) -> nn.Linear:
        """The layer of one expert."""
        layer = self.layers(projection)[expert]
        assert isinstance(layer, nn.Linear)  # noqa: S101
        return layer


@dataclass(frozen=True)
class FoundExperts:
    """The modules of experts in a model.

    Attributes:
        layers: what stands in the place of those that may be exchanged, by name.
        left: why the others may not.
    """

    layers: dict[str, ExpertLayers] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def views(self) -> dict[str, EntryView]:
        """What the parameters of layers are parts of, all by their names in the model."""
        found = {}
        for place, stand_in in self.layers.items():
            for projection in stand_in.projections:
                for name, part in stand_in.layers(projection).named_parameters(prefix=projection):
                    stored = stand_in.stored_in(name)
                    whole = stand_in.experts.get_parameter(stored)
                    found[f"{place}.{name}"] = EntryView.between(part, whole, f"{place}.{stored}")
        return found

    def reports(self, model: nn.Module) -> list[LayerReport]:
        """An entry for every parameter of experts that are left as they are."""
        return [
            LayerReport.of_skip(f"{place}.{name}", tuple(parameter.shape), reason, target=False)
            for place, reason in self.left.items()
            for name, parameter in model.get_submodule(place).named_parameters(recurse=False)
            if parameter.ndim == 3
        ]


@contextmanager
def experts_as_layers(model: nn.Module, *, in_files: bool = False) -> Iterator[FoundExperts]:
    """While it lasts, all experts of `model` that may be exchanged have layers; `in_files` as in `find_experts`."""
    found = find_experts(model, in_files=in_files)
    with Exchange() as exchange:
        for name, layers in found.layers.items():
            exchange.module(model, name, layers)
        yield found
        exchange.undo()


def find_experts(model: nn.Module, *, in_files: bool = False) -> FoundExperts:
    """The modules of experts in `model`: those with parameters [experts, .., ..].

    Args:
        model: any.
        in_files: whether weights on the meta device have their values in files.
    """
    found = FoundExperts()
    names = [name for name, module in model.named_modules() if name and _has_experts(module)]
    if not names:
        return found
    exchangeable = Exchangeable(model, None)
    for name in names:
        experts = model.get_submodule(name)
        weights = expert_weights(experts)
        if isinstance(weights, str):
            found.left[name] = weights
            continue
        reason = why_marked(experts) or exchangeable.why_shared(name)
        if isinstance(model, GraphModule):
            reason = "they lie in a graph that was captured; compress the model that it was captured from"
        elif not in_files and any(parameter.is_meta for parameter in experts.parameters()):
            reason = "they have no values (meta device)"
        if reason is None:
            found.layers[name] = ExpertLayers(experts, weights)
        else:
            found.left[name] = reason
    return found


def _has_experts(module: nn.Module) -> bool:
    experts = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    return any(parameter.ndim == 3 and parameter.shape[0] == experts for _, parameter in own)


@dataclass(frozen=True)
class Projection:
    """One projection of all experts of a module.

    Attributes:
        path: the name of the layer that it becomes.
        experts: how many there are.
        together: its path, and those of what lies in one parameter with it: they become layers both, or neither.
    """

    path: str
    experts: int
    together: tuple[str, ...]

    @property
    def layers(self) -> list[str]:
        """The names of the single experts' layers, in order."""
        place, _, name = self.path.rpartition(".pifa.")
        return [f"{place}.{name}.{expert}" for expert in range(self.experts)]

    @property
    def is_residual(self) -> bool:
        """Whether its outputs are added to the residual stream."""
        return self.path.endswith(".down_proj")


def projection_of(model: nn.Module, layer: str) -> Projection | None:
    """Which projection the layer called `layer` is one expert's part of; None if it is no such part."""
    inside, _, _ = layer.rpartition(".")
    place, _, name = inside.rpartition(".")
    found = module_at(model, place)
    if not place or not isinstance(found, ExpertLayers):
        return None
    return _projection(found, place, name)


def _projection(layers: ExpertLayers, place: str, name: str) -> Projection:
    together = tuple(layer_name(place, each) for each in layers.beside(name))
    return Projection(layer_name(place, name), layers.num_experts, together)


def put_together(found: FoundExperts, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Takes the layers of single experts out of `layers`, and makes a `PifaExperts` for each place of these of them.

    Args:
        found: the experts of a model.
        layers: layers in PIFA form by name: of a projection all experts', or none's.
    """
    made: dict[str, nn.Module] = {}
    for place, stand_in in found.layers.items():
        grouped: dict[str, nn.Module] = {}
        for projection in stand_in.projections:
            names = _projection(stand_in, place, projection).layers
            parts = [layers.pop(name) for name in names if name in layers]
            if parts:
                grouped[projection] = _grouped([part for part in parts if isinstance(part, PifaLinear)])
        if grouped:
            made[place] = PifaExperts.of(stand_in.experts, grouped)
    return made


def _grouped(parts: Sequence[PifaLinear]) -> PifaGroupedLinear:
    rank = max(part.rank for part in parts)  # single solutions may have fewer pivot rows than were asked for
    factors = [with_rank(_factors(part.w_pivot.detach(), part.coeff.detach(), part.pivots), rank) for part in parts]
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    bias = torch.stack(biases) if biases else None
    return PifaGroupedLinear.from_factors(factors, bias, parts[0].w_pivot.requires_grad)


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a layer in PIFA form, by their names in it, of the same weight stored with another rank, or more.

    Raises:
        RankError: as `with_rank`.
    """
    factors = with_rank(_factors(tensors["w_pivot"], tensors["coeff"], tensors["pivots"]), rank)
    own = {"w_pivot": factors.w_pivot, "coeff": factors.coeff, "pivots": factors.pivots.to(torch.int32)}
    return {**tensors, **own}


def _factors(w_pivot: Tensor, coeff: Tensor, pivots: Tensor) -> PifaFactors:
    unknown = FactorQuality(math.nan, math.nan, math.nan)  # the report has it
    return PifaFactors(w_pivot, coeff, pivots.long(), unknown)


def _layer(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, trainable)
    if bias is not None:
        layer.bias = nn.Parameter(bias, trainable)
    return layer


def _stored_in(projection: str, projections: Sequence[str]) -> str:
    """The parameter of the experts that holds a projection."""
    return "gate_up_proj" if "gate_proj" in projections and projection != "down_proj" else projection

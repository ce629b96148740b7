"""`absorb_orders`: PIFA layers drop their row order where the layers behind them can take it into their columns.

The modules' side of `passes.AbsorbOrder`: eager and saved models are spared the reordering too. Between the two linears
of an MLP the hidden features are renumbered, for both linears alike; what the MLP computes stays the same. Where
another may read the hidden features, on whatever path, they keep their order (`Enclosure`).
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import RankError
from ..factors import factorize_jointly
from ..graph.linears import uses_of_weights, weight_name
from ..linear import PifaLinear
from ..modules import is_plain_linear, module_at, weight_of
from ..passes.absorb_order import Site, find_sites
from .allowed import Exchangeable, caller_of_layer
from .enclosure import Enclosure
from .expert_layers import projection_of


@dataclass(frozen=True)
class LayerSite:
    """Names of layers whose outputs meet in elementwise operations only, and of the layers that read the result.

    Attributes:
        sources, readers: in the order of the graph.
        called_by: the modules in whose code the graph shows them called; None where one's call is not seen.
        through: layers that nothing but the outputs of sources goes through, on the way to the readers.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    called_by: frozenset[str | None] = frozenset()
    through: tuple[str, ...] = ()


def layer_sites(graph: GraphModule, places: Mapping[str, str] | None = None) -> list[LayerSite]:
    """The sites of a captured model, but for those with a weight that other linears use too.

    A site that the model goes through several times (ALBERT's layers are one) is one.

    Args:
        graph: of the model.
        places: for linears that become one, the name of the layer that both will be.
    """
    places = places or {}
    uses = uses_of_weights(graph)
    found: dict[tuple[tuple[str, ...], ...], list[Site]] = {}
    for each in find_sites(graph):
        weights = tuple(tuple(map(weight_name, nodes)) for nodes in (each.sources, each.readers))
        found.setdefault(weights, []).append(each)
    sites = []
    for weights, alike in found.items():
        sources, readers = (tuple(name.rpartition(".")[0] for name in part) for part in weights)
        if any(uses[name] > len(alike) for part in weights for name in part) or not all((*sources, *readers)):
            continue  # a weight that is used elsewhere too, or is no layer's: computed, or the model's own
        called = [
            pair for site in alike for pair in zip((*site.sources, *site.readers), (*sources, *readers), strict=True)
        ]
        new = [tuple(dict.fromkeys(places.get(name, name) for name in part)) for part in (sources, readers)]
        if set(new[0]) & set(new[1]):
            continue  # between the two linears of a pair
        through = tuple(name for name in sources if not f"{name}.".startswith(f"{places.get(name, name)}."))
        called_by = frozenset(_caller(node, name, places.get(name, name)) for node, name in called)
        sites.append(LayerSite(new[0], new[1], called_by, through))
    return sites


def _caller(node: Node, name: str, place: str) -> str | None:
    return caller_of_layer(node, place if name.startswith(f"{place}.") else name)


def enclosed_sites(
    sites: Iterable[LayerSite], exchangeable: Exchangeable, enclosure: Enclosure, new: Collection[str] = ()
) -> tuple[list[LayerSite], dict[str, str]]:
    """The sites whose hidden features nothing else reads, and for the sources of the others why that is not known.

    Args:
        sites: of the captured model.
        exchangeable, enclosure: of the model.
        new: names of layers that are new.
    """
    enclosed, reasons = [], {}
    for site in sites:
        reason = _why_site_stays(site, exchangeable, enclosure, new)
        if reason is None:
            enclosed.append(site)
        else:
            reasons.update(dict.fromkeys(site.sources, f"row order stays: {reason}"))
    return enclosed, reasons


def _why_site_stays(
    site: LayerSite, exchangeable: Exchangeable, enclosure: Enclosure, new: Collection[str]
) -> str | None:
    names = (*site.sources, *site.readers)
    if all(projection_of(exchangeable.model, name) is not None for name in names):
        return None  # made to be calibrated, of a module whose hidden features stay inside of it
    if isinstance(exchangeable.model, GraphModule) and not any(map(exchangeable.is_layer, names)):
        return None  # the graph that the model is reads the weights: it has all the readers, and is what is rewritten
    for name in names:
        reason = None if name in new else exchangeable.why_not(name)
        if reason is not None:
            return f"{name}: {reason}"
    return enclosure.why_open((*site.sources, *site.through), site.readers, site.called_by)


def absorb_orders(
    model: nn.Module, sites: Iterable[LayerSite], layers: dict[str, nn.Module] | None = None
) -> dict[str, str]:
    """Moves the row order of PIFA layers into the columns of the layers that read them, without loss.

    Layers that meet (gate and up) are given one order first, if they have the same rank. The model is not touched: new
    layers are made, to be exchanged for those it has.

    Args:
        model: the model that the sites' names belong to.
        sites: where to, as `enclosed_sites` found them: whoever else reads the features would read them renumbered.
        layers: layers to be put into the model, by name; those made here are added, and count instead of the model's.

    Returns:
        For every layer that has no row order any more, the names of those that absorbed it.
    """
    layers = {} if layers is None else layers
    absorbed = {}
    for site in sites:
        found = [_layer_at(model, layers, name) for name in site.sources]
        sources = [layer for layer in found if isinstance(layer, PifaLinear)]
        readers = [reader for name in site.readers if (reader := _layer_at(model, layers, name)) is not None]
        if len(sources) < len(found) or len({layer.rank for layer in sources}) > 1 or sources[0].order is None:
            continue
        if len(readers) < len(site.readers):
            continue
        if not all(isinstance(reader, PifaLinear) or is_plain_linear(reader) for reader in readers):
            continue
        dense = [name for name, reader in zip(site.readers, readers, strict=True) if not isinstance(reader, PifaLinear)]
        if any(projection_of(model, name) is not None for name in dense):
            continue  # dense weights of experts lie in a parameter that stays as it is: none can be renumbered
        try:
            factors = _of_one_order(sources)
        except RankError:  # other rows of theirs do not fit into their dtype, or none are independent in each
            continue
        place = torch.argsort(factors[0].row_order())
        for name, source in zip(site.sources, factors, strict=True):
            layers[name] = _without_order(source, place)
        for name, reader in zip(site.readers, readers, strict=True):
            layers[name] = _with_columns(reader, place)
        absorbed.update(dict.fromkeys(site.sources, ", ".join(site.readers)))
    return absorbed


def _layer_at(model: nn.Module, layers: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    return layers.get(name) or module_at(model, name)


def copy_of(layer: nn.Module) -> nn.Module:
    """Another module with the same parameters, which can be given others."""
    other = copy.copy(layer)
    for table in ("_parameters", "_buffers", "_modules"):
        vars(other)[table] = dict(vars(layer)[table])
    return other


def _of_one_order(layers: Sequence[PifaLinear]) -> list[PifaLinear]:
    """Layers of one rank with the same pivot rows: these themselves if they have them, or else others."""
    first = layers[0].pivots
    if all(torch.equal(layer.pivots, first) for layer in layers):
        return list(layers)
    pairs = []
    for layer in layers:
        eye = torch.eye(layer.rank, dtype=torch.float64, device=layer.coeff.device)
        rows = torch.cat((eye, layer.coeff.detach().double()))[layer.row_order()]
        pairs.append((rows, layer.w_pivot.detach()))
    dtype = layers[0].w_pivot.dtype
    found = []
    for layer, factors in zip(layers, factorize_jointly(pairs, dtype=dtype), strict=True):
        other = copy_of(layer)
        assert isinstance(other, PifaLinear)  # noqa: S101  a copy of one
        other.w_pivot = nn.Parameter(factors.w_pivot, layer.w_pivot.requires_grad)
        other.coeff = nn.Parameter(factors.coeff, layer.coeff.requires_grad)
        other.pivots = factors.pivots.to(layer.pivots.dtype)
        other.restore_order()
        found.append(other)
    return found


def _without_order(layer: PifaLinear, place: Tensor) -> PifaLinear:
    other = copy_of(layer)
    assert isinstance(other, PifaLinear)  # noqa: S101  a copy of one
    other.pivots = torch.arange(layer.rank, dtype=layer.pivots.dtype, device=layer.pivots.device)
    other.restore_order()
    if layer.bias is not None:
        other.bias = nn.Parameter(layer.bias.detach()[place], layer.bias.requires_grad)
    return other


def _with_columns(layer: nn.Module, place: Tensor) -> nn.Module:
    """The layer for inputs in the order `place`: the matrix that they meet first has its columns in that order."""
    other = copy_of(layer)
    if isinstance(other, PifaLinear):
        other.w_pivot = nn.Parameter(other.w_pivot.detach()[:, place], other.w_pivot.requires_grad)
        return other
    weight = weight_of(layer)[:, place]
    stored = weight if isinstance(layer, nn.Linear) else weight.T.contiguous()  # GPT-2's Conv1D keeps [in, out]
    kept = layer._parameters["weight"]
    other._parameters["weight"] = nn.Parameter(stored, kept is not None and kept.requires_grad)
    return other

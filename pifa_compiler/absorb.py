"""`absorb_orders`: PIFA layers drop their row order where the layers behind them can take it into their columns.

The modules' side of `passes.AbsorbOrder`: eager and saved models are spared the reordering too. Between the two linears
of an MLP the hidden features are renumbered, for both linears alike; what the MLP computes stays the same.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .factors import factorize_jointly
from .linear import PifaLinear
from .linears import is_plain_linear, module_at, uses_of_weights, weight_name, weight_of
from .passes.absorb_order import find_sites


@dataclass(frozen=True)
class LayerSite:
    """Names of layers whose outputs meet in elementwise operations only, and of the layers that read the result."""

    sources: tuple[str, ...]
    readers: tuple[str, ...]


def layer_sites(graph: GraphModule) -> list[LayerSite]:
    """The sites of a captured model, but for those with a weight that several linears use."""
    uses = uses_of_weights(graph)
    sites = []
    for site in find_sites(graph):
        names = [tuple(map(weight_name, nodes)) for nodes in (site.sources, site.readers)]
        if all(uses[name] == 1 for name in (*names[0], *names[1])):
            sources, readers = (tuple(name.rpartition(".")[0] for name in part) for part in names)
            sites.append(LayerSite(sources, readers))
    return sites


def absorb_orders(model: nn.Module, sites: Iterable[LayerSite]) -> dict[str, str]:
    """Moves the row order of PIFA layers into the columns of the layers that read them, in place and without loss.

    Layers that meet (gate and up) are given one order first, if they have the same rank.

    Args:
        model: the model that the sites' names belong to.
        sites: where to, as `layer_sites` found them.

    Returns:
        For every layer that has no row order any more, the names of those that absorbed it.
    """
    holders = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    absorbed = {}
    for site in sites:
        found = [module_at(model, name) for name in site.sources]
        sources = [layer for layer in found if isinstance(layer, PifaLinear)]
        readers = [layer for name in site.readers if (layer := module_at(model, name)) is not None]
        if len(sources) < len(found) or len({layer.rank for layer in sources}) > 1 or sources[0].order is None:
            continue
        alone = all(isinstance(reader, PifaLinear) or is_plain_linear(reader) for reader in readers)
        if not alone or any(holders[_columns(reader).data_ptr()] > 1 for reader in readers):
            continue
        _share_order(sources)
        place = torch.argsort(sources[0].row_order())
        for source in sources:
            source.pivots = torch.arange(source.rank, dtype=source.pivots.dtype, device=source.pivots.device)
            source.restore_order()
            if source.bias is not None:
                source.bias = nn.Parameter(source.bias.detach()[place], source.bias.requires_grad)
        for reader in readers:
            _reorder_columns(reader, place)
        absorbed.update(dict.fromkeys(site.sources, ", ".join(site.readers)))
    return absorbed


def _share_order(layers: list[PifaLinear]) -> None:
    """Gives layers of one rank the same pivot rows."""
    first = layers[0].pivots
    if all(torch.equal(layer.pivots, first) for layer in layers):
        return
    pairs = []
    for layer in layers:
        eye = torch.eye(layer.rank, dtype=torch.float64, device=layer.coeff.device)
        rows = torch.cat((eye, layer.coeff.detach().double()))[layer.row_order()]
        pairs.append((rows, layer.w_pivot.detach()))
    dtype = layers[0].w_pivot.dtype
    for layer, factors in zip(layers, factorize_jointly(pairs, dtype=dtype), strict=True):
        layer.w_pivot = nn.Parameter(factors.w_pivot, layer.w_pivot.requires_grad)
        layer.coeff = nn.Parameter(factors.coeff, layer.coeff.requires_grad)
        layer.pivots = factors.pivots.to(layer.pivots.dtype)
        layer.restore_order()


def _columns(layer: nn.Module) -> Tensor:
    """The matrix of a layer that its inputs meet first."""
    return layer.w_pivot if isinstance(layer, PifaLinear) else weight_of(layer)


def _reorder_columns(layer: nn.Module, place: Tensor) -> None:
    if isinstance(layer, PifaLinear):
        layer.w_pivot = nn.Parameter(layer.w_pivot.detach()[:, place], layer.w_pivot.requires_grad)
        return
    weight = layer.weight
    if isinstance(weight, nn.Parameter):
        features = 1 if isinstance(layer, nn.Linear) else 0  # GPT-2's Conv1D keeps [in, out]
        layer.weight = nn.Parameter(weight.detach().index_select(features, place), weight.requires_grad)

"""Which linears of a captured model are compressed, which are left alone and why, and what their ranks are to be."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..errors import CaptureError, ConfigError, RankError
from ..exchange.absorb import LayerSite, enclosed_sites, layer_sites
from ..exchange.allowed import Exchangeable, caller_of, readers_of
from ..exchange.enclosure import Enclosure
from ..exchange.expert_layers import ExpertLayers, Projection, projection_of
from ..factors import stored_numbers
from ..graph.linears import is_transposed, linears_by_weight, linears_in_order, uses_of_weights, weight_name
from ..graph.picked_tokens import find_picks
from ..graph.run import ancestors
from ..modules import embedding_storages, is_plain_linear, module_at, storage_of, weight_of
from ..report import LayerReport
from .allocators import ALLOCATORS, Budget, Layer, Seen

_SOFTMAX = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
)

_SILENT = "nothing on the calibration batches depends on it: its inputs, its weight or its gradients are 0"


@dataclass(frozen=True)
class FoundLinear:
    """A linear that may be compressed.

    Attributes:
        name: of its layer.
        shape: (out, in) of its weight.
        projection: if it is one of several experts, what all of them become one layer of.
    """

    name: str
    shape: tuple[int, int]
    projection: Projection | None = None

    @property
    def shown(self) -> str:
        """The name that people know it by: patterns match it, and the report has it."""
        return self.name if self.projection is None else self.projection.path


@dataclass(frozen=True)
class RankedLinear:
    """One linear to compress: what it is and the rank it shall have (None: it stays dense, for `reason`).

    `target` says whether its numbers are those of the density that was asked for.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    reason: str | None = None
    target: bool = True


@dataclass(frozen=True)
class Selection:
    """What `compress` will do with a model's linears.

    Attributes:
        found: the linears to compress.
        skipped: reports of the others.
        sites: where row orders can be absorbed.
        ordered: for layers whose row order stays, why.
    """

    found: Mapping[Node, FoundLinear]
    skipped: Sequence[LayerReport]
    sites: Sequence[LayerSite]
    ordered: Mapping[str, str]

    @property
    def one_order(self) -> dict[str, tuple[str, ...]]:
        """For a layer whose outputs meet those of others (gate and up): the names of all, which share a row order."""
        return {name: site.sources for site in self.sites if len(site.sources) > 1 for name in site.sources}

    def layers(self, graph: GraphModule, made: Iterable[LayerReport], absorbed: Mapping[str, str]) -> list[LayerReport]:
        """One report a layer, in the model's order; of experts one a projection.

        Args:
            graph: of the model.
            made: reports of the linears that were found.
            absorbed: for layers that have no row order any more, the names of those that absorbed it.
        """
        projections = {linear.name: linear.projection for linear in self.found.values()}
        order: dict[str, int] = {}
        for index, name in enumerate(linears_in_order(graph)):
            projection = projections.get(name)
            order.setdefault(name if projection is None else projection.path, index)
        reports: dict[str, LayerReport] = {}
        of_experts: dict[str, dict[str, LayerReport]] = {}
        for layer in (*self.skipped, *made):
            notes, projection = layer.notes, projections.get(layer.name)
            if layer.name in self.ordered and layer.rank is not None:
                notes = (*notes, self.ordered[layer.name])
            elif layer.name in absorbed:
                reader = projections.get(absorbed[layer.name])
                notes = (*notes, f"row order absorbed by {reader.path if reader else absorbed[layer.name]}")
            if projection is None:
                reports[layer.name] = replace(layer, notes=notes)
            else:
                of_experts.setdefault(projection.path, {})[layer.name] = replace(layer, notes=notes)
        for path, experts in of_experts.items():
            in_order = sorted(experts, key=lambda name: int(name.rpartition(".")[2]))
            reports[path] = LayerReport.of_experts(path, [experts[name] for name in in_order])
        return sorted(reports.values(), key=lambda layer: order.get(layer.name, len(order)))


def select_linears(
    model: nn.Module,
    graph: GraphModule,
    skip: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
    *,
    in_files: bool = False,
) -> Selection:
    """What is to be done with the linears of a captured model.

    Args:
        model, graph: the model, and the same captured.
        skip: name patterns of linears to leave dense.
        ranks: ranks by name pattern.
        in_files: whether the weights are in files, and the model is on the meta device.

    Raises:
        CaptureError: there are no linears, or none that may be compressed.
        ConfigError: a pattern matches none.
    """
    exchangeable = Exchangeable(model, graph, in_files=in_files)
    found, skipped = find_linears(model, graph, skip, ranks or {}, exchangeable)
    sites, ordered = enclosed_sites(layer_sites(graph), exchangeable, Enclosure(model))
    return Selection(found, skipped, sites, ordered)


def find_linears(
    model: nn.Module,
    graph: GraphModule,
    skip: Sequence[str],
    ranks: Mapping[str, int],
    exchangeable: Exchangeable | None = None,
) -> tuple[dict[Node, FoundLinear], list[LayerReport]]:
    """The linears to compress, and reports of those to leave alone; of several that read one weight, the first.

    Raises:
        CaptureError: there are no linears, or none that may be compressed.
        ConfigError: a pattern matches none.
    """
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    if not nodes:
        raise CaptureError(f"{type(model).__name__} has no dense linear layers left to compress")
    exchangeable = Exchangeable(model, graph) if exchangeable is None else exchangeable
    uses = uses_of_weights(graph)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    # Of a model that is not in memory the graph has stand-ins, which share nothing where the model's own do.
    own = {**parameters, **dict(model.named_parameters(remove_duplicate=False))}
    embedded = embedding_storages(model)
    output, routers = _output_head(model), find_routers(model, graph)
    found: dict[Node, FoundLinear] = {}
    reports: dict[str, LayerReport] = {}
    patterns, first_use = set(skip), dict[str, Node]()
    for node in nodes:
        full_name = weight_name(node)
        parameter = parameters.get(full_name)
        if parameter is None:
            for report in _of_computed_weight(model, node, parameters):
                reports[report.name] = report
            continue
        name = full_name.removesuffix(".weight")
        d_out, d_in = reversed(parameter.shape) if is_transposed(node) else parameter.shape
        projection = projection_of(model, name)
        together = (name,) if projection is None else projection.together
        matched = [pattern for pattern in skip if any(fnmatchcase(each, pattern) for each in together)]
        patterns -= set(matched)
        if storage_of(own[full_name]) in embedded:
            reason: str | None = "weight is tied to an embedding"
        elif output is not None and module_at(model, name) is output:
            reason = "output head"
        elif node in routers:
            reason = "router: it decides which experts a token goes to"
        elif matched:
            reason = f"skipped by pattern {matched[0]!r}"
        elif stored_numbers(d_out, d_in, 1) >= d_out * d_in:
            reason = f"no rank takes fewer numbers than a weight [{d_out}, {d_in}] has"
        elif uses[full_name] > 1 and exchangeable.in_files:
            reason = f"weight is used by {uses[full_name]} linears"
        elif projection is not None:
            reason = None  # `experts_as_layers` has looked
        elif not exchangeable.in_files and not bool(own[full_name].any()):
            reason = "its weight is 0"
        else:
            reason = _why_left(model, graph, node, full_name, exchangeable)
        linear = FoundLinear(name, (d_out, d_in), projection)
        if reason is None:
            found.setdefault(first_use.setdefault(full_name, node), linear)
        else:
            shape = (d_out, d_in) if projection is None else (projection.experts, d_out, d_in)
            reports[linear.shown] = LayerReport.of_skip(linear.shown, shape, reason, target=False)
    # A weight that another is computed from stays too.
    found = {node: linear for node, linear in found.items() if linear.shown not in reports}
    shown = {linear.shown for linear in found.values()}
    for name, module in model.named_modules():
        if not is_plain_linear(module):
            continue
        projection = projection_of(model, name)
        path = name if projection is None else projection.path
        if path not in shown and path not in reports:
            shape = (*(() if projection is None else (projection.experts,)), *weight_of(module).shape)
            reason = "not reached in what was captured of the model, called as the calibration batches call it"
            reports[path] = LayerReport.of_skip(path, shape, reason, target=False)
    unknown = patterns | {p for p in ranks if not any(fnmatchcase(name, p) for name in shown)}
    if unknown:
        names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in shown}))
        raise ConfigError(f"no linear matches {sorted(unknown)}; this model's linears end in: {names}")
    if not found:
        reasons = ", ".join(sorted({str(report.skipped) for report in reports.values()}))
        raise CaptureError(f"every linear of the model is skipped; nothing is left to compress: {reasons}")
    return found, list(reports.values())


def uses_of(graph: GraphModule, found: Iterable[Node]) -> dict[Node, tuple[Node, ...]]:
    """For linears that `find_linears` found, all that read the same weight."""
    by_weight = linears_by_weight(graph)
    return {node: by_weight[weight_name(node)] for node in found}


def shared_among(uses: Mapping[Node, tuple[Node, ...]]) -> dict[Node, tuple[Node, ...]]:
    """Of `uses_of`, those with a weight that several linears read."""
    return {node: nodes for node, nodes in uses.items() if len(nodes) > 1}


def find_routers(model: nn.Module, graph: GraphModule) -> set[Node]:
    """The linears that say which tokens experts get: those nearest in front of what picks them."""
    sizes = {module.experts.num_experts for module in model.modules() if isinstance(module, ExpertLayers)}
    found: set[Node] = set()
    for tokens in {pick.tokens for pick in find_picks(graph).values()}:
        found |= _nearest_linears(tokens, lambda node: node.all_input_nodes)
    return {node for node in found if node.meta["val"].shape[-1] in sizes}


def _output_head(model: nn.Module) -> nn.Module | None:
    """The layer that a Hugging Face model says its outputs come from; None if it says nothing."""
    head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    try:
        return head() if callable(head) else None
    except (NotImplementedError, AttributeError):  # how models of other kinds say that they have none
        return None


def _why_left(
    model: nn.Module, graph: GraphModule, node: Node, full_name: str, exchangeable: Exchangeable
) -> str | None:
    """Why the layer that owns a weight cannot be exchanged; None if it can."""
    owner_name, _, attribute = full_name.rpartition(".")
    owner = module_at(model, owner_name)
    if owner is None:
        return f"{full_name} is no parameter of a module of the model"
    if isinstance(model, GraphModule) and not is_plain_linear(owner):
        # The graph itself reads the weight: it is rewritten, whoever holds the parameter.
        others = [reader for reader in readers_of(graph, full_name) if reader is not node]
        return f"weight is read by {others[0].name} too" if others else exchangeable.why_tied(full_name)
    if attribute != "weight" or not (is_plain_linear(owner) or isinstance(owner, nn.Linear)):
        kind = type(owner).__name__
        return f"weight is a parameter of {kind} itself, not of a linear layer; put it into an nn.Linear"
    return exchangeable.why_not(owner_name)


def _of_computed_weight(model: nn.Module, node: Node, parameters: Mapping[str, nn.Parameter]) -> list[LayerReport]:
    """Reports of the layers whose parameters a linear's weight is computed from."""
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op in ("placeholder", "get_attr"):
        return []  # given to the model, or a buffer
    shape = weight.meta["val"].shape
    operators = str(weight.target).rpartition("aten.")[2].partition(".")[0]
    where, _ = caller_of(node)
    sources = [str(other.target) for other in ancestors(weight) if other.op == "get_attr"]
    names = [name for name in dict.fromkeys(sources) if name in parameters]
    reason = f"weight is computed from {', '.join(names)} by {operators}"
    if isinstance(module_at(model, where), nn.Linear):
        layers = [where]
    else:
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")] or names
    return [LayerReport.of_skip(name, (int(shape[0]), int(shape[1])), reason, target=False) for name in layers]


def give_ranks(
    found: Mapping[Node, FoundLinear],
    one_order: Mapping[str, tuple[str, ...]],
    seen: Mapping[Node, Seen],
    attention: Set[Node],
    *,
    allocator: str,
    budget: Budget,
    fixed: Mapping[str, int],
) -> dict[Node, RankedLinear]:
    """The rank of every linear that was found, or why it stays dense.

    Args:
        found: the linears by node.
        one_order: for a layer whose outputs meet those of others (gate and up), the names of all of them.
        seen: what the allocator's `look` found of them, where it has any.
        attention: the linears in front of and behind attention.
        allocator: a name in `ALLOCATORS`.
        budget: of the layers that no pattern of `fixed` matches.
        fixed: ranks by name pattern, the first that matches counts.

    Raises:
        RankError: a fixed rank does not exist for its weight, or the density leaves no room for rank 1.
    """
    ranked: dict[Node, RankedLinear] = {}
    sets: dict[tuple[object, ...], list[Node]] = {}
    for node, linear in found.items():
        ranks = [rank for pattern, rank in fixed.items() if fnmatchcase(linear.shown, pattern)]
        if ranks:
            ranked[node] = _fixed(linear, ranks[0])
        elif budget.density == 1:
            ranked[node] = RankedLinear(linear.name, linear.shape, None, "density 1 keeps every weight dense")
        else:
            together = one_order.get(linear.name, linear.name)
            if linear.projection is not None:
                together = linear.projection.together
            sets.setdefault((together, *linear.shape), []).append(node)
    for key, nodes in list(sets.items()):
        if all(seen.get(node, Seen()).is_nothing for node in nodes):
            for node in nodes:
                ranked[node] = RankedLinear(found[node].name, found[node].shape, None, _SILENT, target=False)
            del sets[key]
    layers = [
        [Layer(found[node].name, found[node].shape, node in attention, seen.get(node, Seen())) for node in nodes]
        for nodes in sets.values()
    ]
    ranks_of_sets = ALLOCATORS[allocator].ranks(layers, budget) if layers else []
    for nodes, rank in zip(sets.values(), ranks_of_sets, strict=True):
        reason = f"the allocator {allocator} keeps it dense at density {budget.density}" if rank is None else None
        ranked.update({node: RankedLinear(found[node].name, found[node].shape, rank, reason) for node in nodes})
    _keep_together(found, ranked)
    return {node: ranked[node] for node in found}


def _keep_together(found: Mapping[Node, FoundLinear], ranked: dict[Node, RankedLinear]) -> None:
    """Leaves dense what lies in one parameter with something that stays dense: gate and up of experts."""
    dense: dict[str, str] = {}
    for node, linear in found.items():
        if linear.projection is not None and ranked[node].rank is None:
            dense.update(dict.fromkeys(linear.projection.together, linear.projection.path))
    for node, linear in found.items():
        if linear.shown in dense and ranked[node].rank is not None:
            reason = f"lies in one parameter with {dense[linear.shown]}, which stays dense"
            ranked[node] = RankedLinear(linear.name, linear.shape, None, reason)


def _fixed(linear: FoundLinear, rank: int) -> RankedLinear:
    d_out, d_in = linear.shape
    if rank > min(d_out, d_in):
        raise RankError(
            f"{linear.name}: rank {rank} asked for a weight [{d_out}, {d_in}], at most {min(d_out, d_in)} exists"
        )
    if stored_numbers(d_out, d_in, rank) >= d_out * d_in:
        reason = f"PIFA at rank {rank} would not be smaller than the dense weight"
        return RankedLinear(linear.name, linear.shape, None, reason)
    return RankedLinear(linear.name, linear.shape, rank)


def left_dense(ranked: Mapping[Node, RankedLinear]) -> list[LayerReport]:
    """Reports of the linears that count for the density and stay dense."""
    return [
        LayerReport.of_skip(linear.name, linear.shape, linear.reason, target=linear.target)
        for linear in ranked.values()
        if linear.reason is not None
    ]


def find_attention(graph: GraphModule) -> set[Node]:
    """The linears that make queries, keys and values, and those that read what attention gives.

    Attention is known by its softmax: no linear lies between it and these.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target in _SOFTMAX:
            found |= _nearest_linears(node, lambda node: node.all_input_nodes)
            found |= _nearest_linears(node, lambda node: list(node.users))
    return found


def _nearest_linears(start: Node, neighbours: Callable[[Node], list[Node]]) -> set[Node]:
    found: set[Node] = set()
    seen, pending = {start}, [start]
    while pending:
        for node in neighbours(pending.pop()):
            if node in seen or node.op == "get_attr":
                continue
            seen.add(node)
            if node.target is torch.ops.aten.linear.default:
                found.add(node)
            else:
                pending.append(node)
    return found

"""`compress`: dense linears become low-rank by M and are replaced by their PIFA form, in place."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from . import reconstruct
from .absorb import absorb_orders, layer_sites
from .capture import Batch, capture
from .checkpoint import describe_if_pretrained
from .errors import CalibrationError, CaptureError, ConfigError, RankError
from .factors import PifaFactors, Pivoting, factorize, factorize_jointly, rank_for_density, stored_numbers
from .linears import (
    count_numbers,
    embedding_storages,
    is_plain_linear,
    is_transposed,
    linears_in_order,
    module_at,
    replace_linear,
    uses_of_weights,
    weight_name,
    weight_of,
)
from .passes import AbsorbOrder, Canonicalize, FactorizeLinear, run_passes
from .report import LayerReport, Report
from .sweep import Group, Progress, Sweep


@dataclass(frozen=True)
class CompressConfig:
    """What `compress` is asked to do.

    Attributes:
        density: stored numbers (row orders included) over dense numbers, of the linears that are compressed, in (0, 1];
            never exceeded in total; a layer may exceed it by one `rank_multiple`. At 1 nothing is changed.
        method: how weights are made low-rank, a name in `reconstruct.METHODS`.
        mix: f in [0, 1]: the share of the dense model's inputs in M's target Y = (1 - f) W X_u + f W X_o.
        damping: regularisation of `optimal`, as a multiple of the mean diagonal of the Gram matrix.
        ranks: ranks by name pattern (`fnmatch`; the first that matches counts); such layers do not follow `density`.
        skip: name patterns of linears to leave dense; they do not count for the density.
        rank_multiple: ranks are rounded down to a multiple of this, since matrix units are faster there, and
            the numbers this saves go to other layers; 1 is exact.
        pivoting: how pivot rows are chosen, "lu" or "qr" (see `factorize`).

    Raises:
        ConfigError: an option is unknown or outside its range.
    """

    density: float = 0.5
    method: str = "optimal"
    mix: float = 0.25
    damping: float = 1e-3
    ranks: Mapping[str, int] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    rank_multiple: int = 32
    pivoting: Pivoting = "lu"

    def __post_init__(self) -> None:
        _check_number("density", self.density, "in (0, 1]", lambda value: 0 < value <= 1)
        _check_number("mix", self.mix, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_number("damping", self.damping, "0 or more", lambda value: value >= 0)
        if self.method not in reconstruct.METHODS:
            raise ConfigError(f"unknown method {self.method!r}; known are {', '.join(reconstruct.METHODS)}")
        if not isinstance(self.rank_multiple, int) or self.rank_multiple < 1:
            raise ConfigError(f"rank_multiple must be an integer of 1 or more, got {self.rank_multiple!r}")
        if self.pivoting not in ("lu", "qr"):
            raise ConfigError(f'pivoting must be "lu" or "qr", got {self.pivoting!r}')
        skip: object = self.skip
        if isinstance(skip, str):
            raise ConfigError(f"skip must be a tuple of patterns, got the string {self.skip!r}; write ({self.skip!r},)")
        for pattern, rank in self.ranks.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"the rank for {pattern!r} must be an integer of 1 or more, got {rank!r}")


def _check_number(name: str, value: object, interval: str, allowed: Callable[[float], bool]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not allowed(value):
        raise ConfigError(f"{name} must be a number {interval}, got {value!r}")


@dataclass(frozen=True)
class _Target:
    """One linear to compress: where it is and the rank it shall have (None: it stays dense, for `reason`)."""

    name: str
    weight: Tensor  # [out, in], a view of the model's own
    rank: int | None
    reason: str | None = None


def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    config: CompressConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Makes a model's linears low-rank with little loss and puts `PifaLinear` layers in their place.

    The model is changed in place, and only once everything is computed: an error or an interrupt leaves it as it was.
    The output head and weights tied to an embedding stay dense; every layer left alone is reported with its reason.

    Args:
        model: an `nn.Module` that `torch.export` can capture (Hugging Face models can), or a captured `GraphModule`.
        batches: calibration calls, each a tensor, a tuple of positional or a dict of keyword arguments. Some thousand
            tokens of the text that the model is for make a good set; padding is left out by `attention_mask`.
        config: what to do; None takes the defaults.
        progress: called as progress(done, total, what).

    Returns:
        What was done, layer by layer.

    Raises:
        ConfigError: a pattern of the configuration matches no linear.
        RankError: a weight is not finite, or the density leaves no room for rank 1.
        CaptureError: the model cannot be captured as one graph, or has no linears.
        CalibrationError: the batches are missing, of mixed structure, or make activations that are not finite.
    """
    config = config or CompressConfig()
    started = time.perf_counter()
    calls = list(batches)
    _check_token_ids(model, calls)
    _check_weights(model)
    captured = capture(model, calls)
    found, skipped = _find_linears(model, captured.graph, config)
    targets = {node: _target(name, weight, config) for node, (name, weight) in found.items()}
    sites = layer_sites(captured.graph)
    meeting = {name: site.sources for site in sites if len(site.sources) > 1 for name in site.sources}
    targets = _spend_remainder(targets, config, meeting)
    method = reconstruct.METHODS[config.method]
    settings = reconstruct.Settings(config.mix, config.damping)
    layers: dict[str, LayerReport] = {report.name: report for report in skipped}

    def solve(group: Group, statistics: reconstruct.Statistics) -> dict[Node, PifaFactors]:
        solved: dict[Node, PifaFactors] = {}
        make_low_rank = method.prepare(statistics, settings)
        low_rank = {
            node: make_low_rank(targets[node].weight.double(), rank)
            for node in group.members
            if (rank := targets[node].rank) is not None
        }
        for nodes in _sets_of_one_order(low_rank, targets, meeting):
            pairs = [(low_rank[node].u, low_rank[node].v) for node in nodes]
            dtype = targets[nodes[0]].weight.dtype
            if len(nodes) > 1:
                made = factorize_jointly(pairs, gram=statistics.gram, dtype=dtype)
            else:
                rank = targets[nodes[0]].rank
                made = [factorize(pairs[0], rank=rank, pivoting=config.pivoting, gram=statistics.gram, dtype=dtype)]
            solved.update(zip(nodes, made, strict=True))
        for node, factors in solved.items():
            target, notes = targets[node], low_rank[node].notes
            if target.rank is not None and factors.rank < target.rank:
                notes += (f"rank lowered from {target.rank} to {factors.rank}: the solution has no more",)
            error = reconstruct.relative_error(target.weight, factors.dense(), statistics.gram)
            layers[target.name] = LayerReport.of_factors(
                target.name, factors.shape, factors.rank, factors.quality, error=error, notes=notes
            )
        return solved

    for target in targets.values():
        if target.reason is not None:
            shape = (target.weight.shape[0], target.weight.shape[1])
            layers[target.name] = LayerReport.of_skip(target.name, shape, target.reason, target=True)
    report = Report(config.method, config.density, params_before=count_numbers(model))
    active = [node for node, target in targets.items() if target.rank is not None]
    if active:
        sweep = Sweep(captured, active, two_flows=method.two_flows, dense_gram=method.dense_gram)
        sweep.run(solve, progress)
        report.activation_bytes = sweep.peak_bytes
        _replace(model, {weight_name(node): factors for node, factors in sweep.factors.items()})
        for name, readers in absorb_orders(model, sites).items():
            note = f"row order absorbed by {readers}"
            layers[name] = replace(layers[name], notes=(*layers[name].notes, note))
    order = {name: index for index, name in enumerate(linears_in_order(captured.graph))}
    report.layers = sorted(layers.values(), key=lambda layer: order.get(layer.name, len(order)))
    report.params_after = count_numbers(model)
    report.seconds = time.perf_counter() - started
    describe_if_pretrained(model, report)
    return report


def _check_token_ids(model: nn.Module, calls: list[Batch]) -> None:
    if not calls:
        raise CalibrationError("at least one calibration batch is needed, none came")
    embed: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    embedding = embed() if callable(embed) else None
    if not isinstance(embedding, nn.Embedding):
        return
    for call in calls:
        ids = call.get("input_ids") if isinstance(call, Mapping) else call if isinstance(call, Tensor) else None
        if ids is None or ids.is_floating_point() or ids.numel() == 0:
            continue
        if int(ids.max()) >= embedding.num_embeddings or int(ids.min()) < 0:
            raise CalibrationError(
                f"calibration tokens lie in {int(ids.min())}..{int(ids.max())}, the model's vocabulary in "
                f"0..{embedding.num_embeddings - 1}; use the model's own tokenizer"
            )


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise RankError(f"weight {name} {list(parameter.shape)} holds NaN or Inf; repair it before compressing")


def _find_linears(
    model: nn.Module, graph: GraphModule, config: CompressConfig
) -> tuple[dict[Node, tuple[str, Tensor]], list[LayerReport]]:
    """The linears to compress with their names and weights [out, in], and reports of those to leave alone."""
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    if not nodes:
        raise CaptureError(f"{type(model).__name__} has no dense linear layers left to compress")
    uses = uses_of_weights(graph)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    embedded = embedding_storages(model)
    head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    output = head() if callable(head) else None
    found: dict[Node, tuple[str, Tensor]] = {}
    reports: dict[str, LayerReport] = {}
    patterns = set(config.skip)
    for node in nodes:
        full_name = weight_name(node)
        name = full_name.removesuffix(".weight")
        parameter = parameters.get(full_name)
        if parameter is None:
            continue
        weight = parameter.detach().T if is_transposed(node) else parameter.detach()
        owner = module_at(model, name)
        matched = [pattern for pattern in config.skip if fnmatchcase(name, pattern)]
        patterns -= set(matched)
        if weight.untyped_storage().data_ptr() in embedded:
            reason = "weight is tied to an embedding"
        elif output is not None and owner is output:
            reason = "output head"
        elif matched:
            reason = f"skipped by pattern {matched[0]!r}"
        elif uses[full_name] > 1:
            reason = f"weight is used by {uses[full_name]} linears"
        elif not isinstance(model, GraphModule) and not is_plain_linear(owner):
            reason = f"weight belongs to a {type(owner).__name__}, not to a plain linear layer"
        else:
            found[node] = (name, weight)
            continue
        reports[name] = LayerReport.of_skip(name, (weight.shape[0], weight.shape[1]), reason, target=False)
    for name, module in model.named_modules():
        seen = name in reports or any(name == known for known, _ in found.values())
        if is_plain_linear(module) and not seen:
            d_out, d_in = weight_of(module).shape
            reason = "not reached when the model is called as the calibration batches call it"
            reports[name] = LayerReport.of_skip(name, (d_out, d_in), reason, target=False)
    unknown = patterns | {p for p in config.ranks if not any(fnmatchcase(name, p) for name, _ in found.values())}
    if unknown:
        names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, _ in found.values()}))
        raise ConfigError(f"no linear matches {sorted(unknown)}; this model's linears end in: {names}")
    if not found:
        raise CaptureError("every linear of the model is skipped; nothing is left to compress")
    return found, list(reports.values())


def _target(name: str, weight: Tensor, config: CompressConfig) -> _Target:
    d_out, d_in = weight.shape
    fixed = [rank for pattern, rank in config.ranks.items() if fnmatchcase(name, pattern)]
    if not fixed and config.density == 1:
        return _Target(name, weight, None, "density 1 keeps every weight dense")
    try:
        rank = fixed[0] if fixed else rank_for_density(d_out, d_in, config.density, multiple=config.rank_multiple)
    except RankError as error:
        raise RankError(f"{name}: {error}") from error
    if rank > min(d_out, d_in):
        raise RankError(f"{name}: rank {rank} asked for a weight [{d_out}, {d_in}], at most {min(d_out, d_in)} exists")
    if stored_numbers(d_out, d_in, rank) >= d_out * d_in:
        return _Target(name, weight, None, f"PIFA at rank {rank} would not be smaller than the dense weight")
    return _Target(name, weight, rank)


def _spend_remainder(
    targets: Mapping[Node, _Target], config: CompressConfig, meeting: Mapping[str, tuple[str, ...]]
) -> dict[Node, _Target]:
    """Gives what rounding ranks down has left of the budget to other layers, by steps of `rank_multiple`.

    Those that rounding took most from come first. Layers whose outputs meet keep one rank, so they rise together.
    """
    result, sets = dict(targets), dict[tuple[str, ...], list[Node]]()
    if config.rank_multiple == 1:
        return result  # exact ranks leave less than a row each
    left = 0
    for node, target in targets.items():
        follows = target.rank is not None and not any(fnmatchcase(target.name, pattern) for pattern in config.ranks)
        if target.rank is None or not follows:
            continue
        d_out, d_in = target.weight.shape
        left += int(config.density * d_out * d_in) - stored_numbers(d_out, d_in, target.rank)
        sets.setdefault(meeting.get(target.name, (target.name,)), []).append(node)

    def loss(nodes: list[Node]) -> float:
        (d_out, d_in), rank = targets[nodes[0]].weight.shape, targets[nodes[0]].rank or 0
        return 1 - rank / rank_for_density(d_out, d_in, config.density)

    for nodes in sorted(sets.values(), key=loss, reverse=True):
        raised = {}
        cost = 0
        for node in nodes:
            target = targets[node]
            (d_out, d_in), rank = target.weight.shape, target.rank or 0
            raised[node] = replace(target, rank=rank + config.rank_multiple)
            more = stored_numbers(d_out, d_in, rank + config.rank_multiple)
            fits = rank % config.rank_multiple == 0 and rank + config.rank_multiple <= min(d_out, d_in)
            cost += more - stored_numbers(d_out, d_in, rank) if fits and more < d_out * d_in else left + 1
        if cost <= left:
            result.update(raised)
            left -= cost
    return result


def _sets_of_one_order(
    nodes: Iterable[Node], targets: Mapping[Node, _Target], meeting: Mapping[str, tuple[str, ...]]
) -> list[tuple[Node, ...]]:
    """The nodes of a group, those together whose outputs meet (gate and up) if all of them have one rank."""
    sets: dict[tuple[str, ...], list[Node]] = {}
    for node in nodes:
        sets.setdefault(meeting.get(targets[node].name, (targets[node].name,)), []).append(node)
    result: list[tuple[Node, ...]] = []
    for names, members in sets.items():
        together = len(members) == len(names) and len({targets[node].rank for node in members}) == 1
        result += [tuple(members)] if together else [(node,) for node in members]
    return result


def _replace(model: nn.Module, factors: Mapping[str, PifaFactors]) -> None:
    """Puts PIFA layers where the weights named by `factors` were."""
    names = {weight: weight.removesuffix(".weight") for weight in factors}
    if isinstance(model, GraphModule) and not all(is_plain_linear(module_at(model, name)) for name in names.values()):
        run_passes(model, [Canonicalize(), FactorizeLinear(factors), AbsorbOrder()])
        return
    for weight, found in factors.items():
        replace_linear(model, names[weight], found)

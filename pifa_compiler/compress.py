"""`compress`: dense linears become low-rank by M and are replaced by their PIFA form, in place."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .checkpoint import describe_if_pretrained
from .checkpoint.format import refuse_other_quantization
from .errors import CalibrationError, ConfigError, DerivativeError, RankError
from .exchange.absorb import LayerSite, absorb_orders, enclosed_sites, layer_sites
from .exchange.allowed import Exchangeable
from .exchange.atomic import Exchange
from .exchange.enclosure import Enclosure
from .factors import PifaFactors, Pivoting
from .graph.capture import Batch, Captured, capture
from .graph.linears import linears_in_order, weight_name
from .graph.predictions import find_predictions
from .modules import count_numbers, is_plain_linear, layer_of, module_at
from .numerics import own_numerics
from .passes import AbsorbOrder, Canonicalize, FactorizeLinear, run_passes
from .reconstruction.allocators import ALLOCATORS, Budget
from .reconstruction.gradients import dense_statistics
from .reconstruction.methods import METHODS, MethodOptions
from .reconstruction.selection import find_attention, find_linears, give_ranks
from .reconstruction.solver import GroupSolver
from .reconstruction.statistics import DenseStatistics, Statistics
from .reconstruction.sweep import Flow, Group, Progress, Sweep, groups
from .report import LayerReport, Report


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What `compress` is asked to do.

    Attributes:
        density: stored numbers (row orders included) over dense numbers, of the linears that are compressed, in (0, 1];
            never exceeded in total, whatever single layers get. At 1 nothing is changed.
        method: how weights are made low-rank, a name in `METHODS`.
        mix: f in [0, 1]: the share of the dense model in M's target Y = (1 - f) W X_u + f W X_o. Where the output is
            added to a residual stream H, `two-sided` takes (1 - f) W X_u + f (W X_o + H_o - H_u), so that a later layer
            makes up for part of what earlier ones lost.
        damping: regularisation of `two-sided` and `optimal`: this times the mean diagonal of the inputs' Gram matrix.
            With 0, directions that the inputs hardly have are as inexact as sums in float32 are.
        ranks: ranks by name pattern (`fnmatch`; the first that matches counts); such layers do not follow `density`.
        skip: name patterns of linears to leave dense; they do not count for the density.
        rank_multiple: ranks are multiples of this (of layers too small for that, any), since matrix units are faster
            there; 1 is exact.
        pivoting: how pivot rows are chosen, "lu" or "qr" (see `factorize`).
        allocator: how the density is shared out over the layers, a name in `allocators.ALLOCATORS`; None takes the
            method's own, "global" for `two-sided` and "uniform" for the others, as they were published.
        gradients: whether `two-sided` weighs output errors by what they do to the model's predictions. That takes one
            backward pass over the batches and a causal language model; for others, and without it, the errors of all
            outputs count alike.
        gradient_damping: as `damping`, of the Gram matrix of these gradients.

    Raises:
        ConfigError: an option is unknown or outside its range.
    """

    density: float = 0.5
    method: str = "two-sided"
    mix: float = 0.25
    damping: float = 1e-3
    ranks: Mapping[str, int] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    rank_multiple: int = 32
    pivoting: Pivoting = "lu"
    allocator: str | None = None
    gradients: bool = True
    gradient_damping: float = 1e-2

    def __post_init__(self) -> None:
        _check_number("density", self.density, "in (0, 1]", lambda value: 0 < value <= 1)
        _check_number("mix", self.mix, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_number("damping", self.damping, "0 or more", lambda value: value >= 0)
        _check_number("gradient_damping", self.gradient_damping, "1e-6 or more", lambda value: value >= 1e-6)
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if self.allocator is not None and self.allocator not in ALLOCATORS:
            raise ConfigError(f"unknown allocator {self.allocator!r}; known are {', '.join(ALLOCATORS)}")
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


@own_numerics()
def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    config: CompressConfig | None = None,
    *,
    statistics: DenseStatistics | None = None,
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
        statistics: what `measure` found on the same model and batches, so that several calls share it; None measures.
        progress: called as progress(done, total, what).

    Returns:
        What was done, layer by layer.

    Raises:
        ConfigError: a pattern of the configuration matches no linear.
        RankError: a weight is not finite, or the density leaves no room for rank 1.
        CaptureError: the model cannot be captured as one graph, or has no linears.
        CalibrationError: the batches are missing, of mixed structure, or make activations or gradients that are not
            finite.
        CheckpointError: the model's config says that it is quantized by another method.
    """
    config = config or CompressConfig()
    started = time.perf_counter()
    calls = list(batches)
    refuse_other_quantization(model)
    _check_token_ids(model, calls)
    _check_weights(model)
    captured = capture(model, calls)
    exchangeable = Exchangeable(model, captured.graph)
    found, skipped = find_linears(model, captured.graph, config.skip, config.ranks, exchangeable)
    report = Report(config.method, config.density, params_before=count_numbers(model))
    sites, ordered = enclosed_sites(layer_sites(captured.graph), exchangeable, Enclosure(model))
    one_order = {name: site.sources for site in sites if len(site.sources) > 1 for name in site.sources}
    method = METHODS[config.method]
    allocator = config.allocator or method.allocator
    measured = _needed(config, statistics) or _measure(captured, list(found), config, progress, for_ranks=True)
    if measured.no_gradients is not None and method.gradients and config.gradients:
        report.note(f"output errors are not weighted by gradients: {measured.no_gradients}")
    targets = give_ranks(
        found,
        one_order,
        measured,
        find_attention(captured.graph),
        allocator=allocator,
        budget=Budget(config.density, config.rank_multiple),
        fixed=config.ranks,
    )
    if statistics is None:
        measured.gram.clear()  # the ranks alone needed it
    layers: dict[str, LayerReport] = {skip.name: skip for skip in skipped}
    for target in targets.values():
        if target.reason is not None:
            shape = (target.weight.shape[0], target.weight.shape[1])
            layers[target.name] = LayerReport.of_skip(target.name, shape, target.reason, target=True)
    factors: dict[str, PifaFactors] = {}
    active = [node for node, target in targets.items() if target.rank is not None]
    if active:
        settings = MethodOptions(config.mix, config.damping, config.gradient_damping)
        solver = GroupSolver(method, settings, targets, one_order, measured.gradient_gram, config.pivoting)
        if statistics is not None and not method.two_flows:
            for group in groups(captured.graph.graph, active):
                solver.solve(group, statistics.of_input(weight_name(group.members[0])))
        else:
            flows: Flow = "both" if method.two_flows else "dense"
            sweep = Sweep(captured, active, flows=flows, dense_gram=method.dense_gram, drift=method.drift)
            sweep.run(solver.solve, progress)
            report.activation_bytes = sweep.peak_bytes
        layers.update(solver.layers)
        factors = {weight_name(node): found for node, found in solver.factors.items()}
    order = {name: index for index, name in enumerate(linears_in_order(captured.graph))}
    new, absorbed = _new_layers(model, factors, sites)
    for name, layer in layers.items():
        notes = [f"row order absorbed by {absorbed[name]}"] if name in absorbed else []
        if name in ordered and layer.rank is not None:
            notes = [ordered[name]]
        layers[name] = replace(layer, notes=(*layer.notes, *notes))
    report.layers = sorted(layers.values(), key=lambda layer: order.get(layer.name, len(order)))
    with Exchange() as exchange:
        if new is None and isinstance(model, GraphModule):
            exchange.graph(model)
            run_passes(model, [Canonicalize(), FactorizeLinear(factors), AbsorbOrder()])
        for name, module in (new or {}).items():
            exchange.module(model, name, module)
        report.params_after = count_numbers(model)
        report.describe_rest(model, (*measured.notes, *captured.masks.notes()))
        describe_if_pretrained(model, report, exchange)
        report.seconds = time.perf_counter() - started
        return report


@own_numerics()
def measure(
    model: nn.Module, batches: Iterable[Batch], *, gradients: bool = True, progress: Progress | None = None
) -> DenseStatistics:
    """What methods and allocators want to know of the dense model, for several calls of `compress` on it.

    Args:
        model, batches, progress: as in `compress`.
        gradients: whether the gradients of its predictions are taken too; the result says why if there are none.

    Raises:
        CaptureError, CalibrationError: as in `compress`.
    """
    calls = list(batches)
    _check_token_ids(model, calls)
    captured = capture(model, calls)
    found, _ = find_linears(model, captured.graph, (), {})
    statistics = _statistics(captured, list(found), progress, gradients=gradients)
    if not gradients:
        statistics.no_gradients = "the statistics given were measured with gradients=False"
    return statistics


def _needed(config: CompressConfig, given: DenseStatistics | None) -> DenseStatistics | None:
    """The part of `given` that the configuration uses; None if something has to be measured."""
    method = METHODS[config.method]
    if given is not None:
        return given if method.gradients and config.gradients else replace(given, gradient_gram={})
    needs_gram = ALLOCATORS[config.allocator or method.allocator].needs_gram and config.density < 1
    needs_gradients = method.gradients and config.gradients and (config.density < 1 or bool(config.ranks))
    return None if needs_gram or needs_gradients else DenseStatistics()


def _measure(
    captured: Captured,
    nodes: Sequence[Node],
    config: CompressConfig,
    progress: Progress | None,
    *,
    for_ranks: bool = False,
) -> DenseStatistics:
    gradients = METHODS[config.method].gradients and config.gradients
    return _statistics(captured, nodes, progress, gradients=gradients, for_ranks=for_ranks)


def _statistics(
    captured: Captured, nodes: Sequence[Node], progress: Progress | None, *, gradients: bool, for_ranks: bool = False
) -> DenseStatistics:
    """Sums at the inputs of `nodes`, and at their outputs if `gradients` are wanted and the model has them."""
    statistics = DenseStatistics()
    if gradients:
        predictions = find_predictions(captured)
        if isinstance(predictions, str):
            statistics.no_gradients = predictions
        else:
            try:
                statistics = dense_statistics(captured, nodes, predictions, progress, for_ranks=for_ranks)
            except DerivativeError as error:
                statistics.no_gradients = str(error)

    def keep(group: Group, sums: Statistics) -> dict[Node, PifaFactors]:
        names = [weight_name(node) for node in group.members]
        statistics.gram.update(dict.fromkeys(names, sums.gram.float()))
        statistics.sum_abs.update(dict.fromkeys(names, (sums.mean_abs * sums.tokens).float()))
        statistics.tokens.update(dict.fromkeys(names, sums.tokens))
        return {}

    def tell(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(done, total, f"dense model: {what}")

    unknown = [node for node in nodes if weight_name(node) not in statistics.gram]
    if unknown:  # all of them without gradients, otherwise those that the predictions do not depend on
        Sweep(captured, unknown, flows="dense").run(keep, tell)
    statistics.notes = (*statistics.notes, *captured.masks.notes())
    return statistics


def _check_token_ids(model: nn.Module, calls: list[Batch]) -> None:
    if not calls:
        raise CalibrationError("at least one calibration batch is needed, none came")
    embedding = _input_embedding(model)
    if embedding is None:
        return
    for call in calls:
        ids = (
            call.get("input_ids")
            if isinstance(call, Mapping)
            else call
            if isinstance(call, Tensor)
            else next(iter(call))
        )
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.numel() == 0:
            continue
        if int(ids.max()) >= embedding.num_embeddings or int(ids.min()) < 0:
            raise CalibrationError(
                f"calibration tokens lie in {int(ids.min())}..{int(ids.max())}, the model's vocabulary in "
                f"0..{embedding.num_embeddings - 1}; use the model's own tokenizer"
            )


def _input_embedding(model: nn.Module) -> nn.Embedding | None:
    """The embedding that a Hugging Face model's token ids go into, if it says so."""
    embed: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    if not callable(embed):
        return None
    try:
        found = embed()
    except NotImplementedError:  # what transformers says of models of several inputs, or of none that are tokens
        return None
    return found if isinstance(found, nn.Embedding) else None


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise RankError(f"weight {name} {list(parameter.shape)} holds NaN or Inf; repair it before compressing")


def _new_layers(
    model: nn.Module, factors: Mapping[str, PifaFactors], sites: Iterable[LayerSite]
) -> tuple[dict[str, nn.Module] | None, dict[str, str]]:
    """The layers to put into the model, by name, and which of them absorbed the row orders of which.

    None where it is no layers: the graph that `model` is reads the weights itself, and is rewritten.
    """
    names = {weight: weight.removesuffix(".weight") for weight in factors}
    if isinstance(model, GraphModule) and not all(is_plain_linear(module_at(model, name)) for name in names.values()):
        return None, {}
    layers: dict[str, nn.Module] = {
        names[weight]: layer_of(found, model.get_submodule(names[weight])) for weight, found in factors.items()
    }
    return layers, absorb_orders(model, sites, layers)

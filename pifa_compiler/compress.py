"""`compress`: dense linears become low-rank by M and are replaced by their PIFA form, in place."""

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .checkpoint import describe_if_pretrained
from .checkpoint.format import refuse_other_quantization
from .errors import CalibrationError, RankError
from .exchange.absorb import LayerSite, absorb_orders
from .exchange.atomic import Exchange
from .exchange.attention_layers import attention_as_layers
from .exchange.expert_layers import experts_as_layers, put_together
from .factors import PifaFactors
from .graph.capture import Batch
from .graph.linears import weight_name
from .graph.parts import capture_whole_or_in_parts
from .memory import format_bytes
from .modules import count_numbers, is_plain_linear, layer_of, module_at
from .numerics import own_numerics
from .passes import AbsorbOrder, Canonicalize, FactorizeLinear, run_passes
from .reconstruction.config import CompressConfig
from .reconstruction.gradients import Keep
from .reconstruction.needs import needs_of
from .reconstruction.reconstruct import Reconstruction, sum_gradients, sum_inputs
from .reconstruction.results import ResultsInMemory, factors_by_weight, reports_of
from .reconstruction.selection import left_dense, select_linears, shared_among, uses_of
from .reconstruction.statistics import DenseStatistics, SumsOfShared
from .reconstruction.sweep import Progress
from .report import Report


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
    check_token_ids(model, calls)
    _check_weights(model)
    with attention_as_layers(model) as attention, experts_as_layers(model) as experts:
        report, new, factors = _solve(model, calls, config, statistics, progress)
        if new is not None:
            new |= put_together(experts, new)
    with Exchange() as exchange:
        if new is None and isinstance(model, GraphModule):
            exchange.graph(model)
            run_passes(model, [Canonicalize(), FactorizeLinear(factors), AbsorbOrder()])
        for name, layers in attention.items():
            if any(f"{name}.{child}" in (new or {}) for child in layers._modules):
                exchange.module(model, name, layers)
        for name, module in (new or {}).items():
            exchange.module(model, name, module)
        report.layers += experts.reports(model)
        report.params_after = count_numbers(model)
        report.describe_rest(model)
        describe_if_pretrained(model, report, exchange)
        report.seconds = time.perf_counter() - started
        return report


def _solve(
    model: nn.Module,
    calls: list[Batch],
    config: CompressConfig,
    statistics: DenseStatistics | None,
    progress: Progress | None,
) -> tuple[Report, dict[str, nn.Module] | None, dict[str, PifaFactors]]:
    """Everything short of the exchange: the report, the layers to put into the model, and the factors by weight."""
    captured = capture_whole_or_in_parts(model, calls)
    selection = select_linears(model, captured.graph, config.skip, config.ranks)
    report = Report(config.method, config.density, params_before=count_numbers(model))
    report.planned_bytes = needs_of(captured, selection.found, config).in_memory
    if progress is not None:
        progress(0, 1, f"takes about {format_bytes(report.planned_bytes)} of memory")
    results = ResultsInMemory()
    reconstruction = Reconstruction(
        captured, selection.found, selection.one_order, config, results, statistics, progress=progress
    )
    ranked = reconstruction.run()
    reconstruction.tell(report)
    factors = factors_by_weight(results.groups)
    new, absorbed = _new_layers(model, factors, selection.sites)
    report.layers = selection.layers(captured.graph, (*left_dense(ranked), *reports_of(results.groups)), absorbed)
    return report, new, factors


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
    check_token_ids(model, calls)
    with attention_as_layers(model), experts_as_layers(model):
        captured = capture_whole_or_in_parts(model, calls)
        uses = uses_of(captured.graph, select_linears(model, captured.graph).found)
    statistics = DenseStatistics()

    def adder() -> Keep:
        shared = SumsOfShared(shared_among(uses))
        return lambda linears: statistics.add(shared.complete(linears))

    if gradients:
        linears = [use for nodes in uses.values() for use in nodes]
        statistics.no_gradients, statistics.notes = sum_gradients(captured, linears, adder(), progress)
    if statistics.no_gradients is not None:
        statistics.forget()
    unknown = [use for node, nodes in uses.items() if weight_name(node) not in statistics.gram for use in nodes]
    sum_inputs(captured, unknown, adder(), progress)
    statistics.notes = (*statistics.notes, *captured.masks.notes())
    if not gradients:
        statistics.no_gradients = "the statistics given were measured with gradients=False"
    return statistics


def check_token_ids(model: nn.Module, calls: list[Batch]) -> None:
    """Refuses calibration batches without any call, or with tokens that the model has no embedding of.

    Raises:
        CalibrationError: saying which tokens there are and which there may be.
    """
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

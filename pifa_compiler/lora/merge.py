"""`merge_lora`: layers with adapters become PIFA layers of a higher rank, or the nearest of the same."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import describe_if_pretrained
from ..errors import ConfigError, RankError
from ..exchange.atomic import Exchange
from ..factors import factorize
from ..linear import PifaLinear
from ..modules import count_numbers
from ..numerics import own_numerics
from ..report import LayerReport, Report

if TYPE_CHECKING:
    from peft import PeftModel

    from .layer import PifaLora


@own_numerics()
def merge_lora(model: "PeftModel", *, lossless: bool = True) -> Report:
    """Merges the active LoRA adapters of a PEFT model into its layers, in place, and takes the adapters away.

    W + scaling B A of a PIFA layer of rank r and an adapter of rank r' has rank r + r': written in PIFA form of that
    rank nothing is lost. Layers that are not in PIFA form are merged as PEFT does it. Afterwards
    `model.get_base_model()` is the model without adapters, to be saved, compiled and trained like any.

    Args:
        model: of PEFT, with adapters on `PifaLinear` layers.
        lossless: whether ranks grow by those of the adapters; otherwise the nearest weights (Eckart-Young) of the
            ranks that there were are taken, and the notes say what that loses.

    Returns:
        An entry for each PIFA layer that adapters were merged into.

    Raises:
        ConfigError: the model is none of PEFT's, or no active adapter is on a PIFA layer.
        RankError: adapters are not finite.
    """
    from .layer import PifaLora

    started = time.perf_counter()
    base = model.get_base_model() if hasattr(model, "get_base_model") else None
    if base is None:
        raise ConfigError(f"wanted a model with adapters (peft.get_peft_model), got a {type(model).__name__}")
    report = Report("lossless" if lossless else "nearest", None, params_before=count_numbers(base))
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, PifaLora)}
    new = {name: _merged(name, layer, report, lossless=lossless) for name, layer in found.items()}
    if not report.layers:
        raise ConfigError("no active adapter is on a PIFA layer: nothing to merge; model.unload() takes adapters away")
    with Exchange() as exchange:
        for name, layer in new.items():
            exchange.attribute(found[name], "merged_adapters", list(found[name].active_adapters))
            exchange.module(base, f"{name}.base_layer", layer)
        model.merge_and_unload()
        report.params_after = count_numbers(base)
        describe_if_pretrained(base, report, exchange)
    report.seconds = time.perf_counter() - started
    return report


def _merged(name: str, layer: "PifaLora", report: Report, *, lossless: bool) -> PifaLinear:
    base = layer.get_base_layer()
    assert isinstance(base, PifaLinear)  # noqa: S101  what it is registered for
    adapters = [each for each in layer.active_adapters if each in layer.lora_A]
    if not adapters:
        return base
    u, v = layer.delta_factors(adapters)
    independent = torch.eye(base.rank, dtype=torch.float64, device=u.device)
    rows = torch.cat((independent, base.coeff.double()))[base.row_order()]
    pair = torch.cat((rows, u), dim=1), torch.cat((base.w_pivot.double(), v))
    try:
        factors = factorize(pair, rank=None if lossless else base.rank, dtype=base.w_pivot.dtype)
    except RankError as error:
        raise RankError(f"{name} with adapters {', '.join(adapters)}: {error}") from error
    lost = _lost(pair, factors.dense())
    note = f"adapters {', '.join(adapters)} of rank {len(v)} merged; {lost:.1e} of the weight's norm is lost"
    shape = (base.out_features, base.in_features)
    report.layers.append(LayerReport.of_factors(name, shape, factors.rank, factors.quality, notes=(note,)))
    merged = PifaLinear.from_factors(factors, _bias(layer, base, adapters), base.w_pivot.requires_grad)
    return merged.train(base.training)


def _bias(layer: "PifaLora", base: PifaLinear, adapters: list[str]) -> Tensor | None:
    """The layer's bias with those that adapters bring."""
    added = [layer.lora_B[name].bias * layer.scaling[name] for name in adapters if layer.lora_bias[name]]
    if not added:
        return base.bias
    total: Tensor = sum(added, torch.zeros_like(added[0]) if base.bias is None else base.bias)
    return total.detach().to(base.w_pivot.dtype)


def _lost(pair: tuple[Tensor, Tensor], dense: Tensor) -> float:
    """||U V - W|| / ||U V||."""
    wanted = pair[0] @ pair[1]
    return float((wanted - dense.double()).norm() / wanted.norm())

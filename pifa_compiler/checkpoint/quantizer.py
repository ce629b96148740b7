"""PIFA models as transformers' `from_pretrained` and `save_pretrained` see them: a quantization method called "pifa".

Importing this module registers the method, so it is imported only where transformers is (see `registration`).
"""

import copy
import re
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..basis_linear import BasisLinear
from ..errors import CheckpointError, ConfigError
from ..exchange.atomic import Exchange
from ..exchange.attention_layers import take_apart
from ..exchange.pairs import chain_of, identity_behind, split_pairs
from ..experts import PifaExperts, PifaGroupedLinear, expert_weights, layer_name
from ..linear import PifaLinear, WithRowOrder
from ..modules import module_at
from ..report import Report
from .format import (
    FLOATING,
    FORMAT_VERSION,
    QUANT_METHOD,
    LayerShape,
    all_ranks,
    check_order,
    check_pivots,
    check_settings,
    check_tensors,
    refuse_other_quantization,
    refuse_pickles,
    refuse_plain_module,
)

Tensors = dict[str, Any]


@register_quantization_config(QUANT_METHOD)
class PifaConfig(QuantizationConfigMixin):
    """What `config.json` of a PIFA model says under `quantization_config`.

    Args:
        ranks: name of each layer in PIFA form, as in `named_modules` of the model saved, and its rank.
        method: how the low-rank weights were made, as in `Report.method`; None if unknown.
        density_requested: the budget asked for; None if unknown or lossless.
        density: what was reached, as in `Report.density`; None if unknown.
        versions: package name -> version that saved it.
        format_version: of these settings and of the tensors' names and shapes.
        pairs: for a layer that is the product of two linears, in the place of the first, the name of the second, where
            an identity stands.
        experts: name of each module of experts in PIFA form, and the ranks of those of its projections that are.
        bases: name of each layer of which heads are in a basis of inputs, and its head_features, heads and groups.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        method: str | None = None,
        density_requested: float | None = None,
        density: float | None = None,
        versions: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        pairs: dict[str, str] | None = None,
        experts: dict[str, dict[str, int]] | None = None,
        bases: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.quant_method: Any = quant_method  # transformers' own are an enumeration, others are plain strings
        self.format_version = format_version
        self.method = method
        self.density_requested = density_requested
        self.density = density
        self.ranks = dict(ranks)
        self.versions = dict(versions or {})
        if pairs:  # a folder without any is of the first format, which does not know the word
            self.pairs = dict(pairs)
        if experts:
            self.experts = {name: dict(held) for name, held in experts.items()}
        if bases:
            self.bases = {name: dict(held) for name, held in bases.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The settings in `config_dict`, checked.

        Raises:
            CheckpointError: they are of a newer format, or are not what this format says.
        """
        check_settings(config_dict, "config.json")
        layers = ("ranks", "pairs", "experts", "bases")
        known = (*layers, "method", "density_requested", "density", "versions", "format_version")
        config = cls(**{key: config_dict[key] for key in known if key in config_dict})
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(QUANT_METHOD)
class PifaHfQuantizer(HfQuantizer):
    """Puts `PifaLinear` modules into a model on the meta device before transformers fills in the weights."""

    quantization_config: PifaConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses a dense model: transformers cannot compress one while it loads it."""
        if not self.pre_quantized:
            raise CheckpointError("wanted a model in PIFA form, got a dense one; load it and call compress() on it")

    def update_attn_implementation(self, config: Any) -> Any:
        """The first hook that sees the model's config: takes out what stops programs that do not know PIFA."""
        config.transformers_weights = None
        folder = Path(config.name_or_path or "")
        if folder.is_dir() and config.name_or_path:
            refuse_pickles(folder)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same in releases of transformers without `update_attn_implementation`."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        placed = place_layers(model, self.quantization_config)
        for name, (layer, second, dtype) in placed.values():
            model.set_submodule(name, _empty_layer(layer, dtype))
            if second is not None:
                model.set_submodule(second, identity_behind(name.rpartition(".")[2]))
            # A tie that the saved model no longer had: its tensor is gone, and transformers looks for it.
            gone = tuple(f"{part}." for part in (name, second) if part is not None)
            for tied in [key for key in model.all_tied_weights_keys if key.startswith(gone)]:
                del model.all_tied_weights_keys[tied]
        shapes = {saved_name: layer for saved_name, (_, (layer, _, _)) in placed.items()}
        for saved_place, (place, layers) in place_experts(model, self.quantization_config).items():
            experts = model.get_submodule(place)
            empty = {name: _empty_experts_layer(layer, experts) for name, layer in layers.items()}
            model.set_submodule(place, PifaExperts.of(experts, empty))
            shapes |= {layer_name(saved_place, name): layer for name, layer in layers.items()}
        for name, empty_layer in place_bases(model, self.quantization_config).items():
            model.set_submodule(name, empty_layer)
        if checkpoint_files:
            check_tensors(checkpoint_files, all_ranks(vars(self.quantization_config)), shapes, model)
        # The guard of `add_guard` is expected, whichever layer it stands at.
        replaced = "|".join(re.escape(name) for name in _guards(model))
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"(^|\.)({replaced})$"}
        model._keys_to_ignore_on_load_unexpected = ignored

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _check_loaded(model)
        for name, module in model.named_modules():
            if isinstance(module, WithRowOrder):
                if module.pivots.is_meta:
                    raise CheckpointError(f"{name}: its pivots were left on disk; load without offload_buffers")
                check_pivots(module.pivots, module.pivots.shape[-1], module.out_features, name)
                if isinstance(module, PifaLinear):
                    module.__class__ = PifaLinear
                module.restore_order()
            elif isinstance(module, BasisLinear):
                check_order(module.order, name)
        # Factors are ordinary floating-point parameters: half(), float() and training need no special care.
        model.is_quantized = False

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensors, dict[str, Any]]:
        """What to save: the state dict and a guard against loaders that do not know PIFA.

        Called by every `model.save_pretrained` before it writes: the config is brought up to date with the layers.
        """
        describe(model)
        check_loadable(model, model.config.quantization_config)
        return add_guard(model.state_dict(), model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the factors can be fine-tuned."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether they can be fine-tuned without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model."""
        return True


def describe(model: Any, report: Report | None = None, exchange: Exchange | None = None) -> dict[str, Any]:
    """Writes what a loader has to know into `model.config.quantization_config`, and returns it as plain values.

    After it, `model.save_pretrained(folder)` gives a folder that loads, or refuses. Ranks, pairs, experts and versions
    are taken from the model and the installed packages; method and densities from `report`, or else as they were.

    Args:
        model: a `PreTrainedModel` with layers in PIFA form; it shares its config with models built from the same one.
        report: what was done to it.
        exchange: a block in which the model is being changed: what is written here is undone with the rest.

    Raises:
        CheckpointError: it is no Hugging Face model, has no layer in PIFA form, or is quantized otherwise.
    """
    refuse_plain_module(model)
    pairs = split_pairs(model)
    ranks = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, PifaLinear)}
    experts: dict[str, dict[str, Any]] = {
        name: {projection: layer.rank for projection, layer in module.pifa.items()}
        for name, module in model.named_modules()
        if isinstance(module, PifaExperts) and module.pifa
    }
    bases = {
        name: {"head_features": layer.head_features, "heads": layer.heads, "groups": layer.groups}
        for name, layer in model.named_modules()
        if isinstance(layer, BasisLinear)
    }
    if not ranks and not experts and not bases:
        raise CheckpointError(
            "no layer of this model is in PIFA form: compress() it first, or call its own save_pretrained"
        )
    refuse_other_quantization(model)
    kept = dict(getattr(model.config, "quantization_config", None) or {})
    config = PifaConfig(
        ranks,
        method=report.method if report else kept.get("method"),
        density_requested=report.density_requested if report else kept.get("density_requested"),
        density=report.density if report else kept.get("density"),
        versions={
            "pifa-compiler": version("pifa-compiler"),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        format_version=4 if bases else 3 if experts else 2 if pairs else 1,
        pairs=pairs,
        experts=experts,
        bases=bases,
    )
    with Exchange() if exchange is None else nullcontext(exchange) as block:
        attach(model, config, block)
    settings: dict[str, Any] = config.to_dict()
    return settings


def _check_loaded(model: Any) -> None:
    """Refuses a model with parameters that transformers made up, as their tensors are missing, or that are no floats.

    A head that the saved model did not have is new to this class, and there to be trained.
    """
    prefix = f"{model.base_model_prefix}."
    whole = type(model).__name__ in (model.config.architectures or []) or model.base_model is model
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, parameter in model.named_parameters():
        if parameter.is_meta or any(pattern.search(name) for pattern in ignored):
            continue
        if not getattr(parameter, "_is_hf_initialized", False) and (whole or name.startswith(prefix)):
            raise CheckpointError(
                f"the tensor {name} is missing; the folder is damaged or incomplete: copy or save it again"
            )
        if parameter.dtype not in FLOATING:
            raise CheckpointError(f"{name}: wanted floating-point numbers, got {parameter.dtype}; it is damaged")


def add_guard(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """`state_dict` and a number or two named like a dense weight, so that a loader of dense layers finds a mismatch."""
    name, shape = next(iter(_guards(model).items()))
    return {**state_dict, name: torch.zeros(shape, dtype=model.dtype)}


def _guards(model: Any) -> dict[str, tuple[int, ...]]:
    """Names of dense weights that a model has no more, and a shape that none has; those of linear layers first."""
    modules = list(model.named_modules())
    guards: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (1,) for name, module in modules if isinstance(module, PifaLinear | BasisLinear)
    }
    for place, module in modules:
        if isinstance(module, PifaExperts):
            # Sorted, for every save of a model has to name the same guard.
            names = {"gate_up_proj" if name == "gate_proj" else name for name in module.pifa} - {"up_proj"}
            # transformers takes weights of experts apart when it saves them, and puts them together when it loads them.
            guards |= {f"{place}.{name}": (1, 2, 1) for name in sorted(names) or ["up_proj"]}
    return guards


def attach(model: Any, config: PifaConfig, exchange: Exchange) -> None:
    """Leaves a compressed model as `from_pretrained` would: `model.save_pretrained` then writes a loadable folder."""
    exchange.attribute(model.config, "quantization_config", config)
    exchange.attribute(model, "hf_quantizer", PifaHfQuantizer(config))
    exchange.attribute(model, "quantization_method", config.quant_method)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for own in configs.values():
        # Flash attention then asks the config for the dtype, not the first nn.Linear, which may be gone.
        exchange.attribute(own, "_is_quantized", True)


Placed = tuple[str, tuple[LayerShape, str | None, torch.dtype]]
"""Where a layer goes: its name, and its shape, the name of the second linear it stands for, its dtype."""


def place_layers(model: Any, config: PifaConfig) -> dict[str, Placed]:
    """Where the layers of a saved model go in one that has none of them yet, by the names they were saved with.

    Where they are projections of an `nn.MultiheadAttention`, that is taken apart.

    Raises:
        CheckpointError: the model has no such linear layer, or one of another shape.
    """
    pairs: dict[str, str] = getattr(config, "pairs", {})
    placed: dict[str, Placed] = {}
    take_apart(model, [name for saved_name in config.ranks for name in _names(saved_name, model)])
    for saved_name, rank in config.ranks.items():
        name = _place_of(saved_name, model)
        if name is None:
            continue
        second = _place_of(pairs[saved_name], model) if saved_name in pairs else None
        linears = _linears_at(saved_name, model, name, second)
        d_in, d_out = _dense_shape(linears[0])[1], _dense_shape(linears[-1])[0]
        layer = LayerShape(d_out, d_in, rank, linears[-1].bias is not None)
        _check_rank(saved_name, layer)
        placed[saved_name] = (name, (layer, second, linears[0].weight.dtype))
    return placed


def _check_rank(name: str, layer: LayerShape) -> None:
    most = min(layer.out_features, layer.in_features)
    if not 1 <= layer.rank <= most:
        raise CheckpointError(
            f"{name}: the config says rank {layer.rank}, wanted 1..{most} for a weight "
            f"[{layer.out_features}, {layer.in_features}]; the folder does not fit its model"
        )


def place_experts(model: Any, config: PifaConfig) -> dict[str, tuple[str, dict[str, LayerShape]]]:
    """Where the experts in PIFA form of a saved model go: by the name they were saved with, name and layers.

    Raises:
        CheckpointError: the model has no such experts, or they have no such projections.
    """
    placed = {}
    for saved_place, ranks in getattr(config, "experts", {}).items():
        place = next((name for name in _names(saved_place, model) if module_at(model, name) is not None), None)
        if place is None:
            _refuse_missing(saved_place, model)
            continue
        weights = expert_weights(model.get_submodule(place), joint="gate_up_proj" in ranks)
        if isinstance(weights, str) or not ranks.keys() <= weights.keys():
            found = weights if isinstance(weights, str) else f"has {', '.join(weights)}"
            raise CheckpointError(
                f"{saved_place}: the config says that these are experts with {', '.join(ranks)}, the model's are not: "
                f"{found}; the folder does not fit its model"
            )
        layers = {}
        for name, rank in ranks.items():
            experts, d_out, d_in = weights[name].weight.shape
            layers[name] = LayerShape(d_out, d_in, rank, weights[name].bias is not None, experts)
            _check_rank(f"{saved_place}.{name}", layers[name])
        placed[saved_place] = (place, layers)
    return placed


def place_bases(model: Any, config: PifaConfig) -> dict[str, BasisLinear]:
    """The layers of a saved model of which heads are in a basis of inputs, without values, by their names in `model`.

    Raises:
        CheckpointError: the model has no such linear layer, or one of another shape.
    """
    placed = {}
    for saved_name, sizes in getattr(config, "bases", {}).items():
        name = _place_of(saved_name, model)
        if name is None:
            continue
        dense = model.get_submodule(name)
        d_out, d_in = _dense_shape(dense)
        try:
            placed[name] = BasisLinear(
                d_in, d_out, **sizes, bias=dense.bias is not None, device="meta", dtype=dense.weight.dtype
            )
        except ConfigError as error:
            raise CheckpointError(f"{saved_name}: {error}; the folder does not fit its model") from error
    return placed


def check_loadable(model: Any, config: PifaConfig) -> None:
    """Refuses to save layers that no loader could put back: where the model's own class has no such linears.

    Raises:
        CheckpointError: naming the layer.
    """
    settings = copy.deepcopy(model.config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    try:
        with torch.device("meta"):
            fresh = type(model)._from_config(settings)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return  # it cannot be made without values, or by its config alone: loading it will say so, if it fails
    try:
        layers = {name: layer for name, (_, (layer, _, _)) in place_layers(fresh, config).items()}
        for place, (_, held) in place_experts(fresh, config).items():
            layers |= {layer_name(place, name): layer for name, layer in held.items()}
        for name, wanted in layers.items():
            layer = model.get_submodule(name)
            experts = getattr(layer, "experts", None)
            found = LayerShape(layer.out_features, layer.in_features, layer.rank, layer.bias is not None, experts)
            if found != wanted:
                raise CheckpointError(f"{name}: a {type(model).__name__} has {wanted} there, this model {found}")
        for name, empty in place_bases(fresh, config).items():
            if str(empty) != str(model.get_submodule(name)):  # which show all their sizes
                raise CheckpointError(f"{name}: a {type(model).__name__} has {empty} there")
    except CheckpointError as error:
        raise CheckpointError(
            f"this model could not be loaded again ({error}); save its state_dict() with safetensors.torch, and load "
            "it into a model that compact() has changed in the same way"
        ) from error


def _names(saved_name: str, model: Any) -> tuple[str, ...]:
    """What a layer saved as `saved_name` may be called: a body saved with a head lacks its prefix without one."""
    prefix = f"{model.base_model_prefix}."
    return saved_name, saved_name.removeprefix(prefix), prefix + saved_name


def _place_of(saved_name: str, model: Any) -> str | None:
    """Name in `model` of a layer saved as `saved_name`; None if it belongs to a head that this class does not have.

    A body saved with a head can be loaded without it and the other way round; `base_model_prefix` is the difference.
    """
    for name in _names(saved_name, model):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear | Conv1D) or chain_of(module) is not None:
            return name
        raise CheckpointError(
            f"{saved_name}: the config says that this is a linear layer, the model has a {type(module).__name__}; "
            "the folder does not fit its model"
        )
    _refuse_missing(saved_name, model)
    return None


def _refuse_missing(saved_name: str, model: Any) -> None:
    """Refuses a name that `model` lacks, unless it may belong to a head that its class does not have."""
    own_class = type(model).__name__ in (model.config.architectures or [])
    if own_class or saved_name.startswith(f"{model.base_model_prefix}."):
        raise CheckpointError(
            f"the config names the layer {saved_name}, which {type(model).__name__} does not have; "
            "the folder does not fit its model"
        )


def _linears_at(saved_name: str, model: Any, name: str, second: str | None) -> list[Any]:
    """The linear layer of `model` that a saved layer stands for, or the two of a pair."""
    module = model.get_submodule(name)
    chain = chain_of(module)
    linears = [module]
    if second is not None:
        linears = [module, model.get_submodule(second)]
    elif chain is not None:
        linears = [module.get_submodule(part) for part in chain]
    fits = all(isinstance(linear, nn.Linear | Conv1D) for linear in linears)
    if fits and len(linears) == 2:
        fits = _dense_shape(linears[0])[0] == _dense_shape(linears[1])[1] and linears[0].bias is None
    if not fits:
        raise CheckpointError(
            f"{saved_name}: the config says that this is a pair of linears, the model has "
            f"{' and '.join(str(linear) for linear in linears)}; the folder does not fit its model"
        )
    return linears


def _dense_shape(module: Any) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or of GPT-2's `Conv1D`, whose weight is stored [in, out]."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return int(module.nf), int(module.nx)


class _Unloaded(PifaLinear):
    """A layer between the meta device and its values.

    transformers initializes what it has not loaded, which lets some models write on the weights of their linear layers
    whether loaded or not. They get a stand-in to write on; the dense weight is not built, nor is its row order there.
    """

    def _dense_weight(self) -> Tensor:
        return torch.empty(self.out_features, self.in_features, device="meta", dtype=self.w_pivot.dtype)


def _empty_layer(layer: LayerShape, dtype: torch.dtype) -> PifaLinear:
    return _Unloaded(layer.in_features, layer.out_features, layer.rank, layer.bias, device="meta", dtype=dtype)


def _empty_experts_layer(layer: LayerShape, experts: Any) -> PifaGroupedLinear:
    dtype = next(experts.parameters(recurse=False)).dtype
    return PifaGroupedLinear(
        layer.experts or 0, layer.in_features, layer.out_features, layer.rank, layer.bias, device="meta", dtype=dtype
    )

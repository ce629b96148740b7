"""Speed of whole causal language models, prefill and decode, in the variants of `bench_layer`.

Each variant's logits are compared with the dense model's before it is timed, and all are timed by turns.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.format import QUANT_METHOD, loading_errors, quant_method, read_json
from ..errors import CheckpointError, ConfigError
from ..exchange.absorb import layer_sites
from ..factors import rank_for_density
from ..files import expand_home
from ..graph.capture import capture
from ..linear import PifaLinear
from ..modules import replace_linear
from ..reconstruction.sweep import Progress
from .layer import BACKENDS, VARIANTS, dense_linear, low_rank_pair, random_factors
from .rows import BenchRow
from .timing import DTYPES, LEAST_ROUNDS, call_of, compile_apart, interleaved_medians, refuse_wrong, threads_set

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BUILT_IN: Mapping[str, dict[str, Any]] = {
    "llama-16x2048": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 1024,  # small, so that the head, which stays dense, does not weigh
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "llama-8x4096": {  # eight layers of Llama-2-7B
        "num_hidden_layers": 8,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
"""Llamas that need no file, as settings of `LlamaConfig`."""


@dataclass(frozen=True)
class ModelRow(BenchRow):
    """One phase of a language model, batch 1.

    Attributes:
        model: what was asked for; `layers` of its decoder.
        phase: "prefill" (one pass over `tokens` tokens) or "decode" (one token with a cache that holds `tokens`).
        density: stored numbers of the replaced linears over their dense numbers.
        dense_ms, lowrank_ms, plain_ms, pifa_ms: medians of `rounds` calls.
        pifa_error: root mean square of the difference from the dense model's logits, over that of those logits.
    """

    model: str
    phase: str
    dtype: str
    layers: int
    tokens: int
    density: float
    threads: int
    dense_ms: float
    lowrank_ms: float
    plain_ms: float
    pifa_ms: float
    pifa_error: float
    rounds: int
    pifa_over_lowrank: float = field(init=False)
    pifa_over_dense: float = field(init=False)


@dataclass(frozen=True)
class ModelPlan:
    """What `model_rows` measures.

    Attributes:
        density: of random models, in (0, 1]; a saved model has its own.
        dtype: one of `DTYPES`.
        prompt_tokens: of the prefill.
        decode_context: tokens that the cache holds when one more is decoded.
        layers: of random models; None is as many as the configuration says.
        seconds: of timing for each variant and phase.
        repeats: rounds to make even if that takes longer.
        threads: PyTorch's; None leaves them as they are.
        rank_multiple: of the ranks of random models.
    """

    density: float = 0.5
    dtype: str = "bf16"
    prompt_tokens: int = 512
    decode_context: int = 512
    layers: int | None = None
    seconds: float = 1.0
    repeats: int = LEAST_ROUNDS
    threads: int | None = None
    rank_multiple: int = 32


@torch.no_grad()
def model_rows(source: str, plan: ModelPlan, progress: Progress | None = None) -> Iterator[ModelRow]:
    """Measures a causal language model, one row for the prefill and one for decoding.

    Args:
        source: a folder with a saved PIFA model, a folder with a config.json or such a file (its weights are not read,
            random ones are measured), or a name from `BUILT_IN`.
        plan: how.
        progress: called with (done, total, what).

    Raises:
        CheckpointError: there is nothing to measure at `source`, or it is damaged.
        ConfigError: an option does not fit the model.
        BenchError: a variant's logits are wrong; nothing of that phase has been timed.
        CaptureError: a variant cannot be compiled.
    """
    tell = progress or _silent
    with threads_set(plan.threads):
        torch.manual_seed(0)
        tell(0, 3, "building the models")
        model = open_model(source, plan)
        models = model_variants(model)
        for done, (phase, tokens) in enumerate((("prefill", plan.prompt_tokens), ("decode", plan.decode_context))):
            tell(1 + done, 3, phase)
            yield _model_row(source, phase, tokens, models, plan)
            torch._dynamo.reset()


def open_model(source: str, plan: ModelPlan) -> "PreTrainedModel":
    """The model to measure, in PIFA form, frozen, in evaluation mode; see `model_rows`."""
    path = expand_home(source, CheckpointError)
    if source in BUILT_IN:
        from transformers import LlamaConfig

        return _random_model(LlamaConfig(**BUILT_IN[source]), plan)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        raise CheckpointError(
            f"there is no model or configuration at {source!r}; give a folder with config.json, such a file, or "
            f"one of {', '.join(BUILT_IN)}"
        )
    if quant_method(read_json(file)) == QUANT_METHOD and path.is_dir():
        return _saved_model(path, plan)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file)
    except loading_errors() as error:
        raise CheckpointError(f"transformers cannot read {file}: {error}") from error
    return _random_model(config, plan)


def _saved_model(folder: Path, plan: ModelPlan) -> "PreTrainedModel":
    from ..checkpoint import load_pretrained

    if plan.layers is not None:
        raise ConfigError(f"{folder} is a saved model; the number of layers is for random weights only")
    model: PreTrainedModel = load_pretrained(folder, dtype=DTYPES[plan.dtype])
    model.requires_grad_(False)
    return model


def _random_model(config: "PretrainedConfig", plan: ModelPlan) -> "PreTrainedModel":
    """A causal language model with every linear but the head in PIFA form, with random factors."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if plan.layers is not None:
        config.num_hidden_layers = plan.layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: plan.layers]
    try:
        with no_init_weights():  # the dense weights are replaced, and random numbers for them would take long
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[plan.dtype])
    except ValueError as error:
        raise ConfigError(f"no causal language model can be made of it: {str(error).splitlines()[0]}") from error
    head = model.get_output_embeddings()
    # As `compress` leaves a model: layers whose row order the next one can absorb have none.
    sites = layer_sites(capture(model, [torch.zeros(1, 2, dtype=torch.int64)]).graph)
    absorbed = {name for site in sites for name in site.sources}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            _randomize_linear(model, name, module, plan, ordered=name in absorbed)
    model.init_weights()
    model.requires_grad_(False)
    model.eval()
    return model


def _randomize_linear(model: nn.Module, name: str, module: nn.Linear, plan: ModelPlan, *, ordered: bool) -> None:
    """Random factors for one linear; `ordered`: the pivots are its first rows, so that there is no row order."""
    d_out, d_in = module.weight.shape
    rank = rank_for_density(d_out, d_in, plan.density, multiple=plan.rank_multiple)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    factors = random_factors(d_out, d_in, rank, module.weight.dtype)
    replace_linear(model, name, replace(factors, pivots=torch.arange(rank)) if ordered else factors)


def model_variants(model: "PreTrainedModel") -> dict[str, "PreTrainedModel"]:
    """A model for each of `VARIANTS`; what is no PIFA layer is shared, `plain` and `pifa` are `model` itself.

    Raises:
        ConfigError: the model has no PIFA layer.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, PifaLinear)]
    if not layers:
        raise ConfigError("the model has no PIFA layer, so there is nothing to compare; lower the density")
    made: dict[str, PreTrainedModel] = {}
    for variant, convert in (("dense", dense_linear), ("lowrank", low_rank_pair)):
        shared = [*model.parameters(), *model.buffers()]
        made[variant] = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        for name in layers:
            layer: Any = model.get_submodule(name)
            made[variant].set_submodule(name, convert(layer))
    return {**made, "plain": model, "pifa": model}


def model_bound(dtype: torch.dtype, linears: Sequence[PifaLinear]) -> float:
    """The largest relative error of the logits that is rounding, as a root mean square.

    Each linear rounds its intermediate values, its output and, where it is dense or a pair, its weights: some two eps
    of what it adds; its sums are kept in float32, whose errors grow as the root of their length. Errors of different
    layers are independent, so their squares add up.
    """
    eps, eps_of_sums = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return math.sqrt(sum((2 * eps) ** 2 + eps_of_sums**2 * layer.in_features for layer in linears))


def _model_row(
    source: str, phase: str, tokens: int, models: Mapping[str, "PreTrainedModel"], plan: ModelPlan
) -> ModelRow:
    model = models["pifa"]
    linears = [module for module in model.modules() if isinstance(module, PifaLinear)]
    compiled = {name: compile_apart(models[name], BACKENDS[name], f"{phase}_{name}") for name in VARIANTS}
    calls, prepare = phase_calls(models, compiled, phase, tokens)
    errors = checked_errors(calls, prepare, model_bound(DTYPES[plan.dtype], linears), f"{phase} of {source}")
    timing = interleaved_medians(calls, plan.seconds, least=plan.repeats, prepare=prepare)
    return ModelRow(
        source,
        phase,
        plan.dtype,
        model.config.get_text_config(decoder=True).num_hidden_layers,
        tokens,
        density_of(linears),
        torch.get_num_threads(),
        **{f"{name}_ms": timing.milliseconds[name] for name in VARIANTS},
        pifa_error=errors["pifa"],
        rounds=timing.rounds,
    )


def density_of(linears: Sequence[PifaLinear]) -> float:
    """Stored numbers, of row orders too, over the numbers of the dense weights."""
    stored = sum(layer.w_pivot.numel() + layer.coeff.numel() + layer.rank for layer in linears)
    return stored / sum(layer.in_features * layer.out_features for layer in linears)


def phase_calls(
    models: Mapping[str, "PreTrainedModel"],
    compiled: Mapping[str, Callable[..., Any]],
    phase: str,
    tokens: int,
    batch: int = 1,
) -> tuple[dict[str, Callable[[], Any]], Callable[[], None] | None]:
    """A call of every variant for one phase, and what has to be called before each.

    Args:
        models: by variant; "dense" is one of them.
        compiled: what to call, by variant.
        phase, tokens: as in `ModelRow`.
        batch: sequences.

    Raises:
        ConfigError: the model does not take so many tokens.
    """
    model = models["dense"]
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens + (phase == "decode") > longest:
        raise ConfigError(f"the model takes at most {longest} tokens at once, {phase} wants {tokens}; ask for fewer")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (batch, tokens), device=model.device)
    if phase == "prefill":
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in signature(model.forward).parameters:
            options["logits_to_keep"] = 1  # as generation does it: only the last logits choose a token
        return {name: call_of(function, input_ids=prompt, **options) for name, function in compiled.items()}, None
    caches = _filled_caches(model, prompt, tuple(compiled))
    token = prompt[:, :1]
    calls = {
        name: call_of(function, input_ids=token, past_key_values=caches[name], use_cache=True)
        for name, function in compiled.items()
    }
    return calls, _rewinder(list(caches.values()))


def checked_errors(
    calls: Mapping[str, Callable[[], Any]], prepare: Callable[[], None] | None, bound: float, where: str
) -> dict[str, float]:
    """Root mean square of the difference from the dense model's logits, over that of those logits, by variant.

    Raises:
        BenchError: one exceeds `bound`.
    """
    logits = {}
    for name, call in calls.items():
        if prepare is not None:
            prepare()
        logits[name] = call().logits[:, -1].double()
    size = logits["dense"].square().mean().sqrt()
    errors = {name: float((found - logits["dense"]).square().mean().sqrt() / size) for name, found in logits.items()}
    refuse_wrong(errors, bound, where)
    return errors


def _filled_caches(model: "PreTrainedModel", prompt: Tensor, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """For each variant a cache with room for one token more than `prompt`, filled by `model`."""
    from transformers import StaticCache

    config = model.config.get_text_config(decoder=True)
    caches: dict[str, Any] = {}
    for name in variants:
        caches[name] = StaticCache(config=config, max_cache_len=prompt.shape[1] + 1)
        if name != variants[0]:
            # All start from the same numbers, and a cache cannot be copied: its tensors are marked as static.
            for mine, filled in zip(caches[name].layers, caches[variants[0]].layers, strict=True):
                mine.lazy_initialization(filled.keys, filled.values)
                mine.keys.copy_(filled.keys)
                mine.values.copy_(filled.values)
                mine.cumulative_length = copy.deepcopy(filled.cumulative_length)
        else:
            model(input_ids=prompt, past_key_values=caches[name], use_cache=True)
    return caches


def _rewinder(caches: Sequence[Any]) -> Callable[[], None]:
    """Sets caches back to the length that they have now; the token behind it is written over by the next call."""
    lengths = [(layer, copy.deepcopy(layer.cumulative_length)) for cache in caches for layer in cache.layers]

    def rewind() -> None:
        for layer, length in lengths:
            if isinstance(length, Tensor):
                layer.cumulative_length.copy_(length)  # in place: compiled code holds the tensor
            else:
                layer.cumulative_length = length

    return rewind


def _silent(done: int, total: int, what: str) -> None:
    pass

"""Speed of PIFA beside dense weights and low-rank pairs, measured side by side in one process.

Four variants compute the same thing from the same random or saved weights: `dense` (one weight), `lowrank` (a pair
U, V of the same rank), `plain` (the PIFA operator as Inductor sees it) and `pifa` (`torch.compile(backend="pifa")`).
The first three are compiled by Inductor. Each is checked before it is timed, and all are timed by turns.
"""

import copy
import csv
import json
import math
import os
import platform
import subprocess
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from inspect import signature
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .absorb import layer_sites
from .capture import capture
from .errors import BenchError, CaptureError, CheckpointError, ConfigError
from .factors import FactorQuality, PifaFactors, rank_for_density
from .linear import PifaLinear
from .linears import replace_linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ("dense", "lowrank", "plain", "pifa")
BACKENDS = {"dense": "inductor", "lowrank": "inductor", "plain": "inductor", "pifa": "pifa"}

LEAST_ROUNDS = 5
"""Every median is one of at least so many calls."""

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
    }
}
"""Llamas that need no file, as settings of `LlamaConfig`."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Timing:
    """Medians of calls made by turns.

    Attributes:
        milliseconds: the median of each call, by name.
        rounds: how often each was called.
    """

    milliseconds: dict[str, float]
    rounds: int


@dataclass(frozen=True)
class LayerRow:
    """One linear layer of shape [d, d] without bias, applied to [tokens, d].

    Attributes:
        dtype: one of `DTYPES`.
        rank: of the low-rank pair and of PIFA.
        threads: of PyTorch.
        dense_ms, lowrank_ms, plain_ms, pifa_ms: medians of `rounds` calls.
        pifa_error: largest error of `pifa` over the largest output, against float64; `lowrank_error` that of the pair.
    """

    dtype: str
    d: int
    tokens: int
    rank: int
    threads: int
    dense_ms: float
    lowrank_ms: float
    plain_ms: float
    pifa_ms: float
    lowrank_error: float
    pifa_error: float
    rounds: int
    pifa_over_lowrank: float = field(init=False)
    pifa_over_dense: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pifa_over_lowrank", self.pifa_ms / self.lowrank_ms)
        object.__setattr__(self, "pifa_over_dense", self.pifa_ms / self.dense_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and CSV."""
        return asdict(self)


@dataclass(frozen=True)
class ModelRow:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "pifa_over_lowrank", self.pifa_ms / self.lowrank_ms)
        object.__setattr__(self, "pifa_over_dense", self.pifa_ms / self.dense_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and CSV."""
        return asdict(self)


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = LEAST_ROUNDS,
    prepare: Callable[[], None] | None = None,
) -> Timing:
    """Times calls by turns, so that a machine that slows down slows all of them down.

    The first call moves back by one each round: none always follows the same other one, with the same cache contents.

    Args:
        calls: what to time, by name.
        seconds: for each of them, all rounds together; rounds go on until it is used up.
        least: rounds to make even if that takes longer.
        prepare: called before every call, untimed.
    """
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    ends, rounds = time.perf_counter() + seconds * len(names), 0
    while rounds < least or time.perf_counter() < ends:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            if prepare is not None:
                prepare()
            call = calls[name]
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
        rounds += 1
    return Timing({name: median(times) * 1e3 for name, times in taken.items()}, rounds)


@torch.no_grad()
def layer_rows(
    dims: Sequence[int],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    *,
    seconds: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Iterator[LayerRow]:
    """Measures square layers at rank d / 2, one row for every dtype, size and number of tokens.

    Args:
        dims: sizes d, each 2 or more.
        tokens: rows of the input.
        dtypes: names from `DTYPES`.
        seconds: of timing for each variant in a cell.
        threads: PyTorch's; None leaves them as they are.
        progress: called with (done, total, what).

    Raises:
        BenchError: a variant's result is wrong; nothing of that cell has been timed.
        CaptureError: a variant cannot be compiled.
    """
    cells = list(product(dtypes, dims, tokens))
    with _threads(threads):
        for done, (dtype, d, count) in enumerate(cells):
            if progress is not None:
                progress(done, len(cells), f"{dtype}, d = {d}, {count} tokens")
            yield _layer_row(dtype, d, count, seconds)


def _layer_row(dtype: str, d: int, tokens: int, seconds: float) -> LayerRow:
    torch.manual_seed(0)
    factors = _random_factors(d, d, d // 2, DTYPES[dtype])
    modules = layer_variants(factors)
    x = torch.randn(tokens, d).to(DTYPES[dtype])
    reference = _apply_exactly(factors, x)
    compiled = {name: _compile(module, BACKENDS[name], f"layer_{name}") for name, module in modules.items()}
    calls = {name: _call(function, x) for name, function in compiled.items()}
    bound = layer_bound(DTYPES[dtype], d)
    errors = {
        name: float((call().double() - reference).abs().max() / reference.abs().max()) for name, call in calls.items()
    }
    _refuse_wrong(errors, bound, f"{dtype}, d = {d}, {tokens} tokens")
    timing = interleaved_medians(calls, seconds)
    torch._dynamo.reset()  # or the next cell's weights would be looked for among this one's compiled code
    return LayerRow(
        dtype,
        d,
        tokens,
        factors.rank,
        torch.get_num_threads(),
        **{f"{name}_ms": timing.milliseconds[name] for name in VARIANTS},
        lowrank_error=errors["lowrank"],
        pifa_error=errors["pifa"],
        rounds=timing.rounds,
    )


def layer_bound(dtype: torch.dtype, d: int) -> float:
    """The largest error of a layer of size d that is rounding, over the largest output.

    Weights, the r intermediate values and the output are each rounded to `dtype` once, an error of at most eps / 2 of
    a typical value; the largest output is some four typical ones. Sums of d terms are kept in float32, whose errors
    grow as the root of d. A wrong row is off by about 1.
    """
    return 4 * torch.finfo(dtype).eps + math.sqrt(d) * torch.finfo(torch.float32).eps


def layer_variants(factors: PifaFactors, bias: Tensor | None = None) -> dict[str, nn.Module]:
    """The modules of `VARIANTS` for one weight; `plain` and `pifa` are one module.

    Args:
        factors: the weight [out, in], in the dtype to measure.
        bias: [out], or None.
    """
    pifa = PifaLinear.from_factors(factors, bias, requires_grad=False).eval()
    return {"dense": _dense_linear(pifa), "lowrank": _pair(pifa), "plain": pifa, "pifa": pifa}


def _dense_linear(layer: PifaLinear) -> nn.Linear:
    """The layer's weight put together in float64, as one linear."""
    w_pivot, coeff = layer.w_pivot.double(), layer.coeff.double()
    weight = torch.cat((w_pivot, coeff @ w_pivot))[layer.row_order()].to(layer.w_pivot.dtype)
    return _linear(weight, layer.bias)


def _pair(layer: PifaLinear) -> nn.Sequential:
    """The layer's weight as U V, at its rank.

    [I; coeff] times w_pivot would do, but its zeros are no usual factor: a reflection H, its own inverse, fills them.
    """
    w_pivot, coeff = layer.w_pivot.double(), layer.coeff.double()
    axis = torch.randn(layer.rank, 1, dtype=torch.float64)
    axis /= axis.norm()
    eye = torch.eye(layer.rank, dtype=torch.float64)
    u = torch.cat((eye - 2 * axis @ axis.T, coeff - 2 * (coeff @ axis) @ axis.T))[layer.row_order()]
    v = w_pivot - 2 * axis @ (axis.T @ w_pivot)
    dtype = layer.w_pivot.dtype
    return nn.Sequential(_linear(v.to(dtype), None), _linear(u.to(dtype), layer.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


def _random_factors(d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> PifaFactors:
    """Random factors whose outputs are about as large as their inputs, with coefficients below 1 as after maxvol.

    Time does not depend on the values, and to factorize a random pair of size 4096 would take longer than to measure.
    """
    w_pivot = torch.randn(rank, d_in) / math.sqrt(d_in)
    coeff = (torch.rand(d_out - rank, rank) * 2 - 1) * min(1.0, math.sqrt(3 / rank))
    pivots = torch.randperm(d_out)[:rank].sort().values
    quality = FactorQuality(float(coeff.abs().max()) if coeff.numel() else 0.0, math.nan, 0.0)
    return PifaFactors(w_pivot.to(dtype), coeff.to(dtype), pivots, quality)


def _apply_exactly(factors: PifaFactors, x: Tensor) -> Tensor:
    """x [tokens, in] times the stored factors, in float64: [tokens, out]."""
    y_pivot = x.double() @ factors.w_pivot.double().T
    return torch.cat((y_pivot, y_pivot @ factors.coeff.double().T), dim=-1)[:, factors.order()]


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
    with _threads(plan.threads):
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
    path = Path(source).expanduser()
    if source in BUILT_IN:
        from transformers import LlamaConfig

        return _random_model(LlamaConfig(**BUILT_IN[source]), plan)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        raise CheckpointError(
            f"there is no model or configuration at {source!r}; give a folder with config.json, such a file, or "
            f"one of {', '.join(BUILT_IN)}"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; copy it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is no configuration: it holds no JSON object; copy it again")
    if (settings.get("quantization_config") or {}).get("quant_method") == "pifa" and path.is_dir():
        return _saved_model(path, plan)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot read {file}: {str(error).splitlines()[0]}") from error
    return _random_model(config, plan)


def _saved_model(folder: Path, plan: ModelPlan) -> "PreTrainedModel":
    from .checkpoint import load_pretrained

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
    factors = _random_factors(d_out, d_in, rank, module.weight.dtype)
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
    for variant, convert in (("dense", _dense_linear), ("lowrank", _pair)):
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
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens + (phase == "decode") > longest:
        raise ConfigError(f"the model takes at most {longest} tokens at once, {phase} wants {tokens}; ask for fewer")
    compiled = {name: _compile(models[name], BACKENDS[name], f"{phase}_{name}") for name in VARIANTS}
    prompt = torch.randint(model.config.get_text_config(decoder=True).vocab_size, (1, tokens))
    prepare: Callable[[], None] | None = None
    if phase == "prefill":
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in signature(model.forward).parameters:
            options["logits_to_keep"] = 1  # as generation does it: only the last logits choose a token
        calls = {name: _call(function, input_ids=prompt, **options) for name, function in compiled.items()}
    else:
        caches = _filled_caches(models["dense"], prompt)
        prepare = _rewinder(list(caches.values()))
        token = prompt[:, :1]
        calls = {
            name: _call(function, input_ids=token, past_key_values=caches[name], use_cache=True)
            for name, function in compiled.items()
        }
    logits = {}
    for name, call in calls.items():
        if prepare is not None:
            prepare()
        logits[name] = call().logits[:, -1].double()
    size = logits["dense"].square().mean().sqrt()
    errors = {name: float((found - logits["dense"]).square().mean().sqrt() / size) for name, found in logits.items()}
    _refuse_wrong(errors, model_bound(DTYPES[plan.dtype], linears), f"{phase} of {source}")
    timing = interleaved_medians(calls, plan.seconds, least=plan.repeats, prepare=prepare)
    stored = sum(layer.w_pivot.numel() + layer.coeff.numel() + layer.rank for layer in linears)
    return ModelRow(
        source,
        phase,
        plan.dtype,
        model.config.get_text_config(decoder=True).num_hidden_layers,
        tokens,
        stored / sum(layer.in_features * layer.out_features for layer in linears),
        torch.get_num_threads(),
        **{f"{name}_ms": timing.milliseconds[name] for name in VARIANTS},
        pifa_error=errors["pifa"],
        rounds=timing.rounds,
    )


def _filled_caches(model: "PreTrainedModel", prompt: Tensor) -> dict[str, Any]:
    """For each of `VARIANTS` a cache with room for one token more than `prompt`, filled by `model`."""
    from transformers import StaticCache

    config = model.config.get_text_config(decoder=True)
    caches: dict[str, Any] = {}
    for name in VARIANTS:
        caches[name] = StaticCache(config=config, max_cache_len=prompt.shape[1] + 1)
        if name != VARIANTS[0]:
            # All start from the same numbers, and a cache cannot be copied: its tensors are marked as static.
            for mine, filled in zip(caches[name].layers, caches[VARIANTS[0]].layers, strict=True):
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


def _compile(module: nn.Module, backend: str, name: str) -> Callable[..., Any]:
    """The module compiled under a code object of its own.

    Dynamo keeps compiled code by code object and tries one after the other: variants with the same one would each be
    found after those before it, and beyond a number of them none would be compiled any more.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    own = types.FunctionType(
        call.__code__.replace(co_name=name), call.__globals__, name, call.__defaults__, call.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=False)
    return compiled


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """`function` with its arguments; what fails to compile is a `CaptureError`."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    def call() -> Any:
        try:
            return function(*args, **kwargs)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(f"torch.compile failed ({reason}); is there a C++ compiler?") from error

    return call


def _refuse_wrong(errors: Mapping[str, float], bound: float, where: str) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= bound}  # NaN is wrong as well
    if wrong:
        said = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
        raise BenchError(
            f"{where}: wrong results, relative error at most {bound:.2g} expected, off are {said}; not timed. "
            "Report this with the versions of torch and pifa-compiler"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _silent(done: int, total: int, what: str) -> None:
    pass


def provenance() -> dict[str, str]:
    """What a row needs to be judged later: date (UTC), machine, versions, and the commit of a checkout or ""."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": _processor(),
        "torch": torch.__version__,
        "pifa_compiler": version("pifa-compiler"),
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's name, and how many logical ones there are."""
    found = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        found = next(lines, "").partition(":")[2].strip()
    return f"{found or platform.processor() or platform.machine()}, {os.cpu_count()} logical CPUs"


def _commit() -> str:
    """The commit that this file is checked out at, "-dirty" added where the checkout has changes; "" if installed."""
    here = Path(__file__)
    try:
        git = ("git", "-C", str(here.parent))
        # An environment inside some other repository must not lend that one's commit to this package.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)  # noqa: S603
        told = subprocess.run(  # noqa: S603
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


class RowFile:
    """A CSV file that rows are appended to; its header is written with the first row, and has to fit later ones."""

    def __init__(self, path: Path, row_type: type[LayerRow] | type[ModelRow]) -> None:
        """Looks at the file without changing it.

        Raises:
            BenchError: it cannot be written, or its header is another.
        """
        self._path = path
        self._provenance = provenance()
        self._columns = [*self._provenance, *row_type.__dataclass_fields__]
        if not path.parent.is_dir() or path.is_dir():
            raise BenchError(f"{path} cannot be written; name a file in a folder that exists")
        if path.is_file() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                header = next(csv.reader(file), [])
            if header != self._columns:
                raise BenchError(f"{path} has other columns than these rows; name another file or move it away")

    def append(self, row: LayerRow | ModelRow) -> None:
        """Writes one row, in one piece."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({**self._provenance, **row.to_dict()})

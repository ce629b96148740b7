"""Speed on a GPU: single layers and whole language models, results checked first.

Besides the variants of `bench.layer` there are dense weights with joint projections (`merged`), as Inductor joins them
under its option "freezing" where shapes are equal, and, for layers, 2:4 sparse weights (`sparse`), as cuSPARSELt runs
them. All run as CUDA graphs. GPU time is that between two events on a stream that is kept busy until all is launched,
so that it holds nothing of the CPU's; wall time has everything.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..device import device_name
from ..factors import rank_for_density
from ..kernels import linear
from ..linear import PifaLinear
from ..reconstruction.sweep import Progress
from .layer import dense_linear, layer_bound, low_rank_pair, random_factors
from .model import ModelPlan, checked_errors, density_of, model_bound, model_variants, open_model, phase_calls
from .rows import BenchRow
from .timing import DTYPES, compile_apart, refuse_wrong

GRAPHS = {"triton.cudagraphs": True}
"""What `mode="reduce-overhead"` asks Inductor for."""

COMPILED_BY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dense": ("inductor", GRAPHS),
    "merged": ("inductor", {**GRAPHS, "freezing": True}),
    "lowrank": ("inductor", GRAPHS),
    "plain": ("inductor", GRAPHS),
    "pifa": ("pifa", GRAPHS),
}
"""By variant of a model: the backend and its options."""

BUSY_CYCLES = 20_000_000
"""Some 10 ms of a GPU's clock, in which a call is launched."""


@dataclass(frozen=True)
class GpuLayerRow(BenchRow):
    """One linear layer of shape [d, d] without bias, applied to [tokens, d]; weights come from memory.

    PIFA stores rank * (2 d - rank) numbers of the dense d * d.

    Attributes:
        device, triton: the GPU's name, and the version of Triton or "".
        rank: of the low-rank pair and of PIFA.
        dense_ms, sparse_ms, lowrank_ms, plain_ms, pifa_ms, pifa_no_order_ms: GPU time; the last without an order to
            undo. sparse_ms is None where torch has no 2:4 sparsity for the GPU or dtype.
        copy_gb_s: what a copy reads and writes a second on this GPU.
        dense_share, pifa_share: bytes of the weights over the time, over copy_gb_s.
        pifa_error: largest error of `pifa` over the largest output, against float64.
    """

    device: str
    triton: str
    dtype: str
    d: int
    tokens: int
    rank: int
    dense_ms: float
    sparse_ms: float | None
    lowrank_ms: float
    plain_ms: float
    pifa_ms: float
    pifa_no_order_ms: float
    copy_gb_s: float
    dense_share: float
    pifa_share: float
    pifa_error: float
    pifa_over_lowrank: float = field(init=False)
    pifa_over_dense: float = field(init=False)


@dataclass(frozen=True)
class GpuModelRow(BenchRow):
    """One phase of a language model.

    Attributes:
        device, triton: as in `GpuLayerRow`.
        model, phase, layers, density: as in `ModelRow`.
        batch, tokens: sequences, and tokens of each in the prompt or in the cache.
        dense_ms, merged_ms, lowrank_ms, plain_ms, pifa_ms: GPU time of a call.
        dense_wall_ms, ...: wall time of a call, until the GPU is done.
        copy_gb_s, dense_share, pifa_share: as in `GpuLayerRow`, of all linears and the head.
        pifa_error: as in `ModelRow`.
    """

    device: str
    triton: str
    model: str
    phase: str
    dtype: str
    layers: int
    batch: int
    tokens: int
    density: float
    dense_ms: float
    merged_ms: float
    lowrank_ms: float
    plain_ms: float
    pifa_ms: float
    dense_wall_ms: float
    merged_wall_ms: float
    lowrank_wall_ms: float
    plain_wall_ms: float
    pifa_wall_ms: float
    copy_gb_s: float
    dense_share: float
    pifa_share: float
    pifa_error: float
    pifa_over_lowrank: float = field(init=False)
    pifa_over_dense: float = field(init=False)
    pifa_wall_over_dense_wall: float = field(init=False)


@torch.no_grad()
def gpu_layer_rows(
    dims: Sequence[int],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    device: torch.device,
    *,
    density: float | None = None,
    multiples: Sequence[int] = (1,),
    rounds: int = 20,
    progress: Progress | None = None,
) -> Iterator[GpuLayerRow]:
    """Measures square layers, one row for every dtype, size, rank and number of tokens.

    Args:
        dims, tokens, dtypes, progress: as in `layer_rows`.
        device: a GPU.
        density, multiples: ranks of this density, rounded down to each of these multiples; rank d / 2 without.
        rounds: of timing.

    Raises:
        BenchError, CaptureError: as in `layer_rows`.
    """
    rate = copy_rate(device)
    cells = [
        (dtype, d, rank, count)
        for dtype, d, count in product(dtypes, dims, tokens)
        for rank in _ranks(d, density, multiples)
    ]
    for done, (dtype, d, rank, count) in enumerate(cells):
        if progress is not None:
            progress(done, len(cells), f"{dtype}, d = {d}, rank {rank}, {count} tokens")
        torch._dynamo.reset()
        yield _layer_row(dtype, d, rank, count, device, rate, rounds)


def _ranks(d: int, density: float | None, multiples: Sequence[int]) -> list[int]:
    if density is None:
        return [d // 2]
    return list(dict.fromkeys(rank_for_density(d, d, density, multiple=multiple) for multiple in multiples))


def _layer_row(
    dtype: str, d: int, rank: int, tokens: int, device: torch.device, rate: float, rounds: int
) -> GpuLayerRow:
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    layers = [_on(device, d, rank, kind) for _ in range(_copies(d, rank, kind, device))]
    x = torch.randn(tokens, d, device=device).to(kind)
    calls = _layer_calls(layers, x)
    wanted = _apply_exactly(layers[0], x)
    size = wanted.abs().max()
    errors = {
        name: float((call(0).double() - wanted).abs().max() / size)
        for name, call in calls.items()
        if name not in ("sparse", "pifa_no_order")  # which compute something else
    }
    refuse_wrong(errors, layer_bound(kind, d), f"{dtype}, d = {d}, rank {rank}, {tokens} tokens")
    replays = {name: graph_of(call, len(layers)) for name, call in calls.items()}
    found = {name: each / len(layers) for name, each in gpu_medians(replays, rounds=rounds).items()}
    sizes = {"dense": d * d, "pifa": layers[0].w_pivot.numel() + layers[0].coeff.numel()}
    share = {name: numbers * kind.itemsize / (found[name] * 1e6) / rate for name, numbers in sizes.items()}
    times: dict[str, Any] = {f"{name}_ms": found[name] for name in calls}
    return GpuLayerRow(
        device_name(device), triton_version(), dtype, d, tokens, rank, **{"sparse_ms": None, **times},
        copy_gb_s=rate, dense_share=share["dense"], pifa_share=share["pifa"], pifa_error=errors["pifa"],
    )  # fmt: skip


def _on(device: torch.device, d: int, rank: int, dtype: torch.dtype) -> PifaLinear:
    layer = PifaLinear.from_factors(random_factors(d, d, rank, dtype), requires_grad=False)
    return layer.to(device).eval()


def _copies(d: int, rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many layers go round: PIFA's weights, the fewest bytes, together three times the L2 cache."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(4, -(-3 * cache // (rank * (2 * d - rank) * dtype.itemsize)))


def _layer_calls(layers: Sequence[PifaLinear], x: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """By variant, a function from the number of a layer to its output."""
    plain, pifa = (torch.compile(linear, backend=backend, dynamic=False) for backend in ("inductor", "pifa"))
    dense = [dense_linear(layer).weight for layer in layers]
    pairs = [low_rank_pair(layer) for layer in layers]
    calls: dict[str, Callable[[int], Tensor]] = {
        "dense": lambda i: nn.functional.linear(x, dense[i]),
        "lowrank": lambda i: pairs[i](x),
        "plain": lambda i: plain(x, layers[i].w_pivot, layers[i].coeff, layers[i].order),
        "pifa": lambda i: pifa(x, layers[i].w_pivot, layers[i].coeff, layers[i].order),
        "pifa_no_order": lambda i: pifa(x, layers[i].w_pivot, layers[i].coeff),
    }
    if x.is_cuda and torch.version.hip is None and x.dtype in (torch.float16, torch.bfloat16):
        keeps_two_of_four = torch.tensor([1, 1, 0, 0], device=x.device, dtype=x.dtype)
        pruned = [weight * keeps_two_of_four.repeat(weight.shape[1] // 4) for weight in dense]
        try:
            sparse = [torch.sparse.to_sparse_semi_structured(weight) for weight in pruned]
            nn.functional.linear(x, sparse[0])
        except RuntimeError:  # how torch says that this GPU, or its own build, has none
            return calls
        calls["sparse"] = lambda i: nn.functional.linear(x, sparse[i])
    return calls


def _apply_exactly(layer: PifaLinear, x: Tensor) -> Tensor:
    """In float64, from the stored factors."""
    y_pivot = x.double() @ layer.w_pivot.double().T
    return torch.cat((y_pivot, y_pivot @ layer.coeff.double().T), dim=-1)[:, layer.row_order()]


@torch.no_grad()
def gpu_model_rows(
    source: str,
    plan: ModelPlan,
    device: torch.device,
    batches: Sequence[int] = (1,),
    *,
    prompts: Sequence[int] = (),
    progress: Progress | None = None,
) -> Iterator[GpuModelRow]:
    """Measures a causal language model: a row for decoding every batch, and for the prefill of one sequence.

    Args:
        source, progress: as in `model_rows`.
        plan: how; `repeats` are the rounds of timing, `seconds` and `threads` of no use here.
        device: a GPU.
        batches: sequences that are decoded at a time.
        prompts: tokens of the prefills; `prompt_tokens` of the plan without.

    Raises:
        CheckpointError, ConfigError, BenchError, CaptureError: as in `model_rows`.
    """
    torch.manual_seed(0)
    phases = [("prefill", 1, tokens) for tokens in prompts or (plan.prompt_tokens,)]
    phases += [("decode", batch, plan.decode_context) for batch in batches]
    if progress is not None:
        progress(0, 1 + len(phases), "building the models")
    model: Any = open_model(source, plan)
    models = model_variants(model.to(device))
    models["merged"] = models["dense"]
    rate = copy_rate(device)
    for done, (phase, batch, tokens) in enumerate(phases):
        if progress is not None:
            progress(1 + done, 1 + len(phases), f"{phase}, batch {batch}, {tokens} tokens")
        torch._dynamo.reset()
        yield _model_row(source, phase, batch, tokens, models, plan, device, rate)


def _model_row(
    source: str,
    phase: str,
    batch: int,
    tokens: int,
    models: Mapping[str, Any],
    plan: ModelPlan,
    device: torch.device,
    rate: float,
) -> GpuModelRow:
    compiled = {
        name: compile_apart(models[name], backend, f"{phase}_{batch}_{tokens}_{name}", options)
        for name, (backend, options) in COMPILED_BY.items()
    }
    linears = [module for module in models["pifa"].modules() if isinstance(module, PifaLinear)]
    calls, rewind = phase_calls(models, compiled, phase, tokens, batch)

    def prepare() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # results of the call before may be written over
        if rewind is not None:
            rewind()

    where = f"{phase} of {source}, batch {batch}"
    for _ in range(2):  # a call to compile, one to record a graph
        errors = checked_errors(calls, prepare, model_bound(DTYPES[plan.dtype], linears), where)
    found = gpu_medians(calls, rounds=plan.repeats, prepare=prepare)
    wall = wall_medians(calls, device, rounds=plan.repeats, prepare=prepare)
    itemsize = DTYPES[plan.dtype].itemsize
    head = models["pifa"].get_output_embeddings()
    rest = 0 if head is None else head.weight.numel()
    numbers = {
        "dense": rest + sum(layer.in_features * layer.out_features for layer in linears),
        "pifa": rest + sum(layer.w_pivot.numel() + layer.coeff.numel() for layer in linears),
    }
    share = {name: count * itemsize / (found[name] * 1e6) / rate for name, count in numbers.items()}
    times = {f"{name}_ms": found[name] for name in COMPILED_BY}
    times |= {f"{name}_wall_ms": wall[name] for name in COMPILED_BY}
    return GpuModelRow(
        device_name(device), triton_version(), source, phase, plan.dtype,
        models["pifa"].config.get_text_config(decoder=True).num_hidden_layers, batch, tokens, density_of(linears),
        **times, copy_gb_s=rate, dense_share=share["dense"], pifa_share=share["pifa"], pifa_error=errors["pifa"],
    )  # fmt: skip


def triton_version() -> str:
    """Of the installed package, "" where there is none."""
    for name in ("triton", "pytorch-triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def graph_of(call: Callable[[int], Tensor], count: int) -> Callable[[], None]:
    """Replays a CUDA graph of `count` calls, each with its number; compiled before."""
    for _ in range(2):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return graph.replay


def gpu_medians(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, prepare: Callable[[], None] | None = None
) -> dict[str, float]:
    """Median milliseconds of GPU time of each call, by turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            if prepare is not None:
                prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def wall_medians(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    prepare: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Median milliseconds of each call until the GPU is done, by turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if prepare is not None:
                prepare()
            wait()
            before = time.perf_counter()
            call()
            wait()
            times[name].append((time.perf_counter() - before) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_rate(device: torch.device) -> float:
    """GB that a copy of 1 GiB reads and writes a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = gpu_medians({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]
    return 2 * source.numel() / milliseconds / 1e6


def _nothing() -> None:
    pass

"""Speed of one linear layer: PIFA beside a dense weight and a low-rank pair, side by side in one process.

Four variants compute the same from the same random weight: `dense` (one weight), `lowrank` (a pair U, V of the same
rank), `plain` (the PIFA operator as Inductor sees it) and `pifa` (`torch.compile(backend="pifa")`). The first three are
compiled by Inductor. Each is checked before it is timed, and all are timed by turns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ..factors import FactorQuality, PifaFactors
from ..linear import PifaLinear
from ..reconstruction.sweep import Progress
from .rows import BenchRow
from .timing import DTYPES, call_of, compile_apart, interleaved_medians, refuse_wrong, threads_set

VARIANTS = ("dense", "lowrank", "plain", "pifa")
BACKENDS = {"dense": "inductor", "lowrank": "inductor", "plain": "inductor", "pifa": "pifa"}


@dataclass(frozen=True)
class LayerRow(BenchRow):
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
    with threads_set(threads):
        for done, (dtype, d, count) in enumerate(cells):
            if progress is not None:
                progress(done, len(cells), f"{dtype}, d = {d}, {count} tokens")
            yield _layer_row(dtype, d, count, seconds)


def _layer_row(dtype: str, d: int, tokens: int, seconds: float) -> LayerRow:
    torch.manual_seed(0)
    factors = random_factors(d, d, d // 2, DTYPES[dtype])
    modules = layer_variants(factors)
    x = torch.randn(tokens, d).to(DTYPES[dtype])
    reference = _apply_exactly(factors, x)
    compiled = {name: compile_apart(module, BACKENDS[name], f"layer_{name}") for name, module in modules.items()}
    calls = {name: call_of(function, x) for name, function in compiled.items()}
    bound = layer_bound(DTYPES[dtype], d)
    errors = {
        name: float((call().double() - reference).abs().max() / reference.abs().max()) for name, call in calls.items()
    }
    refuse_wrong(errors, bound, f"{dtype}, d = {d}, {tokens} tokens")
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
    return {"dense": dense_linear(pifa), "lowrank": low_rank_pair(pifa), "plain": pifa, "pifa": pifa}


def dense_linear(layer: PifaLinear) -> nn.Linear:
    """The layer's weight put together in float64, as one linear."""
    w_pivot, coeff = layer.w_pivot.double(), layer.coeff.double()
    weight = torch.cat((w_pivot, coeff @ w_pivot))[layer.row_order()].to(layer.w_pivot.dtype)
    return _linear(weight, layer.bias)


def low_rank_pair(layer: PifaLinear) -> nn.Sequential:
    """The layer's weight as U V, at its rank.

    [I; coeff] times w_pivot would do, but its zeros are no usual factor: a reflection H, its own inverse, fills them.
    """
    w_pivot, coeff = layer.w_pivot.double(), layer.coeff.double()
    axis = torch.randn(layer.rank, 1, dtype=torch.float64, device=w_pivot.device)
    axis /= axis.norm()
    eye = torch.eye(layer.rank, dtype=torch.float64, device=w_pivot.device)
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


def random_factors(d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> PifaFactors:
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

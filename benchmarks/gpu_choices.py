"""Times ways to do the same on this machine's GPU, side by side: only its clock can choose between them.

    python benchmarks/gpu_choices.py [--dims 4096] [--tokens 1,16,64,512,2048] [--output DIR]

`linear` is one layer with an order to undo, over up to 16 tokens; `projections` are query, key and value of one shape
up to attention: query and key turned by their place, value as it is, all in the order of their outputs. The choices:

    gemm          the library's products, the order undone by what Inductor makes of it
    kernels       our Triton kernels, which store rows in order for up to 16 tokens
    overlapping   the same with launches that overlap (`DEPENDENT_LAUNCH`), from compute capability 9.0 on
    multiplied    `gemm`, but value by z (P [I; coeff])^T, its order P in the rows of the factor that every call makes:
                  r * r more products for every token, and no gather
    last adds     `kernels`, but the last program of a shared sum adds up its parts (`LAST_ADDS`), for 2 to 16 tokens;
                  the same as `kernels` on AMD
    stored order  `gemm` without orders: what undoing them costs is the difference

Every choice is compared with float64 first; a wrong one ends the run with exit code 1. Weights come from memory, calls
are replayed from a CUDA graph. Ranks are those of density 0.5. Appends to gpu_choices.csv.
It has not been run on a GPU.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from pifa_compiler.kernels import linear_ref
from pifa_compiler.kernels import linear_triton_tiles as tiles
from pifa_compiler.kernels.linear_gemm import linear_gemm
from pifa_compiler.kernels.linear_siblings_gemm import (
    GROUPED_TOKENS,
    linear_siblings_batched,
    linear_siblings_gemm,
)
from pifa_compiler.kernels.linear_triton_decode import MAX_TOKENS
from pifa_compiler.kernels.linear_triton_dependent import decode_dependently, decode_siblings_dependently
from pifa_compiler.kernels.linear_triton_operator import linear_triton
from pifa_compiler.kernels.linear_triton_siblings import linear_siblings_triton
from pifa_compiler.kernels.side_by_side import lay_side_by_side
from torch import Tensor

from pifa_compiler.bench import gpu
from pifa_compiler.bench.layer import layer_bound, random_factors
from pifa_compiler.bench.rows import BenchRow, CsvRows
from pifa_compiler.device import device_name
from pifa_compiler.factors import rank_for_density

RESULTS = Path(__file__).parent / "results"
HEAD = 128
"""Features of a head, where there are as many."""


@dataclass(frozen=True)
class ChoiceRow(BenchRow):
    """One choice for one size.

    Attributes:
        what: "linear" or "projections".
        choice: as above.
        ms: GPU time of a call.
        error: largest error over the largest result, against float64.
    """

    device: str
    triton: str
    dtype: str
    what: str
    d: int
    rank: int
    tokens: int
    choice: str
    ms: float
    error: float


@dataclass(frozen=True)
class Weights:
    """Three siblings of one shape, the products' side by side in memory."""

    w_pivots: list[Tensor]
    coeffs: list[Tensor]
    orders: list[Tensor]

    @classmethod
    def random(cls, d: int, rank: int, dtype: torch.dtype, device: torch.device) -> "Weights":
        """Of density 0.5."""
        found = [random_factors(d, d, rank, dtype) for _ in range(3)]
        w_pivots, coeffs = ([getattr(each, name).to(device) for each in found] for name in ("w_pivot", "coeff"))
        lay_side_by_side(w_pivots)
        lay_side_by_side(coeffs)
        return cls(w_pivots, coeffs, [gather_index(each.pivots, d).to(device) for each in found])


Run = Callable[[Weights], list[Tensor]]
"""From weights to what a choice computes."""


def gather_index(pivots: Tensor, out: int) -> Tensor:
    """Which stored row is which output, [out], for pivots first."""
    others = torch.ones(out, dtype=torch.bool)
    others[pivots] = False
    return torch.cat((pivots, others.nonzero()[:, 0])).argsort()


def heads(y: Tensor) -> Tensor:
    """[tokens, features] -> [heads, tokens, features of a head]."""
    features = HEAD if y.shape[1] % HEAD == 0 else y.shape[1]
    return y.view(y.shape[0], -1, features).transpose(0, 1)


def turned(y: Tensor) -> Tensor:
    """`heads`, each turned by its token's place, as rotary embeddings do."""
    by_head = heads(y)
    tokens, features = by_head.shape[1:]
    frequencies = 10000 ** -torch.linspace(0, 1, features // 2, device=y.device)
    angles = (torch.arange(tokens, device=y.device)[:, None] * frequencies).repeat(1, 2)
    first, second = by_head.chunk(2, -1)
    return by_head * angles.cos().to(y.dtype) + torch.cat((-second, first), -1) * angles.sin().to(y.dtype)


def linears(x: Tensor) -> dict[str, Run]:
    """By choice, one linear over x [tokens, d], by the first of the weights."""
    choices: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "gemm": lambda w, c, o: linear_gemm(x, w, c).index_select(-1, o),
        "kernels": lambda w, c, o: linear_triton(x, w, c, o, None),
        "stored order": lambda w, c, o: linear_gemm(x, w, c),
    }
    if overlaps(x):
        choices["overlapping"] = lambda w, c, o: decode_dependently(x, w, c, o, None, "ieee", False)

    def compiled(choice: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        fast = torch.compile(choice, dynamic=False)
        return lambda weights: [fast(weights.w_pivots[0], weights.coeffs[0], weights.orders[0])]

    runs = {name: compiled(choice) for name, choice in choices.items()}
    if x.shape[0] > 1:
        runs["last adds"] = partial(linear_with_last_adding, x)
    return runs


def linear_with_last_adding(x: Tensor, weights: Weights) -> list[Tensor]:
    """Uncompiled, for torch's cache of compiled code does not see the constant."""
    with mock.patch.object(tiles, "LAST_ADDS", True):
        return [linear_triton(x, weights.w_pivots[0], weights.coeffs[0], weights.orders[0], None)]


def projections(x: Tensor) -> dict[str, Run]:
    """By choice, query, key and value over x [tokens, d], each [heads, tokens, features of a head]."""

    def stored(w: list[Tensor], c: list[Tensor]) -> list[Tensor]:
        if x.shape[0] > GROUPED_TOKENS:
            return list(linear_siblings_batched(x, w, c).unbind(-2))
        parts = (part.chunk(len(w), -1) for part in linear_siblings_gemm(x, w, c))
        return [torch.cat(pair, -1) for pair in zip(*parts, strict=True)]

    def gemm(w: list[Tensor], c: list[Tensor], o: list[Tensor]) -> list[Tensor]:
        return [y.index_select(-1, order) for y, order in zip(stored(w, c), o, strict=True)]

    def multiplied(w: list[Tensor], c: list[Tensor], o: list[Tensor]) -> list[Tensor]:
        one = torch.eye(w[2].shape[0], dtype=x.dtype, device=x.device)
        return [*gemm(w[:2], c[:2], o[:2]), (x @ w[2].T) @ torch.cat((one, c[2])).index_select(0, o[2]).T]

    choices: dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]] = {
        "gemm": gemm,
        "kernels": lambda w, c, o: linear_siblings_triton(x, w, c, o, [None] * 3),
        "multiplied": multiplied,
        "stored order": lambda w, c, o: stored(w, c),
    }
    if overlaps(x):
        choices["overlapping"] = lambda w, c, o: decode_siblings_dependently(x, w, c, o, [None] * 3, "ieee", False)

    def compiled(choice: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]) -> Run:
        def call(w: list[Tensor], c: list[Tensor], o: list[Tensor]) -> list[Tensor]:
            query, key, value = choice(w, c, o)
            return [turned(query), turned(key), heads(value)]

        fast = torch.compile(call, dynamic=False)
        return lambda weights: fast(weights.w_pivots, weights.coeffs, weights.orders)

    return {name: compiled(choice) for name, choice in choices.items()}


def overlaps(x: Tensor) -> bool:
    """Whether launches on x [tokens, d] can overlap."""
    nvidia = x.is_cuda and torch.version.hip is None
    return nvidia and x.shape[0] <= MAX_TOKENS and torch.cuda.get_device_capability(x.device) >= (9, 0)


def exact(what: str, x: Tensor, weights: Weights, ordered: bool) -> list[Tensor]:
    """What a choice computes, in float64."""
    orders = weights.orders if ordered else [None] * 3
    values = zip(weights.w_pivots, weights.coeffs, orders, strict=True)
    query, key, value = (linear_ref(x.double(), w.double(), c.double(), o) for w, c, o in values)
    return [query] if what == "linear" else [turned(query), turned(key), heads(value)]


@torch.no_grad()
def choice_rows(
    dims: Sequence[int], tokens: Sequence[int], dtype: torch.dtype, device: torch.device, rounds: int = 20
) -> Iterator[ChoiceRow]:
    """Checks and times all choices, one size after the other.

    Raises:
        BenchError: a result is wrong.
    """
    for d, count in itertools.product(dims, tokens):
        rank = rank_for_density(d, d, 0.5, multiple=32 if d >= 256 else 1)
        x = torch.randn(count, d, device=device).to(dtype)
        whats = {"linear": linears, "projections": projections} if count <= MAX_TOKENS else {"projections": projections}
        for what, choices_over in whats.items():
            torch._dynamo.reset()
            sets = [Weights.random(d, rank, dtype, device) for _ in range(copies(d, rank, dtype, what))]
            choices = choices_over(x)
            errors = {name: error(what, x, run, sets[0], name != "stored order") for name, run in choices.items()}
            # The turning rounds once more what the products have rounded.
            gpu.refuse_wrong(errors, 2 * layer_bound(dtype, d), f"{what}, d = {d}, {count} tokens")
            replays = {name: gpu.graph_of(partial(apply, run, sets), len(sets)) for name, run in choices.items()}
            for name, milliseconds in gpu.gpu_medians(replays, rounds=rounds).items():
                yield ChoiceRow(
                    device_name(device), gpu.triton_version(), str(dtype).removeprefix("torch."), what, d, rank, count,
                    name, milliseconds / len(sets), errors[name],
                )  # fmt: skip


def apply(run: Run, sets: Sequence[Weights], number: int) -> list[Tensor]:
    """A choice by one of the weights."""
    return run(sets[number])


def error(what: str, x: Tensor, run: Run, weights: Weights, ordered: bool) -> float:
    """The largest of a choice's results, over the largest number."""
    wanted = exact(what, x, weights, ordered)
    pairs = zip(run(weights), wanted, strict=True)
    return max(float((got.double() - each).abs().max() / each.abs().max()) for got, each in pairs)


def copies(d: int, rank: int, dtype: torch.dtype, what: str) -> int:
    """How many weights go round: together three times the L2 cache."""
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0
    numbers = rank * (2 * d - rank) * (1 if what == "linear" else 3)
    return max(4, -(-3 * cache // (numbers * dtype.itemsize)))


def main() -> None:
    """Parses the options, checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="4096")
    parser.add_argument("--tokens", default="1,16,64,512,2048")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"{sys.argv[0]} needs a GPU that torch can use; torch.cuda.is_available() is False here")
    dims, tokens = ([int(text) for text in numbers.split(",")] for numbers in (options.dims, options.tokens))
    file = CsvRows(options.output / "gpu_choices.csv", ChoiceRow)
    for row in choice_rows(dims, tokens, torch.bfloat16, torch.device("cuda")):
        file.append(row)
        print(row, flush=True)


if __name__ == "__main__":
    main()

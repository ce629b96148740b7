"""Factorizes weights at random, odd ones above all: what comes is finite and within a derived bound, or it is refused.

    python tests/fuzz/fuzz_numbers.py 20000 [SEED]

Weights are of all dtypes to the ends of their range, ill-conditioned, with rows that are zero, equal or larger than the
others by orders of magnitude. Half of them are given to `factorize`; of the others a model of two linears is made,
brought into PIFA form by `compact`, and run. What goes wrong is printed, with its seed.
"""

import collections
import math
import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import asked

from pifa_compiler import PifaLinear, compact, factorize
from pifa_compiler.errors import RankError
from pifa_compiler.factors import MAXVOL_BOUND, PifaFactors, Pivoting

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = 1e-12
"""What products and solutions of these sizes lose in float64, relative to the weight."""


class Case:
    """Random numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed, float64."""
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator)

    def pair(self) -> tuple[Tensor, Tensor]:
        """U [out, r] and V [r, in] of a weight, of odd structure, float64, about 1 in size."""
        chance = self.chance
        d_out, d_in = chance.randint(1, 48), chance.randint(1, 48)
        rank = chance.randint(1, min(d_out, d_in))
        orders = chance.choice((0, 0, 3, 8, 14))  # of magnitude, between the largest and the smallest
        u, v = self.normal(d_out, rank), self.normal(rank, d_in)
        for matrix, dim in ((u, 0), (u, 1), (v, 0), (v, 1)):
            if chance.random() < 0.3:
                decay = torch.logspace(0, -orders, matrix.shape[dim], dtype=torch.float64)
                matrix *= decay[:, None] if dim == 0 else decay
        for matrix in (u, v):
            row, other = chance.randrange(len(matrix)), chance.randrange(len(matrix))
            what = chance.choice(("as it is", "as it is", "zero", "equal", "huge", "tiny", "integers"))
            if what == "zero":
                matrix[row] = 0
            elif what == "equal":
                matrix[row] = matrix[other]
            elif what in ("huge", "tiny"):
                order = chance.randint(1, 30) * (1 if what == "huge" else -1)
                matrix[row, chance.randrange(matrix.shape[1])] = 10.0**order
            elif what == "integers":
                matrix.round_()
        return u, v

    def scaled(self, matrix: Tensor, dtype: torch.dtype, *, within: float = 1.0) -> Tensor:
        """The matrix in a dtype, its largest number anywhere in the middle part of the dtype's orders of magnitude."""
        info = torch.finfo(dtype)
        lowest, highest = math.log10(info.tiny), math.log10(info.max)
        middle, half = (lowest + highest) / 2, (highest - lowest) / 2 * within
        order = self.chance.choice((0.0, 0.0, self.chance.uniform(middle - half, middle + half)))
        largest = float(matrix.abs().max())
        return matrix.to(dtype) if largest == 0 else (matrix / largest * 10.0**order).to(dtype)


def exponent_of(matrix: Tensor) -> int:
    """e, so that the matrix times 2^-e is about 1 in size."""
    return math.frexp(float(matrix.abs().max()))[1]


def times(matrix: Tensor, exponent: int) -> Tensor:
    """The matrix times 2^exponent, in float64."""
    return matrix.double() * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def check_factors(
    factors: PifaFactors, weight: Tensor, exponent: int, given: torch.dtype, rank: int | None, pivoting: Pivoting
) -> None:
    """Asserts that factors are finite and represent a weight, which is given in float64 times 2^-exponent."""
    eps = torch.finfo(factors.w_pivot.dtype).eps
    assert all(bool(part.isfinite().all()) for part in (factors.w_pivot, factors.coeff)), "not finite"
    assert all(math.isfinite(value) for value in vars(factors.quality).values()), "quality is not finite"
    assert pivoting == "qr" or factors.quality.max_coeff <= MAXVOL_BOUND * (1 + eps), "coefficients"
    w_pivot, coeff = times(factors.w_pivot, -exponent), factors.coeff.double()
    got = torch.cat((w_pivot, coeff @ w_pivot))[factors.order()]
    size, singular = float(weight.norm()), torch.linalg.svdvals(weight)
    left_out = float(singular[factors.rank :].norm())
    if rank is None or factors.rank < min(rank, len(singular)):
        # It was taken for noise: of a dtype, eps / (2 sqrt(3)) of each number, of which 8 times are allowed, in the
        # norm sqrt(out) + sqrt(in) times as much for each direction; and of the computation.
        noise = 4.7 * torch.finfo(given).eps * size
        noise += max(weight.shape) * math.sqrt(len(singular)) * torch.finfo(torch.float64).eps * float(singular[0])
        assert left_out <= noise + EXACT * size, f"rank {factors.rank}: {left_out / size:.3g} is left out"
    # By rounding of both factors P and C: |C| |dP| + |dC| |P|, each off by eps of it at most.
    bound = left_out + (eps * (1 + 2 * float(coeff.norm())) + EXACT * (1 + float(coeff.norm()))) * size
    error = float((got - weight).norm())
    assert error <= bound, f"error {error / size:.3g}, bound {bound / size:.3g}"


def try_factorize(case: Case) -> str:
    """A weight or a pair, given to `factorize`."""
    chance = case.chance
    u, v = case.pair()
    given, stored = chance.choice(DTYPES), chance.choice((None, None, *DTYPES))
    pivoting: Pivoting = chance.choice(("lu", "lu", "qr"))
    rank = chance.choice((None, chance.randint(1, min(u.shape[0], v.shape[1]))))
    if chance.random() < 0.5:
        weight: Tensor | tuple[Tensor, Tensor] = case.scaled(u @ v, given)
        exponent = exponent_of(weight)
        exact = times(weight, -exponent)
    else:
        weight = (case.scaled(u, given), case.scaled(v, given))
        exponents = [exponent_of(part) for part in weight]
        exponent = sum(exponents)
        exact = times(weight[0], -exponents[0]) @ times(weight[1], -exponents[1])
    try:
        factors = factorize(weight, rank=rank, pivoting=pivoting, dtype=stored)
    except RankError as error:
        return f"refused: {reason(error)}"
    check_factors(factors, exact, exponent, given if isinstance(weight, Tensor) else torch.float64, rank, pivoting)
    return "factorized"


def try_compact(case: Case) -> str:
    """Two linears, brought into PIFA form and run."""
    chance = case.chance
    u, v = case.pair()
    dtype = chance.choice(DTYPES)
    info = torch.finfo(dtype)
    u, v = case.scaled(u, dtype, within=0.8), case.scaled(v, dtype, within=0.8)
    model = nn.Sequential(
        nn.Linear(v.shape[1], len(v), bias=False, dtype=dtype),
        nn.Linear(len(v), len(u), bias=chance.random() < 0.5, dtype=dtype),
    ).requires_grad_(False)
    model[0].weight.data, model[1].weight.data = v, u
    exponents = exponent_of(u), exponent_of(v)
    exact, exponent = times(u, -exponents[0]) @ times(v, -exponents[1]), sum(exponents)
    x = case.normal(3, v.shape[1])
    # Not so large that sums could overflow in any order, nor so small that all is lost below the normal range.
    sums = exact.abs() @ x.abs().T
    reach = [math.log2(info.tiny / info.eps), math.log2(info.max / 8)]
    wanted = chance.uniform(*reach) - exponent - math.log2(max(float(sums.max()), 1e-300))
    lowest, highest = math.log2(info.tiny), math.log2(info.max)
    largest = math.log2(float(x.abs().max()))
    x = times(x, int(min(max(wanted, lowest - largest), highest - largest - 1))).to(dtype)
    before = model(x)
    report = compact(model)
    layers = [layer for layer in model.modules() if isinstance(layer, PifaLinear)]
    after = model(x)
    if not layers:
        assert torch.equal(after.isnan(), before.isnan()), "it was left alone, and computes something else"
        assert torch.equal(after.nan_to_num(), before.nan_to_num()), "it was left alone, and computes something else"
        return f"left: {reason(report.layers[0].skipped if report.layers else 'nothing found')}"
    if not isinstance(model[1], nn.Identity):
        return "singular linears by themselves"
    layer = layers[0]
    w_pivot, coeff = layer.w_pivot.detach(), layer.coeff.detach()
    factors = PifaFactors(w_pivot, coeff, layer.pivots.long(), factorize((u, v)).quality)
    check_factors(factors, exact, exponent, torch.float64, None, "lu")
    check_forward(layer, w_pivot, coeff, x, after)
    return "in PIFA form, and run"


def check_forward(layer: PifaLinear, w_pivot: Tensor, coeff: Tensor, x: Tensor, got: Tensor) -> None:
    """Asserts that a layer computes what its factors say, up to rounding on the way."""
    info = torch.finfo(x.dtype)
    scale, of_x = exponent_of(w_pivot), exponent_of(x)
    p, c, x_ = times(w_pivot, -scale), coeff.double(), times(x, -of_x).T
    added = 0.0 if layer.bias is None else times(layer.bias.detach(), -scale - of_x)[:, None]
    order = layer.pivots.long()
    exact = torch.empty(layer.out_features, x_.shape[1], dtype=torch.float64)
    bound = torch.empty_like(exact)
    others = torch.ones(layer.out_features, dtype=torch.bool)
    others[order] = False
    exact[order], exact[others] = p @ x_, c @ (p @ x_)
    # Sums in float32 at least, of so many terms, rounded to the dtype; the pivots once more as the others' inputs.
    accumulated = torch.finfo(torch.float64 if x.dtype is torch.float64 else torch.float32).eps
    loss = 2 * info.eps + (sum(w_pivot.shape) + 4) * accumulated
    smallest = float(times(torch.tensor(info.tiny), -scale - of_x)) * (len(x_) + 1)  # may be flushed to zero
    sums = p.abs() @ x_.abs()
    bound[order] = loss * sums + smallest
    bound[others] = c.abs() @ (2 * loss * sums + smallest) + smallest * len(p)
    exact, bound = exact + added, bound + info.eps * (exact.abs() + (added.abs() if layer.bias is not None else 0.0))
    fits = float(times(exact.abs().max(), scale + of_x)) < info.max / 2
    assert not fits or bool(got.isfinite().all()), "finite results are not"
    if fits:
        error = (times(got, -scale - of_x).T - exact).abs()
        worst = (error - bound).argmax()
        assert bool((error <= bound).all()), f"off by {error.flatten()[worst]:.3g}, bound {bound.flatten()[worst]:.3g}"


def reason(error: object) -> str:
    """What an error or note says, without its numbers."""
    words = str(error).replace("[", " ").replace("]", " ").split()
    return " ".join(word for word in words if not any(letter.isdigit() for letter in word))[:60]


def run(seeds: range) -> tuple[collections.Counter[str], list[str]]:
    """What became of the cases, and what went wrong, with its seed."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    for seed in seeds:
        case = Case(seed)
        attempt = case.chance.choice((try_factorize, try_compact))
        try:
            outcomes[attempt(case)] += 1
        except Exception as error:  # noqa: BLE001  that is what is looked for
            faults.append(f"seed {seed} ({attempt.__name__}): {type(error).__name__}: {error}")
            print(faults[-1], flush=True)  # noqa: T201
    return outcomes, faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, first = asked()
    found, wrong = run(range(first, first + count))
    for outcome, times_ in found.most_common():
        print(f"{times_:6} {outcome}")  # noqa: T201
    print(f"{len(wrong)} of {count} wrong")  # noqa: T201
    sys.exit(bool(wrong))

"""The cheapest loss under a budget: which rank each linear gets, if what it loses at every rank is known.

A layer of rank r stores r (out + in - r) + r numbers (see `factors.stored_numbers`), which is concave in r: near full
rank a little more rank is cheap, and past it the dense weight is cheaper still. So every layer chooses among all its
ranks and staying dense, and `minimise` keeps the total within the budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..factors import stored_numbers


@dataclass(frozen=True)
class Choices:
    """What may become of layers that share one choice.

    Attributes:
        ranks: ranks to choose from, ascending, [n], int64; the last choice, full rank, is staying dense.
        costs: numbers stored at each, over all layers of the set, [n], int64.
        losses: what is lost at each, [n], float64, in a unit that all sets share.
    """

    ranks: Tensor
    costs: Tensor
    losses: Tensor


def choices(shapes: Sequence[tuple[int, int]], losses: Tensor, *, multiple: int = 1, least: int = 1) -> Choices:
    """The choices of layers that share their rank: `least`, multiples of `multiple` above it, and staying dense.

    Args:
        shapes: (out, in) of each layer, of one full rank min(out, in).
        losses: summed loss at rank 0, 1, ..., full, [full + 1].
        multiple: steps of the rank.
        least: the smallest rank to choose.
    """
    full = min(shapes[0])
    dense = sum(d_out * d_in for d_out, d_in in shapes)
    ranks = sorted({least, *range(least - least % multiple + multiple, full, multiple)})
    ranks = [rank for rank in ranks if rank < full and _cost(shapes, rank) < dense]
    costs = [*(_cost(shapes, rank) for rank in ranks), dense]
    index = torch.tensor([*ranks, full])
    return Choices(index, torch.tensor(costs), losses.double().cpu()[index])


def minimise(sets: Sequence[Choices], budget: int) -> list[int]:
    """The choice of each set, as an index, with the least summed loss whose summed cost is at most `budget`.

    Bisects one Lagrange multiplier, the price of a number, at which every set makes its best choice by itself; what
    that leaves of the budget goes, step by step, to the choice that saves most for what it costs.

    Raises:
        ValueError: the cheapest choices together exceed the budget.
    """
    cheapest = [int(each.costs.argmin()) for each in sets]
    if _total(sets, cheapest) > budget:
        raise ValueError(f"the cheapest choices store {_total(sets, cheapest)} numbers, the budget is {budget}")

    def best(price: float) -> list[int]:
        return [int((each.losses + price * each.costs).argmin()) for each in sets]

    if _total(sets, best(0.0)) <= budget:
        return best(0.0)
    # Above the steepest saving any set could make, all take their cheapest choice.
    steepest = max(float(each.losses.max() - each.losses.min()) for each in sets)
    low, high, chosen = 0.0, 2 * steepest, cheapest
    for _ in range(100):
        middle = (low * high) ** 0.5 if low > 0 else high / 1e3
        tried = best(middle)
        if _total(sets, tried) > budget:
            low = middle
        else:
            high, chosen = middle, tried
    return _spend(sets, chosen, budget)


def _spend(sets: Sequence[Choices], chosen: list[int], budget: int) -> list[int]:
    left = budget - _total(sets, chosen)
    while (step := max(_steps(sets, chosen, left), default=None)) is not None:
        _, place, index = step
        left -= int(sets[place].costs[index] - sets[place].costs[chosen[place]])
        chosen[place] = index
    return chosen


def _steps(sets: Sequence[Choices], chosen: Sequence[int], left: int) -> Iterator[tuple[float, int, int]]:
    """For every set its best affordable step, as (loss saved for a number, place of the set, choice)."""
    for place, (each, index) in enumerate(zip(sets, chosen, strict=True)):
        extra = each.costs - each.costs[index]
        gain = each.losses[index] - each.losses
        worth = torch.where((extra > 0) & (extra <= left), gain / extra.clamp(min=1), 0.0)
        best = int(worth.argmax())
        if float(worth[best]) > 0:
            yield float(worth[best]), place, best


def _cost(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    return sum(stored_numbers(d_out, d_in, rank) for d_out, d_in in shapes)


def _total(sets: Sequence[Choices], chosen: Sequence[int]) -> int:
    return sum(int(each.costs[index]) for each, index in zip(sets, chosen, strict=True))

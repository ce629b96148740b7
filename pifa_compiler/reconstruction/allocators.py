"""The named rank allocators, from what a dense model's layers are and do to one rank (or dense) for each.

Every allocator gets the layers in *sets* whose members share one rank: a layer by itself, or layers of one shape whose
outputs meet in elementwise operations (gate and up), since only one rank lets them share one row order. `ALLOCATORS`
names them; all keep the total of stored numbers within the budget.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..errors import ConfigError, RankError
from ..factors import rank_for_density, stored_numbers
from .knapsack import Choices, choices, minimise
from .spectra import squared_singular_values

LEAST_RANK = 16
"""What `global` and `d-rank` leave every layer, unless equal shares would give it less."""


@dataclass(frozen=True)
class Seen:
    """What an allocator's `look` found of a linear (None: it has none), and whether it was given output gradients."""

    found: Tensor | None = None
    weighted: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether all singular values are 0, for inputs, weight or gradients are: no rank is better than another."""
        return self.found is not None and self.found.ndim > 0 and not bool(self.found.any())


@dataclass(frozen=True)
class Layer:
    """A linear that is given a rank.

    Attributes:
        name: as in `named_modules`.
        shape: (out, in) of its weight.
        attention: whether it makes queries, keys or values, or reads what attention gives.
        seen: what the allocator's `look` found.
    """

    name: str
    shape: tuple[int, int]
    attention: bool = False
    seen: Seen = field(default_factory=Seen)

    @property
    def numbers(self) -> int:
        """How many its weight has."""
        return self.shape[0] * self.shape[1]


Set = Sequence[Layer]
"""Layers of one shape that share their rank."""


@dataclass(frozen=True)
class Budget:
    """What may be stored.

    Attributes:
        density: stored numbers over dense ones of all layers together.
        multiple: ranks are multiples of this, unless a layer is too small for that.
    """

    density: float
    multiple: int

    def numbers(self, sets: Sequence[Set]) -> int:
        """How many numbers, of all layers together."""
        return int(self.density * sum(layer.numbers for layers in sets for layer in layers))

    def equal_share(self, layers: Set, *, exact: bool = False) -> int:
        """The rank that the density alone would give."""
        try:
            return rank_for_density(*layers[0].shape, self.density, multiple=1 if exact else self.multiple)
        except RankError as error:
            raise RankError(f"{layers[0].name}: {error}") from error


Ranks = list[int | None]
"""One for each set; None leaves its layers dense."""


@dataclass(frozen=True)
class Allocator:
    """One way to share out ranks.

    Attributes:
        ranks: (sets, budget) -> one rank, or None for dense, for each set.
        look: (weight [out, in], gram [in, in] of its inputs, gradient_gram [out, out] or None) -> what `ranks` wants to
            know of a layer, as few numbers: the matrices need not be kept until all layers were seen. None where the
            shapes alone decide.
    """

    ranks: Callable[[Sequence[Set], Budget], Ranks]
    look: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    def look_at(self, name: str, weight: Tensor, gram: Tensor, gradient_gram: Tensor | None) -> Seen:
        """What `look` says of the linear `name`.

        Raises:
            RankError: a decomposition fails on these numbers.
        """
        if self.look is None:
            return Seen()
        try:
            return Seen(self.look(weight, gram, gradient_gram).cpu(), gradient_gram is not None)
        except LinAlgError as error:
            raise RankError(
                f"the singular values of {name} cannot be computed ({error}); take the allocator uniform, or skip it"
            ) from error


def uniform(sets: Sequence[Set], budget: Budget) -> Ranks:
    """One density for all."""
    return _by_density(sets, [budget.density] * len(sets), budget)


def attention_mlp(sets: Sequence[Set], budget: Budget) -> Ranks:
    """The paper's split by type (arXiv 2501.19090): attention at the density or 0.1 below, the others get the rest.

    Of the two, that with the smaller sum of relative output errors is taken; the paper takes that of better perplexity.
    """
    attention = [layers[0].attention for layers in sets]
    if not any(attention) or all(attention):
        raise ConfigError(
            "the allocator attn-mlp needs layers in and outside of attention, and found none; use another"
        )
    size = [_size(layers) for layers in sets]
    inside = sum(each for each, is_inside in zip(size, attention, strict=True) if is_inside)
    curves = [_relative_losses(layers) for layers in sets]
    found: list[tuple[float, Ranks]] = []
    for density in (budget.density, budget.density - 0.1):
        rest = (budget.density * sum(size) - density * inside) / (sum(size) - inside)
        if 0 < density <= 1 and rest <= 1:
            ranks = _by_density(sets, [density if is_inside else rest for is_inside in attention], budget)
            lost = (0.0 if r is None else float(curve[r]) for r, curve in zip(ranks, curves, strict=True))
            found.append((sum(lost), ranks))
    return min(found, key=lambda pair: pair[0])[1]


def owl(sets: Sequence[Set], budget: Budget, *, spread: float = 0.08) -> Ranks:
    """OWL (arXiv 2310.05175, section 4): blocks of layers with more outliers keep more, within +-0.08 of the density.

    A block is all that shares a numbered name (`model.layers.3`). With s_i the sparsity that OWL gives block i by its
    outliers, its density is density * (1 - s_i) / (1 - mean s), as in MPIFA_NS.
    """
    blocks: dict[str, list[int]] = {}
    for index, layers in enumerate(sets):
        blocks.setdefault(_block_of(layers[0].name), []).append(index)
    ratios = {}
    for block, members in blocks.items():
        seen = [layer for index in members for layer in sets[index]]
        ratios[block] = sum(int(_seen(layer)) for layer in seen) / sum(layer.numbers for layer in seen)
    low, high = min(ratios.values()), max(ratios.values())
    scaled = {
        block: 2 * spread * (ratio - low) / (high - low) if high > low else 0.0 for block, ratio in ratios.items()
    }
    mean = sum(scaled.values()) / len(scaled)
    densities = [budget.density] * len(sets)
    for block, members in blocks.items():
        for index in members:
            densities[index] += scaled[block] - mean
    sizes = [_size(layers) for layers in sets]
    scale = budget.density * sum(sizes) / sum(d * size for d, size in zip(densities, sizes, strict=True))
    return _by_density(sets, [min(max(scale * density, 1e-9), 1.0) for density in densities], budget)


def count_outliers(weight: Tensor, gram: Tensor, gradient_gram: Tensor | None = None) -> Tensor:
    """How many entries of |W| ||x||, norms over the tokens, are above five times their mean; OWL's outliers."""
    score = weight.float().abs() * gram.diagonal().clamp(min=0).sqrt().float()
    return (score > 5 * score.mean()).sum()


def d_rank(sets: Sequence[Set], budget: Budget) -> Ranks:
    """D-Rank (arXiv 2509.25622, section 3): the least sum of R_eff / rank over all layers.

    R_eff is the effective rank, exp of the entropy of the normalised squared singular values of the weight times a root
    of its inputs' Gram matrix. Without the paper's transfer from queries and keys to values.
    """
    curves = []
    for layers in sets:
        full = min(layers[0].shape)
        effective = sum(_effective_rank(_seen(layer)) for layer in layers)
        curves.append(effective / torch.arange(full + 1, dtype=torch.float64).clamp(min=1))
    return _minimise(sets, curves, budget)


def welore(sets: Sequence[Set], budget: Budget) -> Ranks:
    """WeLore (arXiv 2407.11239, section 3): singular values, each weight's by its largest, above one threshold for all.

    Looks at no data. The threshold is the least that the budget allows; weights of which so many values are above it
    that a low rank would store more stay dense.
    """
    for layers in sets:
        budget.equal_share(layers)  # refuses a density that leaves no room for rank 1
    squared = [torch.stack([_seen(layer) for layer in layers]) for layers in sets]
    shares = [(values / values[:, :1].clamp(min=1e-300)).sqrt() for values in squared]

    def ranks_above(threshold: float) -> Ranks:
        found: Ranks = []
        for layers, values in zip(sets, shares, strict=True):
            rank = max(int((values > threshold).sum()) // len(layers), 1)
            rank = rank - rank % budget.multiple or rank
            dense = stored_numbers(*layers[0].shape, rank) >= layers[0].numbers
            found.append(None if dense else rank)
        return found

    low, high = 0.0, 1.0
    for _ in range(50):  # down to 2^-50, finer than singular values are known
        middle = (low + high) / 2
        if _stored(sets, ranks_above(middle)) <= budget.numbers(sets):
            high = middle
        else:
            low = middle
    return ranks_above(high)


def globally(sets: Sequence[Set], budget: Budget) -> Ranks:
    """Predictions moved least in all, to second order; least relative output errors where gradients are unknown.

    If only some layers have gradients, the others are given the rank of the density: their errors cannot be compared.
    """
    weighted = [all(layer.seen.weighted for layer in layers) for layers in sets]
    if not any(weighted):
        return _minimise(sets, [_relative_losses(layers) for layers in sets], budget)
    known = [layers for layers, has in zip(sets, weighted, strict=True) if has]
    ranks_of_known = iter(_minimise(known, [_losses(layers) for layers in known], budget))
    ranks_of_others = iter(uniform([layers for layers, has in zip(sets, weighted, strict=True) if not has], budget))
    return [next(ranks_of_known if has else ranks_of_others) for has in weighted]


def _without_gradients(weight: Tensor, gram: Tensor, gradient_gram: Tensor | None = None) -> Tensor:
    return squared_singular_values(weight, gram)


def _of_the_weight(weight: Tensor, gram: Tensor, gradient_gram: Tensor | None = None) -> Tensor:
    return squared_singular_values(weight, None)


ALLOCATORS: Mapping[str, Allocator] = {
    "global": Allocator(globally, squared_singular_values),
    "uniform": Allocator(uniform),
    "attn-mlp": Allocator(attention_mlp, _without_gradients),
    "owl": Allocator(owl, count_outliers),
    "d-rank": Allocator(d_rank, _without_gradients),
    "welore": Allocator(welore, _of_the_weight),
}
"""By the name that `CompressConfig(allocator=...)` and `pifa compress --allocator` take."""


def _losses(layers: Set) -> Tensor:
    """Summed loss of a set at rank 0, 1, ..., full, [full + 1]: what the singular values past the rank add up to."""
    return torch.stack([_tail_sums(_seen(layer)) for layer in layers]).sum(dim=0)


def _relative_losses(layers: Set) -> Tensor:
    """As `_losses`, each layer's by what its outputs add up to."""
    tails = [_tail_sums(_seen(layer)) for layer in layers]
    return torch.stack([tail / tail[0].clamp(min=1e-300) for tail in tails]).sum(dim=0)


def _tail_sums(squared: Tensor) -> Tensor:
    return torch.cat((squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)))


def _effective_rank(squared: Tensor) -> float:
    shares = squared / squared.sum().clamp(min=1e-300)
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))


def _seen(layer: Layer) -> Tensor:
    if layer.seen.found is None:
        raise ValueError(f"the allocator was shown nothing of {layer.name}")
    return layer.seen.found


def _size(layers: Set) -> int:
    return sum(layer.numbers for layer in layers)


def _stored(sets: Sequence[Set], ranks: Ranks) -> int:
    """Numbers of all layers at these ranks."""
    return sum(
        _size(layers) if rank is None else len(layers) * stored_numbers(*layers[0].shape, rank)
        for layers, rank in zip(sets, ranks, strict=True)
    )


def _block_of(name: str) -> str:
    found = re.match(r"(.*?\b\d+)\b", name)
    return found[1] if found else name


def _minimise(sets: Sequence[Set], curves: Sequence[Tensor], budget: Budget) -> Ranks:
    options: list[Choices] = []
    for layers, curve in zip(sets, curves, strict=True):
        share = budget.equal_share(layers, exact=True)
        least = min(LEAST_RANK, share)
        if share >= budget.multiple:
            least = max(least - least % budget.multiple, budget.multiple)
        options.append(choices([layer.shape for layer in layers], curve, multiple=budget.multiple, least=least))
    chosen = minimise(options, budget.numbers(sets))
    return [
        None if index == len(each.ranks) - 1 else int(each.ranks[index])
        for each, index in zip(options, chosen, strict=True)
    ]


def _by_density(sets: Sequence[Set], densities: Sequence[float], budget: Budget) -> Ranks:
    """Ranks from a density for each set; what rounding ranks down leaves goes to those that it took most from."""
    ranks: Ranks = []
    lost = []
    for layers, density in zip(sets, densities, strict=True):
        own = replace(budget, density=density)
        rank, exact = own.equal_share(layers), own.equal_share(layers, exact=True)
        dense = stored_numbers(*layers[0].shape, rank) >= layers[0].numbers
        ranks.append(None if dense else rank)
        lost.append(1 - rank / exact)
    if budget.multiple == 1:
        return ranks  # exact ranks leave less than a row each
    cost = [_stored([layers], [rank]) for layers, rank in zip(sets, ranks, strict=True)]
    left = budget.numbers(sets) - sum(cost)
    for index in sorted(range(len(sets)), key=lambda index: -lost[index]):
        layers, given = sets[index], ranks[index]
        if given is None or given % budget.multiple or given + budget.multiple > min(layers[0].shape):
            continue
        raised = stored_numbers(*layers[0].shape, given + budget.multiple)
        more = len(layers) * raised - cost[index]
        if more <= left and raised < layers[0].numbers:
            ranks[index] = given + budget.multiple
            left -= more
    return ranks

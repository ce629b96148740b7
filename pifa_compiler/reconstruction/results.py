"""What the walks over a model have found so far: sums of linears, then factors of groups."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from ..factors import PifaFactors
from ..graph.linears import weight_name
from ..report import LayerReport
from .allocators import Seen
from .gradients import BlockDone
from .solver import Solved
from .statistics import ExpertSums
from .sweep import Group


class Results(Protocol):
    """Where findings are kept; one that keeps them on disk lets a run that was stopped go on."""

    def add_linear(self, linear: Node, seen: Seen, gradient_gram: Tensor | None) -> None:
        """Keeps what a walk over the dense model found of a linear, instead of what one before it did."""
        ...

    def seen(self, linear: Node) -> Seen | None:
        """What was found of a linear; None if it was not reached yet."""
        ...

    @property
    def gradient_grams(self) -> Mapping[str, Tensor]:
        """Sums of gradients, [out, out], by the names of weights."""
        ...

    def add_expert_sums(self, name: str, sums: ExpertSums) -> None:
        """Keeps the sums over all experts of a layer at a place called `name`, instead of those there were."""
        ...

    def expert_sums(self, name: str) -> ExpertSums | None:
        """The sums called `name`; None if they were not added yet."""
        ...

    @property
    def known_expert_sums(self) -> Set[str]:
        """The names of those that were added."""
        ...

    def add_block(self, done: BlockDone) -> None:
        """Notes that a block of the way back is done, and its linears added."""
        ...

    def last_block(self) -> BlockDone | None:
        """The block that was done last on the way back, by a run before this one."""
        ...

    def add_group(self, group: Group, solved: Mapping[Node, Solved]) -> None:
        """Keeps what became of a group."""
        ...

    def solved(self, group: Group) -> Mapping[Node, Solved] | None:
        """What became of a group; None if it was not solved yet."""
        ...


class ResultsInMemory:
    """Findings of one run."""

    def __init__(self) -> None:
        self.gradient_grams: dict[str, Tensor] = {}
        self.groups: list[Mapping[Node, Solved]] = []
        self._seen: dict[Node, Seen] = {}
        self._expert_sums: dict[str, ExpertSums] = {}

    def add_linear(self, linear: Node, seen: Seen, gradient_gram: Tensor | None) -> None:
        """See `Results`."""
        self._seen[linear] = seen
        self.gradient_grams.pop(weight_name(linear), None)
        if gradient_gram is not None:
            self.gradient_grams[weight_name(linear)] = gradient_gram

    def seen(self, linear: Node) -> Seen | None:
        """See `Results`."""
        return self._seen.get(linear)

    def add_expert_sums(self, name: str, sums: ExpertSums) -> None:
        """See `Results`."""
        self._expert_sums[name] = sums

    def expert_sums(self, name: str) -> ExpertSums | None:
        """See `Results`."""
        return self._expert_sums.get(name)

    @property
    def known_expert_sums(self) -> Set[str]:
        """See `Results`."""
        return self._expert_sums.keys()

    def add_block(self, done: BlockDone) -> None:
        """Nothing: a run that was stopped is lost."""

    def last_block(self) -> BlockDone | None:
        """None: there was no run before."""
        return None

    def add_group(self, group: Group, solved: Mapping[Node, Solved]) -> None:
        """See `Results`; the sums that the group was solved with are needed no more."""
        self.groups.append(solved)
        for node in group.members:
            self.gradient_grams.pop(weight_name(node), None)

    def solved(self, group: Group) -> Mapping[Node, Solved] | None:
        """None: every group is met once."""
        return None


def factors_of(solved: Mapping[Node, Solved] | None, device: torch.device) -> dict[Node, PifaFactors] | None:
    """The factors of a group that was solved, on a device; None if it was not."""
    return None if solved is None else {node: _moved(each.factors, device) for node, each in solved.items()}


def _moved(factors: PifaFactors, device: torch.device) -> PifaFactors:
    w_pivot, coeff, pivots = (part.to(device) for part in (factors.w_pivot, factors.coeff, factors.pivots))
    return replace(factors, w_pivot=w_pivot, coeff=coeff, pivots=pivots)


def factors_by_weight(groups: Sequence[Mapping[Node, Solved]]) -> dict[str, PifaFactors]:
    """The factors of all groups, by the names of the weights that they stand for."""
    return {weight_name(node): each.factors for solved in groups for node, each in solved.items()}


def reports_of(groups: Sequence[Mapping[Node, Solved]]) -> list[LayerReport]:
    """The reports of all layers of all groups."""
    return [each.report for solved in groups for each in solved.values()]

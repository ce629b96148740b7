"""From the statistics of a group of linears to their PIFA factors: low-rank by a method, then pivot rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor
from torch.fx import Node
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..errors import RankError
from ..factors import PifaFactors, Pivoting, factorize, factorize_jointly, factors_of_zero
from ..graph.linears import read_weight, weight_name
from ..graph.weights import Weights
from ..processes import Processes
from ..report import LayerReport
from .methods import LowRank, Method, MethodOptions, Solve, truncate
from .selection import RankedLinear
from .statistics import Statistics, relative_error
from .sweep import Group


@dataclass(frozen=True)
class Solved:
    """What was made of a linear."""

    factors: PifaFactors
    report: LayerReport

    def noted(self, note: str) -> "Solved":
        """The same with one more note in its report."""
        return replace(self, report=replace(self.report, notes=(*self.report.notes, note)))


Result = TypeVar("Result")


class GroupSolver:
    """Makes the factors of linears, a group at a time, and a report of each.

    Args:
        method, options: how weights are made low-rank.
        weights: where the dense weights are read.
        linears: the linears, and the ranks they shall have.
        one_order: for a layer whose outputs meet those of others (gate and up), the names of all of them.
        gradient_grams: sum g g^T at the outputs, [out, out], by weight name; errors count alike without one.
        pivoting: how pivot rows are chosen.
        processes: those that share the work; None is this one alone.
    """

    def __init__(
        self,
        method: Method,
        options: MethodOptions,
        weights: Weights,
        linears: Mapping[Node, RankedLinear],
        one_order: Mapping[str, tuple[str, ...]],
        gradient_grams: Mapping[str, Tensor],
        pivoting: Pivoting,
        processes: Processes | None = None,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self.method, self.options, self.pivoting = method, options, pivoting
        self.weights, self.linears, self.one_order, self.gradient_grams = weights, linears, one_order, gradient_grams

    def solve(self, group: Group, statistics: Statistics) -> dict[Node, Solved]:
        """What becomes of the group's members that are to be low-rank.

        Raises:
            RankError: a decomposition fails on these numbers; names the weight.
        """
        try:
            return self._solve(group, statistics)
        except LinAlgError as error:
            raise RankError(
                f"the low-rank form of {weight_name(group.members[0])} cannot be computed ({error}); raise the "
                "damping, calibrate on more tokens, or skip the layer"
            ) from error

    def _solve(self, group: Group, statistics: Statistics) -> dict[Node, Solved]:
        members = [node for node in group.members if self.linears[node].rank is not None]
        make_low_rank = self.method.prepare(statistics, self.options) if bool(statistics.gram.any()) else _nearest
        found: dict[str, LowRank] = {}
        for place in self.processes.own(len(members)):
            found[members[place].name] = self._low_rank(make_low_rank, members[place], statistics)
        low_rank = self._of_all(found, members)
        sets = _sets_of_one_order(members, self.linears, self.one_order)
        solved: dict[str, Solved] = {}
        for place in self.processes.own(len(sets)):
            pairs = [(low_rank[node].u, low_rank[node].v) for node in sets[place]]
            found_factors, notes = self._factorize(sets[place], pairs, statistics.gram)
            for node, factors in zip(sets[place], found_factors, strict=True):
                report = self._report(node, factors, (*low_rank[node].notes, *notes), statistics.gram)
                solved[node.name] = Solved(factors, report)
        return self._of_all(solved, members)

    def _of_all(self, found: Mapping[str, Result], members: Sequence[Node]) -> dict[Node, Result]:
        """What all processes found, by node, in the order of `members`."""
        of_all = dict(found)
        for each in self.processes.gather(found):
            of_all |= each
        return {node: of_all[node.name] for node in members}

    def _low_rank(self, make_low_rank: Solve, node: Node, statistics: Statistics) -> LowRank:
        rank, weight, name = self.linears[node].rank, read_weight(self.weights, node).double(), weight_name(node)
        sums = {"output_cross": statistics.output_cross.get(name), "gradient_gram": self.gradient_grams.get(name)}
        # From a working folder they come on the CPU.
        known = {what: matrix.to(weight.device) for what, matrix in sums.items() if matrix is not None}
        return make_low_rank(weight, rank, **known)

    def _factorize(
        self, nodes: Sequence[Node], pairs: Sequence[tuple[Tensor, Tensor]], gram: Tensor
    ) -> tuple[list[PifaFactors], tuple[str, ...]]:
        dtype = read_weight(self.weights, nodes[0]).dtype
        notes: tuple[str, ...] = ()
        if len(nodes) > 1:
            try:
                return factorize_jointly(pairs, gram=gram, dtype=dtype), notes
            except RankError as error:
                notes = (f"row order of its own: {error}",)
        found = []
        for node, pair in zip(nodes, pairs, strict=True):
            rank, (u, v) = self.linears[node].rank, pair
            if not (bool(u.any()) and bool(v.any())):
                found.append(factors_of_zero(len(u), v.shape[1], dtype=dtype, device=u.device))
                continue
            try:
                found.append(factorize(pair, rank=rank, pivoting=self.pivoting, gram=gram, dtype=dtype))
            except RankError as error:
                raise RankError(f"{weight_name(node)}: {error}") from error
        return found, notes

    def _report(self, node: Node, factors: PifaFactors, notes: tuple[str, ...], gram: Tensor) -> LayerReport:
        linear = self.linears[node]
        if linear.rank is not None and factors.rank < linear.rank:
            notes += (f"rank lowered from {linear.rank} to {factors.rank}: the solution has no more",)
        error = relative_error(read_weight(self.weights, node), factors.dense(), gram)
        return LayerReport.of_factors(
            linear.name, factors.shape, factors.rank, factors.quality, error=error, notes=notes
        )


def _nearest(weight: Tensor, rank: int, **sums: Tensor) -> LowRank:
    """A `Solve` for inputs that are 0, of which no method learns anything, and most would make the weight 0."""
    return LowRank(*truncate(weight, rank), ("all inputs are 0: nearest to the weight itself",))


def _sets_of_one_order(
    nodes: Iterable[Node], linears: Mapping[Node, RankedLinear], one_order: Mapping[str, tuple[str, ...]]
) -> list[tuple[Node, ...]]:
    """The nodes of a group, those together whose outputs meet (gate and up) if all of them have one rank."""
    sets: dict[tuple[str, ...], list[Node]] = {}
    for node in nodes:
        sets.setdefault(one_order.get(linears[node].name, (linears[node].name,)), []).append(node)
    result: list[tuple[Node, ...]] = []
    for names, members in sets.items():
        together = len(members) == len(names) and len({linears[node].rank for node in members}) == 1
        result += [tuple(members)] if together else [(node,) for node in members]
    return result

"""`Reconstruction`: M over a captured model, from statistics over ranks to factors, wherever its weights lie."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from ..errors import DerivativeError
from ..graph.capture import Captured
from ..graph.linears import read_weight, weight_name
from ..graph.predictions import find_predictions
from ..processes import Processes
from ..report import Report
from .allocators import ALLOCATORS, Allocator, Budget, Seen
from .config import CompressConfig
from .expert_means import FEW_TOKENS, ExpertMeans
from .gradients import BlockDone, Keep, sum_dense
from .methods import METHODS, MethodOptions
from .refinement import Refinement, check_batches
from .results import Results
from .selection import FoundLinear, RankedLinear, find_attention, give_ranks, shared_among, uses_of
from .solver import GroupSolver, Solved
from .statistics import DenseStatistics, DenseSums, Statistics, SumsOfShared
from .sweep import Flow, Group, Progress, Replacement, Segment, Sweep, groups
from .value_store import Room


def sum_gradients(
    captured: Captured,
    linears: Sequence[Node],
    keep: Keep,
    progress: Progress | None = None,
    *,
    for_ranks: bool = False,
    room: Room | None = None,
    done: BlockDone | None = None,
    save: Callable[[BlockDone], None] | None = None,
    processes: Processes | None = None,
) -> tuple[str | None, tuple[str, ...]]:
    """`sum_dense` for models that have gradients: why this one has none, or None, and what was out of the ordinary."""
    predictions = find_predictions(captured)
    if isinstance(predictions, str):
        return predictions, ()
    try:
        notes = sum_dense(
            captured,
            linears,
            predictions,
            keep,
            progress,
            for_ranks=for_ranks,
            room=room,
            done=done,
            save=save,
            processes=processes,
        )
    except DerivativeError as error:
        return str(error), ()
    return None, tuple(notes)


def sum_inputs(
    captured: Captured,
    linears: Sequence[Node],
    keep: Keep,
    progress: Progress | None = None,
    *,
    room: Room | None = None,
    processes: Processes | None = None,
) -> None:
    """Sums the inputs of linears in the dense model, group by group, without gradients."""

    def hand_over(group: Group, sums: Statistics) -> dict[Node, Replacement]:
        own = DenseSums(sums.gram.float(), None, (sums.mean_abs * sums.tokens).float(), sums.tokens)
        keep(dict.fromkeys(group.members, own))
        return {}

    def tell(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(done, total, f"dense model: {what}")

    if linears:
        Sweep(captured, linears, flows="dense", room=room, processes=processes).run(hand_over, tell)


@dataclass
class Reconstruction:
    """One run of a method over a model.

    Attributes:
        captured: the model's graph, its weights and the calibration batches.
        found: the linears to compress.
        one_order: for a layer whose outputs meet those of others (gate and up), the names of all of them.
        config: what to do.
        results: where findings are kept.
        statistics: what is known of the dense model already; None if nothing is.
        room: where values between two steps may lie.
        progress: called as progress(done, total, what).
        processes: those that share the run.
        no_gradients: why output errors are not weighted by gradients, though the method asks for that.
        notes: what was out of the ordinary.
        peak_bytes: the most that values between two steps have taken of memory.
    """

    captured: Captured
    found: Mapping[Node, FoundLinear]
    one_order: Mapping[str, tuple[str, ...]]
    config: CompressConfig
    results: Results
    statistics: DenseStatistics | None = None
    room: Room = field(default_factory=Room)
    progress: Progress | None = None
    processes: Processes = field(default_factory=Processes)
    no_gradients: str | None = None
    notes: tuple[str, ...] = ()
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        if self.config.refine:
            check_batches(len(self.captured.inputs))
        self._uses = uses_of(self.captured.graph, self.found)
        self._shared = shared_among(self._uses)
        self._inputs_of_shared: dict[Node, Statistics] = {}
        self._means = ExpertMeans(self.found, self.results)

    def run(self) -> dict[Node, RankedLinear]:
        """Measures the dense model, gives its linears ranks, and makes their factors, which go to `results`.

        Returns:
            The rank of every linear, or why it stays dense.

        Raises:
            CalibrationError: an input or a gradient is not finite.
            RankError: a decomposition fails, a fixed rank does not exist, or the density leaves no room for rank 1.
            OffloadError: results or values cannot be written.
        """
        self._measure()
        self.processes.wait()  # until the first has kept what all read
        ranked = give_ranks(
            self.found,
            self.one_order,
            {node: seen for node in self.found if (seen := self.results.seen(node)) is not None},
            find_attention(self.captured.graph),
            allocator=self.allocator,
            budget=Budget(self.config.density, self.config.rank_multiple),
            fixed=self.config.ranks,
        )
        self._solve(ranked)
        return ranked

    def tell(self, report: Report) -> None:
        """Puts what the run found out of the ordinary, and what it held, into a report."""
        if self.no_gradients is not None:
            report.note(f"output errors are not weighted by gradients: {self.no_gradients}")
        for note in (*self.captured.notes, *self.notes, *self.captured.masks.notes()):
            report.note(note)
        report.activation_bytes = self.peak_bytes

    @property
    def allocator(self) -> str:
        """The name of the allocator that the configuration asks for."""
        return self.config.allocator or METHODS[self.config.method].allocator

    def _measure(self) -> None:
        allocator, method, config = ALLOCATORS[self.allocator], METHODS[self.config.method], self.config
        wants_ranks = allocator.look is not None and config.density < 1
        wants_gradients = method.gradients and config.gradients and (config.density < 1 or bool(config.ranks))
        if self.statistics is not None:
            self._take(self.statistics, allocator, gradients=wants_gradients)
        elif wants_gradients or wants_ranks or self._shared or self._means:
            self._sum(allocator, gradients=wants_gradients)

    def _take(self, statistics: DenseStatistics, allocator: Allocator, *, gradients: bool) -> None:
        self.no_gradients = statistics.no_gradients if gradients else None
        self.notes = statistics.notes
        for node in self.found:
            name = weight_name(node)
            gram = statistics.gradient_gram.get(name) if gradients else None
            seen = Seen()
            if allocator.look is not None:
                weight = read_weight(self.captured.weights, node)
                seen = allocator.look_at(name, weight, statistics.of_input(name).gram, gram)
            self.results.add_linear(node, seen, gram)
            if self._means:
                self._means.add({node: replace(statistics.sums(name), gradient_gram=gram)})
        self._inputs_of_shared = {node: statistics.of_input(weight_name(node)) for node in self._shared}

    def _sum(self, allocator: Allocator, *, gradients: bool) -> None:
        def keeper() -> Keep:
            self._means.begin()
            sums = SumsOfShared(self._shared)
            return lambda linears: keep(sums.complete(linears))

        def keep(linears: Mapping[Node, DenseSums]) -> None:
            looked: dict[str, Seen] = {}
            for place in self.processes.own(len(linears)):
                node, sums = list(linears.items())[place]
                weight = read_weight(self.captured.weights, node)
                looked[node.name] = allocator.look_at(weight_name(node), weight, sums.gram, sums.gradient_gram)
            for each in self.processes.gather(looked):
                looked |= each
            for node, sums in linears.items():
                gram = self._means.own_gradients(node, sums.gradient_gram)
                self.results.add_linear(node, looked[node.name], gram)
                if node in self._shared:
                    self._inputs_of_shared[node] = sums.statistics()
            self._means.add(linears)

        def save(done: BlockDone) -> None:
            if self._means.are_whole:  # a run that goes on has to add all experts of a layer
                self.results.add_block(done)

        def all_of(nodes: Iterable[Node]) -> list[Node]:
            return [use for node in nodes for use in self._uses[node]]

        if gradients:
            self.no_gradients, self.notes = sum_gradients(
                self.captured,
                all_of(self.found),
                keeper(),
                self.progress,
                for_ranks=not self._shared,
                room=self.room,
                done=self.results.last_block(),
                save=save,
                processes=self.processes,
            )
        pending = []
        for node in self.found:
            seen = self.results.seen(node)
            unweighted = self.no_gradients is not None
            if seen is None or (seen.weighted and unweighted) or not self._means.knows(node):
                pending.append(node)
        sum_inputs(self.captured, all_of(pending), keeper(), self.progress, room=self.room, processes=self.processes)

    def _solve_group(self, solver: GroupSolver, group: Group, statistics: Statistics) -> dict[Node, Solved]:
        """Solves a group; the members whose weights are used elsewhere too with the sums of all their uses."""
        apart: dict[tuple[Node, ...], list[Node]] = {}
        for node in group.members:
            apart.setdefault(tuple(use.all_input_nodes[0] for use in self._shared.get(node, ())), []).append(node)
        found: dict[Node, Solved] = {}
        for sources, members in apart.items():
            sums = self._inputs_of_shared[members[0]] if sources else statistics
            completed = self._means.completed(members[0], sums)
            solved = solver.solve(Group(group.source, tuple(members)), completed)
            found |= solved if completed is sums else {node: each.noted(FEW_TOKENS) for node, each in solved.items()}
        for node, uses in self._shared.items():
            if node in found:
                note = f"one weight for {len(uses)} linears, calibrated on what the dense model gives all of them"
                found[node] = found[node].noted(note)
        return found

    def _solve(self, ranked: Mapping[Node, RankedLinear]) -> None:
        config, method = self.config, METHODS[self.config.method]
        active = [node for node, linear in ranked.items() if linear.rank is not None]
        if not active:
            return
        options = MethodOptions(config.mix, config.damping, config.gradient_damping)
        grams = self._means.gradients(self.results.gradient_grams)
        weights, order = self.captured.weights, self.one_order
        two_flows = method.two_flows or config.refine > 0
        solver = GroupSolver(method, options, weights, ranked, order, grams, config.pivoting, self.processes)

        def solve(group: Group, statistics: Statistics) -> dict[Node, Replacement]:
            solved = self._solve_group(solver, group, statistics)
            refinement.add(group, statistics, solved)
            return {node: each.factors for node, each in solved.items()}

        if self.statistics is not None and not two_flows:
            refinement = self._refinement(())
            for group in groups(self.captured.graph.graph, active):
                solve(group, self.statistics.of_input(weight_name(group.members[0])))
            return
        flows: Flow = "both" if two_flows else "dense"
        sweep = Sweep(
            self.captured,
            active,
            flows=flows,
            dense_gram=method.dense_gram or two_flows != method.two_flows,
            drift=method.drift,
            blocks=config.refine > 0,
            room=self.room,
            processes=self.processes,
        )
        refinement = self._refinement(sweep.segments)
        sweep.run(solve, self.progress, known=refinement.known, refine=refinement.refine)
        self.peak_bytes = max(self.peak_bytes, sweep.peak_bytes)

    def _refinement(self, segments: Iterable[Segment]) -> Refinement:
        return Refinement(
            segments,
            steps=self.config.refine,
            damping=self.config.gradient_damping,
            results=self.results,
            weights=self.captured.weights,
            shared=self._shared,
            processes=self.processes,
            device=self.captured.device,
        )

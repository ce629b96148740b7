"""The sweep: one walk over a captured graph that gathers each linear's statistics and replaces it, in order.

Two values are carried for every calibration batch: what the dense model computes (`dense`) and what the model computes
whose linears up to here are compressed (`compressed`). The walk goes in segments. A segment computes the input of the
next *group* of linears (those that read one value: q, k and v; gate and up) for all batches and sums its statistics;
the group's weights are then solved, and the next segment runs with them. Every node runs once per flow and batch,
values are freed after their last use, and the walk ends at the last linear to compress: a head's logits are never
computed. There are no layer names in it.

Where a model picks tokens (a router sends them to experts), the compressed one may pick others: statistics are of those
that both pick.

Between segments the values of all batches may lie in files, and weights are read again for every segment, so that
neither need fit into memory.

Asked for, what lies between two sums of the residual stream is handed over once its linears are solved, so that they
can be trained together (`ResidualBlock`, `BlockValues`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import CalibrationError
from ..factors import PifaFactors
from ..graph.capture import Captured
from ..graph.linears import linears_by_weight, weight_name
from ..graph.picked_tokens import Pick
from ..graph.run import Values, ancestors, call, weights_of
from ..kernels import linear
from ..processes import Processes
from .statistics import Statistics
from .value_store import Room, ValueStore

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what) while long work goes on."""

_GRAM_BLOCK = 192
"""Columns of a Gram matrix multiplied at once: wide enough that a product runs at full speed."""

Flow = Literal["both", "dense", "compressed"]


@dataclass(frozen=True)
class Group:
    """Linears that read one value, so that they share their statistics."""

    source: Node
    members: tuple[Node, ...]


@dataclass(frozen=True)
class ResidualBlock:
    """Linears from one sum of the residual stream to the next, and what lies between them.

    Attributes:
        groups: the linears.
        last: that of them whose output is added at the end; an error of the sum is one of its output.
        nodes: what depends on the linears, up to the sum that ends the block, in the order of the graph.
        inputs: what these nodes read and that depends on none of the linears; weights aside.
    """

    groups: tuple[Group, ...]
    last: Node
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]

    @property
    def output(self) -> Node:
        """The sum."""
        return self.nodes[-1]

    @property
    def linears(self) -> tuple[Node, ...]:
        """All members of its groups."""
        return tuple(member for group in self.groups for member in group.members)


@dataclass(frozen=True)
class Segment:
    """What is computed for all batches before `group` can be solved.

    Attributes:
        nodes: in the order of the graph.
        group: the linears.
        addends: for members whose output is added to other values: those.
        block: the block that ends with the group.
    """

    nodes: tuple[Node, ...]
    group: Group
    addends: Mapping[Node, tuple[Node, ...]] = field(default_factory=dict)
    block: ResidualBlock | None = None


Step = Node | Group | ResidualBlock
"""Of the walk: what values may be read by for the last time."""


@dataclass
class Flows:
    """The live values of one batch: those that no compressed linear has touched, and the others of each flow."""

    shared: Values
    dense: Values = field(default_factory=dict)
    compressed: Values = field(default_factory=dict)

    def free(self, node: Node) -> None:
        """Forgets what `node` computed."""
        for values in (self.shared, self.dense, self.compressed):
            values.pop(node, None)


def plan(
    graph: torch.fx.Graph,
    linears: Iterable[Node],
    *,
    drift: bool = False,
    blocks: bool = False,
    picks: Set[Node] = frozenset(),
) -> list[Segment]:
    """Segments in the order of the graph; nodes that no linear's input needs are in none of them.

    What becomes of `picks`, tokens that experts get, is computed and added to the rest as soon as it can be, so that no
    more than one expert's is held.

    With `drift` also what linears' outputs are added to is computed. Where several outputs are added to one value (the
    attention's and the MLP's in parallel) the last of these linears has all others among its addends, and they none:
    what is lacking is made up for once.

    With `blocks` these sums are the ends of blocks. Linears that no such sum comes after are in none.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    unsolved = set(linears)
    done: set[Node] = set()
    segments = []
    open_groups: list[Group] = []  # in no block so far
    returned: set[Node] = set()  # of what experts of the group before compute
    for group in groups(graph, unsolved):
        sums = {member: tuple(_sums(member)) for member in group.members if drift or blocks}
        sums = {
            member: found
            for member, found in sums.items()
            if found and not unsolved & ancestors(*(addend for _, addend in found))
        }
        unsolved -= set(group.members)
        open_groups.append(group)
        block = None
        if blocks and sums:
            last = next(reversed(sums))
            total = sums[last][-1][0]
            block = _block(graph, open_groups, last, total)
        if block is not None:  # what it depends on in part is in no block, or another would compute its linears too
            before = ancestors(total)
            open_groups = [each for each in open_groups if before.isdisjoint(each.members)]
        addends = {member: tuple(addend for _, addend in found) for member, found in sums.items()}
        read = [*(node for nodes in addends.values() for node in nodes), *(() if block is None else block.inputs)]
        needed = sorted(ancestors(group.source, *read, *returned, known=done), key=position.__getitem__)
        done.update(needed)
        computed = tuple(node for node in needed if node.op not in ("placeholder", "get_attr"))
        segments.append(Segment(computed, group, addends if drift else {}, block))
        behind = _behind(group, picks)
        returned = {node for node in behind if not unsolved & ancestors(node, known=done)}
    return segments


def _behind(group: Group, picks: Set[Node]) -> set[Node]:
    """What reads values of `picks` that are computed from linears of a group, and is none."""
    found, pending = set[Node](), [member for member in group.members if member in picks]
    while pending:
        for user in pending.pop().users:
            if user in picks:
                pending.append(user)
            elif user.users:  # others say something about a value only
                found.add(user)
    return found


def _block(graph: torch.fx.Graph, open_groups: Iterable[Group], last: Node, total: Node) -> ResidualBlock | None:
    """The block that `total` ends, of those groups that it is computed from; None if that of `last` is none of them."""
    before = ancestors(total)
    own = tuple(group for group in open_groups if before.issuperset(group.members))
    if not any(last in group.members for group in own):
        return None
    inside = _downstream(graph, (member for group in own for member in group.members)) & before
    nodes = tuple(node for node in graph.nodes if node in inside)
    read = dict.fromkeys(parent for node in nodes for parent in node.all_input_nodes)
    inputs = tuple(node for node in read if node not in inside and node.op != "get_attr")
    return ResidualBlock(own, last, nodes, inputs)


def groups(graph: torch.fx.Graph, linears: Iterable[Node]) -> list[Group]:
    """Linears by the value they read, in the order of the graph."""
    members: dict[Node, list[Node]] = {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in sorted(linears, key=position.__getitem__):
        members.setdefault(node.all_input_nodes[0], []).append(node)
    return [Group(source, tuple(nodes)) for source, nodes in members.items()]


def _sums(node: Node) -> Iterator[tuple[Node, Node]]:
    """Sums of what `node` computes and values of its shape, with these values, as long as nothing else reads a sum."""
    while len(node.users) == 1:
        (total,) = node.users
        if total.target is not torch.ops.aten.add.Tensor or total.kwargs:
            return
        others = [other for other in total.args if other is not node]
        shapes = [_shape(other) for other in (node, *others)]
        if len(others) != 1 or None in shapes or shapes[0] != shapes[1]:
            return
        (other,) = others
        assert isinstance(other, Node)  # noqa: S101  nothing else has a shape
        yield total, other
        node = total


def _shape(value: Any) -> torch.Size | None:
    found = value.meta.get("val") if isinstance(value, Node) else None
    return found.shape if isinstance(found, Tensor) else None


Replacement = PifaFactors | Tensor
"""What stands in for the weight of a linear: factors, or another weight [out, in]."""

Refine = Callable[[ResidualBlock, "BlockValues"], Mapping[Node, Replacement]]
"""From a block whose linears are solved to what they become; see `Sweep.run`."""


class Sweep:
    """One walk over `captured`; see the module's docstring.

    Args:
        captured: the graph and the batches.
        linears: the linears to replace, `aten.linear.default` nodes; with one, all that read its weight are.
        flows: which flows are followed, "both", "dense" or "compressed"; with one, all statistics are that one's.
        dense_gram: whether the dense model's Gram matrices are summed beside the compressed model's.
        drift: whether outputs are summed together with what differs between both flows in the values that they are
            added to (`Statistics.output_cross`).
        blocks: whether blocks are handed over; both flows are followed then.
        room: where the values between segments may lie.
        processes: those that share the batches; None is this one alone.
    """

    def __init__(
        self,
        captured: Captured,
        linears: Sequence[Node],
        *,
        flows: Flow = "both",
        dense_gram: bool = False,
        drift: bool = False,
        blocks: bool = False,
        room: Room | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._dense_gram = dense_gram
        self._processes = Processes() if processes is None else processes
        self._weights = captured.weights
        self.segments = plan(
            captured.graph.graph, linears, drift=drift, blocks=blocks, picks=captured.masks.picks.keys()
        )
        by_weight = linears_by_weight(captured.graph)
        self._uses = {node: by_weight[weight_name(node)] for node in linears}  # a new weight is one for all of them
        self._replaced: dict[Node, Replacement] = {}  # of linears that are still to be computed
        self._masks = captured.masks
        self._constant: Values = {}
        placeholders = captured.graph.graph.find_nodes(op="placeholder")
        self._store = ValueStore(room or Room())
        self._count = len(captured.inputs)
        self._batches = self._processes.own(self._count)
        for batch in self._batches:
            self._keep(batch, Flows(dict(zip(placeholders, captured.inputs[batch], strict=True))))
        self._varies = _downstream(captured.graph.graph, placeholders)
        self._diverges = set()
        if flows == "both":
            self._diverges = _downstream(captured.graph.graph, (use for uses in self._uses.values() for use in uses))
        self._only_compressed = flows == "compressed"
        self._freed_after = _last_uses(self.segments, self._masks.picks)

    @property
    def peak_bytes(self) -> int:
        """The most that values between segments have taken of memory."""
        return self._store.peak_bytes

    @torch.no_grad()
    def run(
        self,
        solve: Callable[[Group, Statistics], Mapping[Node, Replacement]],
        progress: Progress | None = None,
        *,
        known: Callable[[Group], Mapping[Node, Replacement] | None] = lambda group: None,
        refine: Refine | None = None,
    ) -> None:
        """Walks the graph; `solve` gives factors, or another weight, for the members of a group that are replaced.

        Args:
            solve: called once for every group, in the order of the graph.
            progress: called after each group.
            known: what an earlier walk's `solve` gave for a group, which is then neither summed nor solved again; or
                `refine`, of a block whose groups are all known.
            refine: called for every block that is not known once its groups are solved; may give its linears something
                else, with which the walk goes on.

        Raises:
            CalibrationError: an input of a linear is not finite, or all its tokens are padding; names the weight.
            OffloadError: values between segments cannot be written.
        """
        for index, segment in enumerate(self.segments):
            label = weight_name(segment.group.members[0])
            found = known(segment.group)
            for following in self.segments[index + 1 : index + 2]:
                self._weights.expect(weights_of((*following.nodes, *following.group.members)))
            sums = self._compute(segment, summed=found is None)
            for node in segment.nodes:
                self._replaced.pop(node, None)
            steps: list[Step] = [*segment.nodes, segment.group, *([] if segment.block is None else [segment.block])]
            solved_now = found is None
            if found is None:
                picked = segment.group.source in self._masks.picks
                found = solve(segment.group, sums.finish(label, self._processes, may_be_empty=picked))
            self._replaced.update({use: new for node, new in found.items() for use in self._uses[node]})
            if segment.block is not None:
                self._end(segment.block, refine if solved_now else None)
            for step in steps:
                for node in self._freed_after.get(step, ()):
                    self._constant.pop(node, None)
            self._weights.give_back()
            if progress is not None:
                progress(index + 1, len(self.segments), label)
        self._store.clear()

    def _compute(self, segment: Segment, *, summed: bool) -> "_Sums":
        """Computes a segment for all batches, and sums what its group is to be solved with unless that is known."""
        layers = [weight_name(member).removesuffix(".weight") for member in segment.group.members]
        sums, source = _Sums(self._dense_gram), segment.group.source
        added = {  # where one of the addends, or the input, differs between the flows
            member: addends
            for member, addends in segment.addends.items()
            if self._diverges.intersection((source, *addends))
        }
        for batch in self._batches:
            flows = self._run_segment(segment, batch)
            dense, compressed = self._both(flows, source)
            mask, mask_of_compressed = self._counted(source, batch, flows, layers)
            if summed:
                rows = tokens_as_rows(dense, mask)
                inputs = rows if compressed is dense else tokens_as_rows(compressed, mask_of_compressed)
                sums.add(rows, inputs, cross=len(added) < len(segment.group.members))
                for member, addends in added.items():
                    sums.add_outputs(weight_name(member), self._wanted_output(member, addends, flows, mask), inputs)
            self._free(segment.group, flows)
            self._keep(batch, flows)
        return sums

    def _end(self, block: ResidualBlock, refine: Refine | None) -> None:
        """Has a block refined, goes on with what it computes then, and forgets what only the block reads."""
        refined: Mapping[Node, Replacement] = {}
        if refine is not None:
            refined = refine(block, BlockValues(self, block))
            self._replaced.update({node: new for node, new in refined.items() if node in self._replaced})
        for batch in self._batches:
            flows = self._flows(batch)
            if refined:
                stale = {node for node in block.nodes if node in flows.compressed}
                self._store.drop((batch, "compressed"), stale)
                values = self._compute_block(block, batch, stale, refined)
                flows.compressed.update({node: values[node] for node in stale})
            self._free(block, flows)
            self._keep(batch, flows)

    def _compute_block(
        self, block: ResidualBlock, batch: int, wanted: Iterable[Node], replaced: Mapping[Node, Replacement]
    ) -> Values:
        """Values of a block's nodes as far as `wanted` need them, from what the compressed flow gives the block."""
        inputs = set(block.inputs)
        values = self._store.select((batch, "shared"), inputs) | self._store.select((batch, "compressed"), inputs)
        needed = ancestors(*wanted)
        for node in block.nodes:
            if node in needed:
                values[node] = self._compute_node(node, values, replaced)
        return values

    def _keep(self, batch: int, flows: Flows) -> None:
        for name in ("shared", "dense", "compressed"):
            self._store.put((batch, name), getattr(flows, name))

    def _flows(self, batch: int) -> Flows:
        return Flows(*(self._store.get((batch, name)) for name in ("shared", "dense", "compressed")))

    def _run_segment(self, segment: Segment, batch: int) -> Flows:
        flows = self._flows(batch)
        for node in segment.nodes:
            if node not in self._varies:
                if node not in self._constant:
                    self._constant[node] = self._evaluate(node, {}, compressed=False)
            elif node not in self._diverges:
                flows.shared[node] = self._evaluate(node, flows.shared, compressed=self._only_compressed)
            else:
                if node not in flows.dense:
                    flows.dense[node] = self._evaluate(node, flows.shared | flows.dense, compressed=False)
                flows.compressed[node] = self._evaluate(node, flows.shared | flows.compressed, compressed=True)
            self._free(node, flows)
        return flows

    def _evaluate(self, node: Node, values: Values, *, compressed: bool) -> Any:
        return self._compute_node(node, values, self._replaced if compressed else {})

    def _compute_node(self, node: Node, values: Values, replaced: Mapping[Node, Replacement]) -> Any:
        if node in replaced:
            new, bias = replaced[node], _bias(node)
            x, b = self._value(node.all_input_nodes[0], values), None if bias is None else self._value(bias, values)
            if isinstance(new, Tensor):
                return nn.functional.linear(x, new, b)
            return linear(x, new.w_pivot, new.coeff, new.order(), b)
        return call(node, lambda argument: self._value(argument, values))

    def _value(self, node: Node, values: Values) -> Any:
        if node.op == "get_attr":
            return self._weights.read(str(node.target))
        return values[node] if node in values else self._constant[node]

    def _both(self, flows: Flows, node: Node) -> tuple[Tensor, Tensor]:
        if node in self._constant:
            return self._constant[node], self._constant[node]
        if node in flows.shared:
            return flows.shared[node], flows.shared[node]
        return flows.dense[node], flows.compressed[node]

    def _counted(
        self, source: Node, batch: int, flows: Flows, layers: Iterable[str]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows of a value count in the dense flow and in the compressed one: the same tokens, in one order."""
        lead = self._both(flows, source)[0].shape[:-1]
        pick = self._masks.picks.get(source)
        if pick is None:
            mask = self._masks.rows(source, batch, lead, layers)
            return mask, mask
        dense, compressed = self._both(flows, pick.tokens)
        mask = self._masks.rows(source, batch, lead, layers, dense)
        if compressed is dense:
            return mask, mask
        counted = dense if mask is None else dense[mask]
        both = counted[torch.isin(counted, compressed)]
        return torch.isin(dense, both), torch.isin(compressed, both)

    def _wanted_output(self, linear: Node, addends: Iterable[Node], flows: Flows, mask: Tensor | None) -> Tensor:
        """What `linear` computes in the dense model, without its bias, and what its addends lack; tokens as rows."""
        flows.dense[linear] = self._evaluate(linear, flows.shared | flows.dense, compressed=False)
        wanted = tokens_as_rows(flows.dense[linear], mask)
        bias = _bias(linear)
        if bias is not None:
            wanted = wanted - self._value(bias, flows.shared | flows.dense).float()
        for node in addends:
            dense, compressed = self._both(flows, node)
            if dense is not compressed:
                wanted = wanted + (tokens_as_rows(dense, mask) - tokens_as_rows(compressed, mask))
        return wanted

    def _free(self, step: Step, flows: Flows) -> None:
        for node in self._freed_after.get(step, ()):
            flows.free(node)


class BlockValues:
    """What a block computes on the calibration batches that are this process's.

    Attributes:
        count: how many batches all processes have.
        own: those of this one.
    """

    def __init__(self, sweep: Sweep, block: ResidualBlock) -> None:
        self._sweep, self._block = sweep, block
        self.count, self.own = sweep._count, sweep._batches

    def output(self, batch: int, replaced: Mapping[Node, Replacement]) -> Tensor:
        """The block's sum, tokens as rows [tokens, out] in float32, on inputs of the compressed flow.

        Args:
            batch: which.
            replaced: what stands in for the weights of the block's linears; gradients reach it.
        """
        values = self._sweep._compute_block(self._block, batch, [self._block.output], replaced)
        return self._rows(values[self._block.output], batch)

    def wanted(self, batch: int) -> Tensor:
        """The same of the dense model."""
        sweep, block = self._sweep, self._block
        values = sweep._store.get((batch, "shared")) | sweep._store.get((batch, "dense"))
        missing = [block.output]
        while missing:
            node = missing[-1]
            unknown = [each for each in node.all_input_nodes if each in block.nodes and each not in values]
            missing += unknown
            if not unknown:
                values[missing.pop()] = sweep._compute_node(node, values, {})
        return self._rows(values[block.output], batch)

    def _rows(self, x: Tensor, batch: int) -> Tensor:
        return tokens_as_rows(x, self._sweep._masks.rows(self._block.output, batch, x.shape[:-1]))


class _Sums:
    """Running sums of `Statistics`; an input that is the same in both flows is multiplied only once."""

    def __init__(self, dense_gram: bool) -> None:
        self.gram, self.dense_gram, self.sum_abs = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.cross: Tensor | None = None
        self.output_cross: dict[str, Tensor] = {}
        self.tokens = 0
        self.wants_dense_gram = dense_gram

    def add(self, dense: Tensor, compressed: Tensor, *, cross: bool) -> None:
        # Products in float32 within a batch (at most some thousand tokens), sums over batches in float64.
        same = dense is compressed
        gram = gram_matrix(compressed).double()
        self.gram = self.gram + gram
        if same or cross:
            self.cross = (0 if self.cross is None else self.cross) + (gram if same else (dense.T @ compressed).double())
        if self.wants_dense_gram:
            self.dense_gram = self.dense_gram + (gram if same else gram_matrix(dense).double())
        self.sum_abs = self.sum_abs + dense.abs().sum(dim=0).double()
        self.tokens += len(dense)

    def add_outputs(self, name: str, outputs: Tensor, inputs: Tensor) -> None:
        self.output_cross[name] = self.output_cross.get(name, 0) + (outputs.T @ inputs).double()

    def finish(self, label: str, processes: Processes, *, may_be_empty: bool = False) -> Statistics:
        """The sums of all processes.

        Raises:
            CalibrationError: there are no tokens, or an input is not finite; names `label`.
        """
        self._add_those_of_others(processes)
        dense_gram = self.dense_gram if self.wants_dense_gram else self.gram
        if self.tokens == 0 and not may_be_empty:
            raise CalibrationError(
                f"no token reaches the input of {label}: the masks leave none in any calibration batch, or the batches "
                "are empty; an attention_mask is 1 at the tokens that count"
            )
        for total in (self.gram, self.cross, dense_gram, *self.output_cross.values()):
            if total is not None and not bool(torch.isfinite(total).all()):
                raise CalibrationError(
                    f"the input of {label} is not finite (NaN or Inf) on the calibration batches; "
                    "calibrate in float32, or repair the layers before it"
                )
        mean_abs = self.sum_abs / max(self.tokens, 1)
        return Statistics(self.gram, self.cross, dense_gram, mean_abs, self.tokens, self.output_cross)

    def _add_those_of_others(self, processes: Processes) -> None:
        own = {"gram": self.gram, "abs": self.sum_abs, "tokens": torch.tensor(self.tokens, device=self.gram.device)}
        own |= {f"output {name}": total for name, total in self.output_cross.items()}
        own |= {} if self.cross is None else {"cross": self.cross}
        own |= {"dense": self.dense_gram} if self.wants_dense_gram else {}
        total = processes.sum(own)
        self.gram, self.sum_abs, self.tokens = total["gram"], total["abs"], int(total["tokens"])
        self.cross, self.dense_gram = total.get("cross"), total.get("dense", self.dense_gram)
        self.output_cross = {name: total[f"output {name}"] for name in self.output_cross}


def _bias(linear: Node) -> Node | None:
    bias = linear.args[2] if len(linear.args) > 2 else None
    return bias if isinstance(bias, Node) else None


def tokens_as_rows(x: Tensor, mask: Tensor | None, stride: int = 1) -> Tensor:
    """Tokens as rows [tokens, in] in float32: those at which `mask` [rows] is True, and of them one in `stride`."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask]
    return rows[::stride].float()


def gram_matrix(rows: Tensor) -> Tensor:
    """rows^T rows, [n, n], for rows [tokens, n]; a third of the products are not computed but mirrored."""
    n = rows.shape[1]
    if n <= _GRAM_BLOCK:
        return rows.T @ rows
    gram = rows.new_empty(n, n)
    for start in range(0, n, _GRAM_BLOCK):
        end = min(start + _GRAM_BLOCK, n)
        torch.mm(rows[:, start:end].T, rows[:, start:], out=gram[start:end, start:])
        gram[end:, start:end] = gram[start:end, end:].T
    return gram


def _downstream(graph: torch.fx.Graph, roots: Iterable[Node]) -> set[Node]:
    found = set(roots)
    for node in graph.nodes:
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _last_uses(segments: Sequence[Segment], picks: Mapping[Node, Pick]) -> dict[Step, list[Node]]:
    """For every step of the walk, the values that nothing after it reads."""
    last: dict[Node, Step] = {}
    for segment in segments:
        for node in segment.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        source = segment.group.source
        which = (picks[source].tokens,) if source in picks else ()
        for node in (source, *which, *(node for nodes in segment.addends.values() for node in nodes)):
            last[node] = segment.group
        if segment.block is not None:
            last.update(dict.fromkeys(segment.block.inputs, segment.block))
    freed: dict[Step, list[Node]] = {}
    for node, step in last.items():
        freed.setdefault(step, []).append(node)
    return freed

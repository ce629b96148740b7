"""The sweep: one walk over a captured graph that gathers each linear's statistics and replaces it, in order.

Two values are carried for every calibration batch: what the dense model computes (`dense`) and what the model computes
whose linears up to here are compressed (`compressed`). The walk goes in segments. A segment computes the input of the
next *group* of linears (those that read one value: q, k and v; gate and up) for all batches and sums its statistics;
the group's weights are then solved, and the next segment runs with them. Every node runs once per flow and batch,
values are freed after their last use, and the walk ends at the last linear to compress: a head's logits are never
computed. There are no layer names in it.

Between segments the values of all batches may lie in files, and weights are read again for every segment, so that
neither need fit into memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import CalibrationError
from ..factors import PifaFactors
from ..graph.capture import Captured
from ..graph.linears import linears_by_weight, weight_name
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
class Segment:
    """What is computed for all batches before `group` can be solved.

    Attributes:
        nodes: in the order of the graph.
        group: the linears.
        addends: for members whose output is added to other values: those.
    """

    nodes: tuple[Node, ...]
    group: Group
    addends: Mapping[Node, tuple[Node, ...]] = field(default_factory=dict)


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


def plan(graph: torch.fx.Graph, linears: Iterable[Node], *, drift: bool = False) -> list[Segment]:
    """Segments in the order of the graph; nodes that no linear's input needs are in none of them.

    With `drift` also what linears' outputs are added to is computed. Where several outputs are added to one value (the
    attention's and the MLP's in parallel) the last of these linears has all others among its addends, and they none:
    what is lacking is made up for once.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    unsolved = set(linears)
    done: set[Node] = set()
    segments = []
    for group in groups(graph, unsolved):
        addends = {member: tuple(_addends(member)) for member in group.members if drift}
        addends = {member: nodes for member, nodes in addends.items() if nodes and not unsolved & ancestors(*nodes)}
        unsolved -= set(group.members)
        wanted = ancestors(group.source, *(node for nodes in addends.values() for node in nodes))
        needed = sorted(wanted - done, key=position.__getitem__)
        done.update(needed)
        computed = tuple(node for node in needed if node.op not in ("placeholder", "get_attr"))
        segments.append(Segment(computed, group, addends))
    return segments


def groups(graph: torch.fx.Graph, linears: Iterable[Node]) -> list[Group]:
    """Linears by the value they read, in the order of the graph."""
    members: dict[Node, list[Node]] = {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in sorted(linears, key=position.__getitem__):
        members.setdefault(node.all_input_nodes[0], []).append(node)
    return [Group(source, tuple(nodes)) for source, nodes in members.items()]


def _addends(node: Node) -> Iterator[Node]:
    """Values of the shape of what `node` computes that are added to it, as long as nothing else reads the sum."""
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
        yield other
        node = total


def _shape(value: Any) -> torch.Size | None:
    found = value.meta.get("val") if isinstance(value, Node) else None
    return found.shape if isinstance(found, Tensor) else None


Replacement = PifaFactors | Tensor
"""What stands in for the weight of a linear: factors, or another weight [out, in]."""


class Sweep:
    """One walk over `captured`; see the module's docstring.

    Args:
        captured: the graph and the batches.
        linears: the linears to replace, `aten.linear.default` nodes; with one, all that read its weight are.
        flows: which flows are followed, "both", "dense" or "compressed"; with one, all statistics are that one's.
        dense_gram: whether the dense model's Gram matrices are summed beside the compressed model's.
        drift: whether outputs are summed together with what differs between both flows in the values that they are
            added to (`Statistics.output_cross`).
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
        room: Room | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._dense_gram = dense_gram
        self._processes = Processes() if processes is None else processes
        self._weights = captured.weights
        self.segments = plan(captured.graph.graph, linears, drift=drift)
        by_weight = linears_by_weight(captured.graph)
        self._uses = {node: by_weight[weight_name(node)] for node in linears}  # a new weight is one for all of them
        self._replaced: dict[Node, Replacement] = {}  # of linears that are still to be computed
        self._masks = captured.masks
        self._constant: Values = {}
        placeholders = captured.graph.graph.find_nodes(op="placeholder")
        self._store = ValueStore(room or Room())
        self._batches = self._processes.own(len(captured.inputs))
        for batch in self._batches:
            self._keep(batch, Flows(dict(zip(placeholders, captured.inputs[batch], strict=True))))
        self._varies = _downstream(captured.graph, placeholders)
        self._diverges = set()
        if flows == "both":
            self._diverges = _downstream(captured.graph, (use for uses in self._uses.values() for use in uses))
        self._only_compressed = flows == "compressed"
        self._freed_after = _last_uses(self.segments)

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
    ) -> None:
        """Walks the graph; `solve` gives factors, or another weight, for the members of a group that are replaced.

        Args:
            solve: called once for every group, in the order of the graph.
            progress: called after each group.
            known: what an earlier walk's `solve` gave for a group, which is then neither summed nor solved again.

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
            steps: list[Node | Group] = [*segment.nodes, segment.group]
            for step in steps:
                for node in self._freed_after.get(step, ()):
                    self._constant.pop(node, None)
            if found is None:
                found = solve(segment.group, sums.finish(label, self._processes))
            self._replaced.update({use: new for node, new in found.items() for use in self._uses[node]})
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
            mask = self._masks.rows(source, batch, dense.shape[:-1], layers)
            if summed:
                rows = tokens_as_rows(dense, mask)
                inputs = rows if compressed is dense else tokens_as_rows(compressed, mask)
                sums.add(rows, inputs, cross=len(added) < len(segment.group.members))
                for member, addends in added.items():
                    sums.add_outputs(weight_name(member), self._wanted_output(member, addends, flows, mask), inputs)
            self._free(segment.group, flows)
            self._keep(batch, flows)
        return sums

    def _keep(self, batch: int, flows: Flows) -> None:
        for name in ("shared", "dense", "compressed"):
            self._store.put((batch, name), getattr(flows, name))

    def _run_segment(self, segment: Segment, batch: int) -> Flows:
        flows = Flows(*(self._store.get((batch, name)) for name in ("shared", "dense", "compressed")))
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
        if compressed and node in self._replaced:
            new, bias = self._replaced[node], _bias(node)
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

    def _free(self, step: Node | Group, flows: Flows) -> None:
        for node in self._freed_after.get(step, ()):
            flows.free(node)


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

    def finish(self, label: str, processes: Processes) -> Statistics:
        """The sums of all processes.

        Raises:
            CalibrationError: there are no tokens, or an input is not finite; names `label`.
        """
        self._add_those_of_others(processes)
        dense_gram = self.dense_gram if self.wants_dense_gram else self.gram
        if self.tokens == 0:
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


def _downstream(gm: GraphModule, roots: Iterable[Node]) -> set[Node]:
    found = set(roots)
    for node in gm.graph.nodes:
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return found


def _last_uses(segments: Sequence[Segment]) -> dict[Node | Group, list[Node]]:
    """For every step of the walk, the values that nothing after it reads."""
    last: dict[Node, Node | Group] = {}
    for segment in segments:
        for node in segment.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        for node in (segment.group.source, *(node for nodes in segment.addends.values() for node in nodes)):
            last[node] = segment.group
    freed: dict[Node | Group, list[Node]] = {}
    for node, step in last.items():
        freed.setdefault(step, []).append(node)
    return freed

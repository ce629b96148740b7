"""What a pass is, and how passes are run: `Rewrite`, `Skip`, `Record`, `run_passes`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ..errors import PassError
from .effects import inside_transforms, remove_unread


@dataclass(frozen=True)
class Skip:
    """A node that a pass looked at and left alone, and why."""

    reason: str


TRANSFORMED = Skip("it runs within a transform of torch.func")


@dataclass(frozen=True)
class Record:
    """What one pass did at one node.

    Attributes:
        rule: the pass's class name.
        node: the node's name before the pass.
        outcome: name of the node that stands there now, or why nothing was done.
    """

    rule: str
    node: str
    outcome: str | Skip


class Rewrite(ABC):
    """One rewrite: `match` finds what is needed to rewrite a node, `rewrite` builds what replaces it.

    `match` returns None for a node that this pass has nothing to do with (no record is made), a `Skip` for a near miss,
    and anything else to have it handed to `rewrite`.
    """

    targets: Sequence[Callable[..., Any]] = ()
    works_in_transforms = False
    """Whether what it builds is safe within a transform of `torch.func`, where values are batched or differentiated."""
    is_about_speed_only = False
    """Whether a node that it skips is in PIFA form all the same, and the backend's "strict" has nothing to raise."""

    def candidates(self, gm: GraphModule) -> Iterable[Node]:
        """The nodes to look at: calls of `targets`."""
        return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in self.targets]

    @abstractmethod
    def match(self, gm: GraphModule, node: Node) -> Any:
        """What `rewrite` needs to know about `node`, a `Skip`, or None."""

    @abstractmethod
    def rewrite(self, gm: GraphModule, node: Node, found: Any) -> Node:
        """Builds the replacement (the graph inserts before `node`) and returns the node whose value takes over."""


def run_passes(gm: GraphModule, passes: Iterable[Rewrite], *, strict: bool = False) -> list[Record]:
    """Runs `passes` over `gm` one after the other, in place, and says what happened at every node they looked at.

    What a rewrite leaves without a reader is removed if it has no effects (`effects.remove_unread`), and nothing else
    is: a call that nobody reads may be there for what it writes. The graph is checked after every pass, and
    recompiled after one that rewrote something.

    Raises:
        PassError: `strict` is set and a pass skipped a node; the passes before it have been applied.
    """
    records: list[Record] = []
    for rule in passes:
        records += _run_pass(gm, rule, strict)
    return records


def _run_pass(gm: GraphModule, rule: Rewrite, strict: bool) -> list[Record]:
    name = type(rule).__name__
    records = []
    transformed = set() if rule.works_in_transforms else inside_transforms(gm.graph)
    for node in list(rule.candidates(gm)):
        if node.graph is not gm.graph or node._erased:
            continue
        found = rule.match(gm, node)
        if found is None:
            continue
        if node in transformed and not isinstance(found, Skip):
            found = TRANSFORMED
        if isinstance(found, Skip):
            if strict:
                raise PassError(f"{name} skipped {node.name}: {found.reason}; run without strict=True to go on")
            records.append(Record(name, node.name, found))
            continue
        with gm.graph.inserting_before(node):
            new = rule.rewrite(gm, node, found)
        new.meta = {**node.meta, **new.meta}
        operands = node.all_input_nodes
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        remove_unread(gm.graph, operands)
        records.append(Record(name, node.name, new.name))
    gm.graph.lint()
    if any(not isinstance(record.outcome, Skip) for record in records):
        gm.recompile()
    return records

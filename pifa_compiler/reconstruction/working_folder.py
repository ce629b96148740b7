"""`WorkingFolder`: results of a long run on disk, each whole or not there, so that a run that was stopped goes on.

linears/NAME      sums of the dense model at a linear: what the allocator saw, and the gradients' Gram matrix
experts/NAME      sums of the dense model over all experts of a layer
blocks/RANK-N     gradients at the border that the way back through the dense model has come to
groups/NAME       factors of linears that read one value, and their reports
sites/NUMBER      layers of a site that took over, or gave away, a row order
values/           what does not fit into memory between two steps; worthless to another process
"""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..factors import FactorQuality, PifaFactors
from ..graph.linears import weight_name
from ..processes import Processes
from ..report import LayerReport
from ..run_folder import RunFolder, load_tensors, save_tensors, whole
from .allocators import Seen
from .gradients import BlockDone
from .solver import Solved
from .statistics import ExpertSums
from .sweep import Group


class WorkingFolder(RunFolder):
    """Findings of a run in a folder (see `Results`); its arguments are those of a `RunFolder`."""

    rooms = ("linears", "experts", "blocks", "groups", "sites", "values")
    scratch = "values"

    def __init__(
        self, folder: Path, run: Mapping[str, Any], *, resume: bool = False, processes: Processes | None = None
    ) -> None:
        super().__init__(folder, run, resume=resume, processes=processes)
        self._graph: dict[str, Node] = {}
        self._seen: dict[str, Seen] = {}
        self._site_of: dict[str, int] = {}
        self._expert_sums = {path.stem for path in (folder / "experts").glob("*.safetensors")}

    @property
    def values(self) -> Path:
        """Where values between two steps may lie."""
        return self.folder / "values"

    def bind(self, graph: GraphModule) -> None:
        """Says which graph the nodes are of that results are asked for."""
        self._graph = {node.name: node for node in graph.graph.nodes}

    def add_linear(self, linear: Node, seen: Seen, gradient_gram: Tensor | None) -> None:
        """See `Results`."""
        tensors = {"seen": seen.found, "gradient_gram": gradient_gram}
        if self.processes.is_first:
            self._write("linears", weight_name(linear), tensors, {"weighted": str(int(seen.weighted))})
        self._seen[weight_name(linear)] = seen

    def seen(self, linear: Node) -> Seen | None:
        """See `Results`."""
        name = weight_name(linear)
        if name not in self._seen and (found := self._read("linears", name, "seen")) is not None:
            with whole(self._path("linears", name), self._blocks):
                self._seen[name] = Seen(found[0].get("seen"), found[1]["weighted"] == "1")
        return self._seen.get(name)

    @property
    def gradient_grams(self) -> "GramsOnDisk":
        """See `Results`; read when they are asked for."""
        return GramsOnDisk(self)

    def gradient_gram(self, name: str) -> Tensor | None:
        """The sum of gradients of the weight `name`, [out, out]; None if there is none."""
        found = self._read("linears", name, "gradient_gram")
        return None if found is None else found[0].get("gradient_gram")

    def add_expert_sums(self, name: str, sums: ExpertSums) -> None:
        """See `Results`."""
        if self.processes.is_first:
            self._write("experts", name, sums.total, {"tokens": json.dumps(dict(sums.tokens))})
        self._expert_sums.add(name)

    def expert_sums(self, name: str) -> ExpertSums | None:
        """See `Results`; read when they are asked for."""
        found = self._read("experts", name)
        if found is None:
            return None
        with whole(self._path("experts", name), self._blocks):
            return ExpertSums(found[0], json.loads(found[1]["tokens"]))

    @property
    def known_expert_sums(self) -> Set[str]:
        """See `Results`."""
        return self._expert_sums

    def add_block(self, done: BlockDone) -> None:
        """See `Results`."""
        tensors = {
            f"{batch} {node.name}": gradient
            for batch, gradients in enumerate(done.gradients)
            for node, gradient in gradients.items()
        }
        notes = {"block": done.block, "batches": len(done.gradients), "bfloat16": done.bfloat16}
        save_tensors(self._block(done.block), tensors, {"done": json.dumps(notes)})
        # The one before stays: a process that shares the run may not have come further.
        for number in sorted(number for number in self._own_blocks() if number > done.block)[1:]:
            self._block(number).unlink(missing_ok=True)

    def _block(self, number: int) -> Path:
        return self._blocks / f"{self.processes.rank}-{number}.safetensors"

    def _own_blocks(self) -> list[int]:
        own = self.folder.glob(f"blocks/{self.processes.rank}-*.safetensors")
        return [int(path.stem.partition("-")[2]) for path in own]

    def last_block(self) -> BlockDone | None:
        """See `Results`; the last that all processes have done."""
        numbers = self.processes.gather(self._own_blocks())
        if not all(numbers):
            return None
        path = self._block(max(map(min, numbers)))
        found = load_tensors(path)
        if found is None:
            return None
        with whole(path):
            notes = json.loads(found[1]["done"])
            gradients: list[dict[Node, Tensor]] = [{} for _ in range(notes["batches"])]
            for key, tensor in found[0].items():
                batch, _, name = key.partition(" ")
                gradients[int(batch)][self._graph[name]] = tensor
            return BlockDone(notes["block"], gradients, notes["bfloat16"])

    def add_group(self, group: Group, solved: Mapping[Node, Solved]) -> None:
        """See `Results`."""
        if not self.processes.is_first:
            return
        tensors: dict[str, Tensor | None] = {}
        for node, each in solved.items():
            for part in ("w_pivot", "coeff", "pivots"):
                tensors[f"{node.name} {part}"] = getattr(each.factors, part)
        reports = {node.name: asdict(each.report) for node, each in solved.items()}
        qualities = {node.name: asdict(each.factors.quality) for node, each in solved.items()}
        notes = json.dumps({"reports": reports, "qualities": qualities})
        self._write("groups", weight_name(group.members[0]), tensors, {"solved": notes})

    def solved(self, group: Group) -> Mapping[Node, Solved] | None:
        """See `Results`."""
        first = weight_name(group.members[0])
        found = self._read("groups", first)
        if found is None:
            return None
        tensors, solved = found[0], dict[Node, Solved]()
        with whole(self._path("groups", first)):
            notes = json.loads(found[1]["solved"])
            for name, report in notes["reports"].items():
                w_pivot, coeff, pivots = (tensors[f"{name} {part}"] for part in ("w_pivot", "coeff", "pivots"))
                factors = PifaFactors(w_pivot, coeff, pivots, FactorQuality(**notes["qualities"][name]))
                solved[self._graph[name]] = Solved(factors, LayerReport.from_dict(report))
        return solved

    def add_site(self, number: int, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps the layers that a site has changed, by name, instead of what groups and earlier sites made of them.

        All of them at once: a layer whose row order is gone fits only those that have taken it over.

        Args:
            number: of the site; sites are added in order.
            layers: the tensors of each layer, by their names in it; none if the site has changed nothing.
        """
        tensors = {f"{name} {part}": tensor for name, own in layers.items() for part, tensor in own.items()}
        self._write("sites", str(number), tensors, {"layers": json.dumps(list(layers))})
        self._site_of.update(dict.fromkeys(layers, number))

    def site(self, number: int) -> tuple[str, ...] | None:
        """Names of the layers that a site has changed; None if it was not added yet."""
        found = self._read("sites", str(number), None)
        if found is None:
            return None
        with whole(self._path("sites", str(number))):
            names = tuple(json.loads(found[1]["layers"]))
            self._site_of.update(dict.fromkeys(names, number))
            return names

    def layer(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of the layer `name` as the last site has changed it, of those asked for or added; or None."""
        if name not in self._site_of:
            return None
        found = self._read("sites", str(self._site_of[name]), f"{name} ")
        return None if found is None else {key.partition(" ")[2]: tensor for key, tensor in found[0].items()}

    @property
    def _blocks(self) -> Path:
        """What goes with the linears: gradients are summed of all of them together, as far as blocks were done."""
        return self.folder / "blocks"

    def _path(self, room: str, name: str) -> Path:
        return self.folder / room / f"{name}.safetensors"

    def _write(self, room: str, name: str, tensors: Mapping[str, Tensor | None], notes: dict[str, str]) -> None:
        known = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        save_tensors(self._path(room, name), known, notes)

    def _read(self, room: str, name: str, start: str | None = "") -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return load_tensors(self._path(room, name), start, self._blocks if room in ("linears", "experts") else None)


class GramsOnDisk(Mapping[str, Tensor]):
    """Sums of gradients by the names of weights, read when they are asked for."""

    def __init__(self, folder: WorkingFolder) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Tensor:
        found = self._folder.gradient_gram(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in (self._folder.folder / "linears").glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

"""`WorkingFolder`: results of a long run on disk, each whole or not there, so that a run that was stopped goes on.

run.json          what the run is of: options, files, data, versions
lock              held by the process that works here
linears/NAME      sums of the dense model at a linear: what the allocator saw, and the gradients' Gram matrix
blocks/RANK-N     gradients at the border that the way back through the dense model has come to
groups/NAME       factors of linears that read one value, and their reports
layers/NAME       layers that took over, or gave away, a row order
values/           what does not fit into memory between two steps; worthless to another process
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import OffloadError
from ..factors import FactorQuality, PifaFactors
from ..graph.linears import weight_name
from ..processes import Processes
from ..report import LayerReport
from .allocators import Seen
from .gradients import BlockDone
from .solver import Solved
from .sweep import Group

_RUN, _LOCK = "run.json", "lock"
_ROOMS = ("linears", "blocks", "groups", "layers", "values")


class WorkingFolder:
    """Findings of a run in a folder (see `Results`), for one process at a time.

    Args:
        folder: made if it is not there.
        run: what the run is of, as plain values; a run that goes on has to be of the same.
        resume: whether what lies there is gone on with.
        processes: those that share the run: the first writes, the others read; None is this one alone.

    Raises:
        OffloadError: another process works there, another run's results lie there, there are results and `resume` is
            not set, or it cannot be written.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], *, resume: bool = False, processes: Processes | None = None
    ) -> None:
        self.folder = folder
        self._processes = Processes() if processes is None else processes
        self._graph: dict[str, Node] = {}
        self._seen: dict[str, Seen] = {}
        self._lock: IO[str] | None = None
        if self._processes.is_first:
            with _explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(folder)
                try:
                    self._start(run, resume=resume)
                except BaseException:
                    self._lock.close()
                    raise
        self._processes.wait()

    def _start(self, run: Mapping[str, Any], *, resume: bool) -> None:
        known = self.folder / _RUN
        wanted = json.loads(json.dumps(run))  # as it will be read
        if known.exists():
            self._compare(_read_json(known), wanted)
            if not resume:
                raise OffloadError(f"{self.folder} holds a run that was stopped; resume it (--resume), or delete it")
        elif any(path.name != _LOCK for path in self.folder.iterdir()):
            raise OffloadError(f"{self.folder} is not empty and no working folder; name another one")
        elif resume:
            raise OffloadError(f"{self.folder} holds no run to go on with; start one without --resume")
        shutil.rmtree(self.values, ignore_errors=True)  # of a process that was killed
        for room in _ROOMS:
            (self.folder / room).mkdir(exist_ok=True)
        for draft in self.folder.rglob("*.draft"):
            draft.unlink()
        if not known.exists():
            _write_whole(known, lambda draft: draft.write_text(json.dumps(wanted, indent=1), encoding="utf-8"))

    def _compare(self, known: Any, wanted: Any) -> None:
        if not isinstance(known, dict):
            raise OffloadError(f"{self.folder / _RUN} is damaged; delete {self.folder}")
        for key in {**known, **wanted}:
            if known.get(key) != wanted.get(key):
                raise OffloadError(
                    f"{self.folder} holds a run of another {key}: {_difference(known.get(key), wanted.get(key))}; "
                    "repeat that run's options, or delete the folder"
                )

    @property
    def values(self) -> Path:
        """Where values between two steps may lie."""
        return self.folder / "values"

    def close(self, *, finished: bool) -> None:
        """Lets another run work here; with `finished` the folder is gone."""
        if self._lock is not None:
            shutil.rmtree(self.folder if finished else self.values, ignore_errors=True)
            self._lock.close()

    def bind(self, graph: GraphModule) -> None:
        """Says which graph the nodes are of that results are asked for."""
        self._graph = {node.name: node for node in graph.graph.nodes}

    def add_linear(self, linear: Node, seen: Seen, gradient_gram: Tensor | None) -> None:
        """See `Results`."""
        tensors = {"seen": seen.found, "gradient_gram": gradient_gram}
        if self._processes.is_first:
            self._write("linears", weight_name(linear), tensors, {"weighted": str(int(seen.weighted))})
        self._seen[weight_name(linear)] = seen

    def seen(self, linear: Node) -> Seen | None:
        """See `Results`."""
        name = weight_name(linear)
        if name not in self._seen and (found := self._read("linears", name, ("seen",))) is not None:
            self._seen[name] = Seen(found[0].get("seen"), found[1]["weighted"] == "1")
        return self._seen.get(name)

    @property
    def gradient_grams(self) -> "GramsOnDisk":
        """See `Results`; read when they are asked for."""
        return GramsOnDisk(self)

    def gradient_gram(self, name: str) -> Tensor | None:
        """The sum of gradients of the weight `name`, [out, out]; None if there is none."""
        found = self._read("linears", name, ("gradient_gram",))
        return None if found is None else found[0].get("gradient_gram")

    def add_block(self, done: BlockDone) -> None:
        """See `Results`."""
        tensors = {
            f"{batch} {node.name}": gradient
            for batch, gradients in enumerate(done.gradients)
            for node, gradient in gradients.items()
        }
        notes = {"block": done.block, "batches": len(done.gradients), "bfloat16": done.bfloat16}
        _save(self._block(done.block), tensors, {"done": json.dumps(notes)})
        # The one before stays: a process that shares the run may not have come further.
        self._block(done.block + 2).unlink(missing_ok=True)

    def _block(self, number: int) -> Path:
        return self.folder / "blocks" / f"{self._processes.rank}-{number}.safetensors"

    def last_block(self) -> BlockDone | None:
        """See `Results`; the last that all processes have done."""
        own = self.folder.glob(f"blocks/{self._processes.rank}-*.safetensors")
        numbers = self._processes.gather([int(path.stem.partition("-")[2]) for path in own])
        if not all(numbers):
            return None
        found = _load(self._block(max(map(min, numbers))))
        if found is None:
            return None
        notes = json.loads(found[1]["done"])
        gradients: list[dict[Node, Tensor]] = [{} for _ in range(notes["batches"])]
        for key, tensor in found[0].items():
            batch, _, name = key.partition(" ")
            gradients[int(batch)][self._graph[name]] = tensor
        return BlockDone(notes["block"], gradients, notes["bfloat16"])

    def add_group(self, group: Group, solved: Mapping[Node, Solved]) -> None:
        """See `Results`."""
        if not self._processes.is_first:
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
        found = self._read("groups", weight_name(group.members[0]))
        if found is None:
            return None
        tensors, notes = found[0], json.loads(found[1]["solved"])
        solved: dict[Node, Solved] = {}
        for name, report in notes["reports"].items():
            w_pivot, coeff, pivots = (tensors[f"{name} {part}"] for part in ("w_pivot", "coeff", "pivots"))
            factors = PifaFactors(w_pivot, coeff, pivots, FactorQuality(**notes["qualities"][name]))
            quality = report.pop("quality")
            kept = LayerReport(
                **{
                    **report,
                    "shape": tuple(report["shape"]),
                    "notes": tuple(report["notes"]),
                    "quality": None if quality is None else FactorQuality(**quality),
                }
            )
            solved[self._graph[name]] = Solved(factors, kept)
        return solved

    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of the layer `name`, by their names in it, instead of those that its group gave it."""
        self._write("layers", name, dict(tensors), {})

    def layer(self, name: str) -> dict[str, Tensor] | None:
        """What `add_layer` kept; None if it kept nothing."""
        found = self._read("layers", name)
        return None if found is None else found[0]

    def _write(self, room: str, name: str, tensors: Mapping[str, Tensor | None], notes: dict[str, str]) -> None:
        known = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        _save(self.folder / room / f"{name}.safetensors", known, notes)

    def _read(
        self, room: str, name: str, wanted: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return _load(self.folder / room / f"{name}.safetensors", wanted)


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


def _save(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}  # none shared

    def write(draft: Path) -> None:
        try:
            save_file(own, draft, metadata=notes)
        except SafetensorError as error:  # how safetensors reports that the disk is full
            raise OSError(str(error)) from error

    with _explained(path.parent):
        _write_whole(path, write)


def _load(path: Path, wanted: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if wanted is None or key in wanted]  # noqa: SIM118
            return {key: file.get_tensor(key).clone() for key in keys}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise OffloadError(f"{path} is damaged ({error}); delete it, and --resume makes it again") from error


def _write_whole(path: Path, write: Any) -> None:
    """Has a file written under another name, brought to the disk, and given its own name."""
    draft = path.with_name(f"{path.name}.draft")
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OffloadError(
            f"the working folder {folder} cannot be written: {error}; make room, or name another one (--offload); what "
            "was done is kept"
        ) from error


def _locked(folder: Path) -> IO[str]:
    file = (folder / _LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OffloadError(f"another process works in {folder}; wait for it, or name another folder") from error
    return file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _difference(known: Any, wanted: Any) -> str:
    """The first thing that differs, in words."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for key in {**known, **wanted}:
            if known.get(key) != wanted.get(key):
                return f"{key} {_difference(known.get(key), wanted.get(key))}"
    return f"was {known!r:.80}, is {wanted!r:.80}"

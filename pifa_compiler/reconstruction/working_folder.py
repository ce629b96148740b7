"""`WorkingFolder`: results of a long run on disk, each whole or not there, so that a run that was stopped goes on.

run.json          what the run is of: options, files, data, versions
lock              held by the process that works here
linears/NAME      sums of the dense model at a linear: what the allocator saw, and the gradients' Gram matrix
blocks/RANK-N     gradients at the border that the way back through the dense model has come to
groups/NAME       factors of linears that read one value, and their reports
sites/NUMBER      layers of a site that took over, or gave away, a row order
output.json       which folder the output is, written just before that takes its name
values/           what does not fit into memory between two steps; worthless to another process
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import OffloadError
from ..factors import FactorQuality, PifaFactors
from ..files import sync
from ..graph.linears import weight_name
from ..processes import Processes
from ..report import LayerReport
from .allocators import Seen
from .gradients import BlockDone
from .solver import Solved
from .sweep import Group

_RUN, _LOCK, _OUTPUT = "run.json", "lock", "output.json"
_ROOMS = ("linears", "blocks", "groups", "sites", "values")


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
        self._site_of: dict[str, int] = {}
        self._lock: IO[str] | None = None
        if self._processes.is_first:
            with _explained(folder):
                there, locked_before = folder.exists(), (folder / _LOCK).exists()
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(folder)
                try:
                    self._start(run, resume=resume)
                except BaseException:
                    if not locked_before:
                        (folder / _LOCK).unlink(missing_ok=True)
                    if not there:
                        shutil.rmtree(folder, ignore_errors=True)
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
        elif any(path.name not in (_LOCK, f"{_RUN}.draft") for path in self.folder.iterdir()):
            raise OffloadError(f"{self.folder} is not empty and no working folder; name another one")
        elif resume:
            raise OffloadError(f"{self.folder} holds no run to go on with; start one without --resume")
        else:
            _write_json(known, wanted)
        shutil.rmtree(self.values, ignore_errors=True)  # of a process that was killed
        for room in _ROOMS:
            (self.folder / room).mkdir(exist_ok=True)
        for draft in self.folder.rglob("*.draft"):
            draft.unlink()

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
            for room in _ROOMS if finished else ("values",):
                shutil.rmtree(self.folder / room, ignore_errors=True)
            if finished:  # what says so goes last
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def add_output(self, draft: Path) -> None:
        """Notes that the output lies in the folder `draft`, complete, and will be given its name now."""
        with _explained(self.folder):
            _write_json(self.folder / _OUTPUT, _identity(draft))

    def has_written(self, output: Path) -> bool:
        """Whether the folder `output` is what this run has made, and it was stopped after that."""
        known = self.folder / _OUTPUT
        return known.exists() and output.exists() and _read_json(known) == _identity(output)

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
        if name not in self._seen and (found := self._read("linears", name, "seen")) is not None:
            with _whole(self._path("linears", name)):
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
        own = [path.stem for path in self.folder.glob(f"blocks/{self._processes.rank}-*.safetensors")]
        numbers = self._processes.gather([int(stem.partition("-")[2]) for stem in own])
        if not all(numbers):
            return None
        path = self._block(max(map(min, numbers)))
        found = _load(path)
        if found is None:
            return None
        with _whole(path):
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
        first = weight_name(group.members[0])
        found = self._read("groups", first)
        if found is None:
            return None
        tensors, solved = found[0], dict[Node, Solved]()
        with _whole(self._path("groups", first)):
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
        with _whole(self._path("sites", str(number))):
            names = tuple(json.loads(found[1]["layers"]))
            self._site_of.update(dict.fromkeys(names, number))
            return names

    def layer(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of the layer `name` as the last site has changed it, of those asked for or added; or None."""
        if name not in self._site_of:
            return None
        found = self._read("sites", str(self._site_of[name]), f"{name} ")
        return None if found is None else {key.partition(" ")[2]: tensor for key, tensor in found[0].items()}

    def _path(self, room: str, name: str) -> Path:
        return self.folder / room / f"{name}.safetensors"

    def _write(self, room: str, name: str, tensors: Mapping[str, Tensor | None], notes: dict[str, str]) -> None:
        known = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        _save(self._path(room, name), known, notes)

    def _read(self, room: str, name: str, start: str | None = "") -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return _load(self._path(room, name), start)


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


def _load(path: Path, start: str | None = "") -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file whose names start with `start`, or none, and its notes; None if there is no such file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    with _whole(path):
        if not path.is_file():  # reading a pipe would wait for its other end
            raise ValueError("it is no file")
        try:
            with safe_open(path, framework="pt") as file:
                keys = [] if start is None else [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
                return {key: file.get_tensor(key).clone() for key in keys}, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(str(error)) from error


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Says of a file that does not hold what it should that it is damaged, and what to delete."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # Gradients are summed of all linears together, as far as blocks were done.
        more = f" and {path.parents[1] / 'blocks'}" if path.parent.name == "linears" else ""
        raise OffloadError(
            f"{path} is damaged ({error}); delete it{more}, and --resume makes again what is missing"
        ) from error


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1)
    _write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _identity(folder: Path) -> list[int]:
    """What tells a folder from others, whatever it is called."""
    stat = folder.stat()
    return [stat.st_dev, stat.st_ino]


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written under another name, brought to the disk, and given its own name."""
    draft = path.with_name(f"{path.name}.draft")
    try:
        write(draft)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
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
    path = folder / _LOCK
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise BlockingIOError("the run that worked there ends at this moment")
    except BlockingIOError as error:
        file.close()
        raise OffloadError(f"another process works in {folder}; wait for it, or name another folder") from error
    return file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _difference(known: Any, wanted: Any) -> str:
    """The first thing that differs, in words."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for key in {**known, **wanted}:
            if known.get(key) != wanted.get(key):
                return f"{key} {_difference(known.get(key), wanted.get(key))}"
    return f"was {known!r:.80}, is {wanted!r:.80}"

"""`RunFolder`: what a long run keeps on disk, each file whole or not there, so that a run that was stopped goes on."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .drafts import sync
from .errors import OffloadError
from .processes import Processes

_RUN, _LOCK, _OUTPUT = "run.json", "lock", "output.json"

_ALIGNMENT = 64
"""Of tensors in a mapped file: no dtype, and no vector of a processor, is wider."""


class RunFolder:
    """A folder for one run, and for one process of it at a time.

    run.json     what the run is of: options, files, data, versions
    lock         held by the process that works here
    output.json  which folder the output is, written just before that takes its name

    Args:
        folder: made if it is not there.
        run: what the run is of, as plain values; a run that goes on has to be of the same, by as many processes.
        resume: whether what lies there is gone on with.
        processes: those that share the run: the first writes, the others read; None is this one alone.

    Raises:
        OffloadError: another process works there, another run's results lie there, there are results and `resume` is
            not set, or it cannot be written.
    """

    rooms: tuple[str, ...] = ()
    """Folders in it that results lie in."""

    scratch: str | None = None
    """That of the rooms which holds nothing for another process."""

    def __init__(
        self, folder: Path, run: Mapping[str, Any], *, resume: bool = False, processes: Processes | None = None
    ) -> None:
        self.folder = folder
        self.processes = Processes() if processes is None else processes
        self._lock: IO[str] | None = None
        if self.processes.is_first:
            with explained(folder):
                there, locked_before = folder.exists(), (folder / _LOCK).exists()
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(folder)
                try:
                    self._start({**run, "processes": self.processes.size}, resume=resume)
                except BaseException:
                    if not locked_before:
                        (folder / _LOCK).unlink(missing_ok=True)
                    if not there:
                        shutil.rmtree(folder, ignore_errors=True)
                    self._lock.close()
                    raise
        self.processes.wait()

    def _start(self, run: Mapping[str, Any], *, resume: bool) -> None:
        known = self.folder / _RUN
        wanted = json.loads(json.dumps(run))  # as it will be read
        if known.exists():
            self._compare(read_json(known), wanted)
            if not resume:
                raise OffloadError(f"{self.folder} holds a run that was stopped; resume it (--resume), or delete it")
        elif any(path.name not in (_LOCK, f"{_RUN}.draft") for path in self.folder.iterdir()):
            raise OffloadError(f"{self.folder} is not empty and no working folder; name another one")
        elif resume:
            raise OffloadError(f"{self.folder} holds no run to go on with; start one without --resume")
        else:
            write_json(known, wanted)
        if self.scratch is not None:  # of a process that was killed
            shutil.rmtree(self.folder / self.scratch, ignore_errors=True)
        for room in self.rooms:
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

    def add_output(self, draft: Path) -> None:
        """Notes that the output lies in the folder `draft`, complete, and will be given its name now."""
        with explained(self.folder):
            write_json(self.folder / _OUTPUT, _identity(draft))

    def has_written(self, output: Path) -> bool:
        """Whether the folder `output` is what this run has made, and it was stopped after that."""
        known = self.folder / _OUTPUT
        return known.exists() and output.exists() and read_json(known) == _identity(output)

    def close(self, *, finished: bool) -> None:
        """Lets another run work here; with `finished` the folder is gone."""
        if self._lock is not None:
            for room in self.rooms:
                if finished or room == self.scratch:
                    shutil.rmtree(self.folder / room, ignore_errors=True)
            if finished:  # what says so goes last
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()


def hash_of(values: Any) -> str:
    """Tells whether values are the same: tensors, of any dtype, and plain ones, in lists, tuples and dicts."""
    found = hashlib.sha256()
    for path, value in pytree.tree_flatten_with_path(values)[0]:
        found.update(pytree.keystr(path).encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {list(value.shape)}".encode())
            found.update(_bytes_of(value))
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> None:
    """Writes a safetensors file whole, and brings it to the disk.

    Raises:
        OffloadError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        place = held.untyped_storage().data_ptr()
        if place in places or held.untyped_storage().nbytes() != held.nbytes:
            held = held.clone()  # the format takes no tensors that share memory
        places.add(place)
        own[key] = held

    def write(draft: Path) -> None:
        try:
            save_file(own, draft, metadata=notes)
        except SafetensorError as error:  # how safetensors reports that the disk is full
            raise OSError(str(error)) from error

    with explained(path.parent):
        _write_whole(path, write)


def mapped(tensors: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """The same values, mapped from a file in `folder`, which has no name any more and ends with the last of them.

    Raises:
        OffloadError: it cannot be written.
    """
    if not tensors:
        return []
    places = []
    with explained(folder), tempfile.NamedTemporaryFile(dir=folder) as file:
        for tensor in tensors:
            places.append(file.tell())
            file.write(_bytes_of(tensor))
            file.write(bytes(-file.tell() % _ALIGNMENT))
        file.flush()
        content = torch.from_file(file.name, shared=False, size=file.tell(), dtype=torch.uint8)
    return [
        content[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for place, tensor in zip(places, tensors, strict=True)
    ]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def load_tensors(
    path: Path, start: str | None = "", beside: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file whose names start with `start`, or none, and its notes; None if there is no such file.

    Raises:
        OffloadError: it is damaged; `beside` as in `whole`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    with whole(path, beside):
        if not path.is_file():  # reading a pipe would wait for its other end
            raise ValueError("it is no file")
        try:
            with safe_open(path, framework="pt") as file:
                keys = [] if start is None else [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
                return {key: file.get_tensor(key).clone() for key in keys}, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(str(error)) from error


@contextmanager
def whole(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Says of a file that does not hold what it should that it is damaged, and to delete it, and `beside`."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        more = "" if beside is None else f" and {beside}"
        raise OffloadError(
            f"{path} is damaged ({error}); delete it{more}, and --resume makes again what is missing"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole, and brings it to the disk."""
    text = json.dumps(content, indent=1)
    _write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


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
def explained(folder: Path) -> Iterator[None]:
    """Says of a working folder that cannot be written what to do."""
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


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is none, or it is damaged."""
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


def _identity(folder: Path) -> list[int]:
    """What tells a folder from others, whatever it is called."""
    stat = folder.stat()
    return [stat.st_dev, stat.st_ino]

"""Files and folders that are written whole or not at all, and where they may be written: looked at before long work."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .drafts import Draft, draft_in
from .errors import CheckpointError, PifaError

_CONFIG = "config.json"
_OF_A_MODEL = (
    ".json", ".safetensors", ".md", ".txt", ".model", ".jinja", ".bin", ".gguf", ".onnx", ".data", ".py",
)  # fmt: skip
_FOLDER_OF_A_TOKENIZER = "additional_chat_templates"
_LARGEST_CONFIG = 1 << 24


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes its name `path` when the block ends without an error.

    If the block fails or is interrupted nothing is left of it, and what was at `path` is as before. What appears there
    while the block runs is looked at as what was there before: if it is not replaced, the new folder gets another name.

    Args:
        path: the folder's name; see `check_destination` for what may be there.
        overwrite: whether a saved model of that name may be replaced.

    Raises:
        CheckpointError: the destination is refused, or any OSError while writing.
    """
    final = _resolved(path)
    check_destination(final, overwrite=overwrite)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with draft_in(final.parent) as draft:
            partial = draft.new / final.name
            partial.mkdir()
            yield partial
            with _kept_if_taken(draft, final, CheckpointError):
                _check_free(final, final, overwrite=overwrite)
                draft.take_place(replace=overwrite)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written, nothing was changed: {_explain(error, final)}") from error


@contextmanager
def atomic_files(final: Path, companion: Path, refusal: type[PifaError], *, overwrite: bool = False) -> Iterator[Path]:
    """A path in a new folder beside `final`, of the same name; what is there at the end is moved to its place.

    If the block fails or is interrupted nothing is left of it.

    Args:
        final: the file to write.
        companion: a second file that the block may write beside it; an old one goes if it does not.
        refusal: the error to raise.
        overwrite: whether files that are there may be replaced.

    Raises:
        PifaError: `refusal`, for any OSError while writing.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with draft_in(final.parent) as draft:
            yield draft.new / final.name
            with _kept_if_taken(draft, final, refusal):
                draft.take_place(replace=overwrite, companion=companion.name)
    except OSError as error:
        raise refusal(f"{final} could not be written: {error}; make room or choose another place") from error


@contextmanager
def _kept_if_taken(draft: Draft, final: Path, refusal: type[PifaError]) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, CheckpointError) as error:
        kept = draft.keep(final.name)
        raise refusal(
            f"something else was made at {final} in the meantime and is left as it is ({error}); what was to be there "
            f"is complete, and lies in {kept}"
        ) from error


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    """Refuses a folder that `atomic_folder` could not or should not write; call it before long work.

    Free are a name that does not exist and an empty folder. With `overwrite` a folder with a model's config.json may be
    replaced as well, if it holds nothing but files of a model. The folder that this process works in never is: a shell
    would stand in a folder that is gone.

    Raises:
        CheckpointError: something is there already, the place is not writable, or has less room than `needed_bytes`.
    """
    final = _resolved(path)
    with suppress(FileNotFoundError):  # it was deleted
        if Path.cwd().is_relative_to(final):
            raise CheckpointError(
                f"{path} is the folder that this process works in, or holds it; name a new folder in it, such as "
                f"{Path(path, 'pifa')}"
            )
    try:
        above = check_place(path, final, CheckpointError)
        with draft_in(above) as draft:
            _check_free(path, final, overwrite=overwrite)
            draft.try_place(final)
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {_explain(error, final)}") from error
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {needed_bytes:,} bytes and {free:,} are free; make room or choose another place"
        )


def _check_free(path: str | os.PathLike[str], final: Path, *, overwrite: bool) -> None:
    """Refuses what is at `final` and may not be replaced."""
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{path} is a file; wanted the name of a folder to write")
    if final.is_dir() and any(final.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{path} exists already; choose another name, or say overwrite (--force)")
        if foreign := _foreign(final):
            raise CheckpointError(
                f"{path} holds no saved model, or more than one ({foreign}), so it is not replaced; choose another name"
            )


def _foreign(folder: Path) -> str | None:
    """What shows that a folder is not a model's alone; None if nothing does."""
    config = folder / _CONFIG
    try:
        if not config.is_file() or config.stat().st_size > _LARGEST_CONFIG:
            return f"no {_CONFIG}"
        said = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not {"model_type", "architectures"} & said.keys():
        return f"{_CONFIG} is not a model's"
    for each in sorted(folder.iterdir()):
        if each.is_dir() and each.name != _FOLDER_OF_A_TOKENIZER:
            return f"the folder {each.name}"
        # Files without a suffix are licences and the like. Code belongs to a model that says so.
        if each.suffix not in ("", *_OF_A_MODEL) or (each.suffix == ".py" and "auto_map" not in said):
            return each.name
    return None


def check_place(path: str | os.PathLike[str], final: Path, refusal: type[PifaError]) -> Path:
    """The folder that exists and in which `final`, or its parents, will be made.

    Args:
        path: as the user gave it, for the message.
        final: the same, whole and without links.
        refusal: the error to raise.

    Raises:
        PifaError: `refusal`, if nothing can be made there.
    """
    above = next(folder for folder in final.parents if folder.exists())
    if not above.is_dir():
        raise refusal(f"{above} is a file; {path} cannot be made below it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise refusal(f"{above} is not writable; choose another place or change its permissions")
    return above


def check_files(path: str | os.PathLike[str], final: Path, *others: Path, refusal: type[PifaError]) -> None:
    """Refuses files that `atomic_files` could not write or replace; call it before long work.

    Args:
        path: as the user gave it, for the message.
        final, others: the same and what lies beside it, whole and without links.
        refusal: the error to raise.

    Raises:
        PifaError: `refusal`: one is no plain file, or its place cannot be written.
    """
    try:
        above = check_place(path, final, refusal)
        for file in (final, *others):
            if os.path.lexists(file) and not stat.S_ISREG(file.stat().st_mode):
                raise refusal(f"{file} is a {'folder' if file.is_dir() else 'device or pipe'}; wanted a file to write")
        with draft_in(above) as draft:
            draft.try_place(final, *others)
    except OSError as error:
        raise refusal(f"{path} cannot be written: {_explain(error, final)}") from error


def check_opens(file: Path, refusal: type[PifaError]) -> None:
    """Refuses a file that cannot be opened for writing; what is in it stays, and one that is not there is not made.

    Raises:
        PifaError: `refusal`.
    """
    try:
        if os.path.lexists(file):
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))  # a pipe would wait for its other end
        else:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            file.unlink()
    except (OSError, ValueError) as error:  # of a NUL in the name ValueError
        raise refusal(f"{file} cannot be written: {error}; name a file in a folder that exists") from error


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Writes or replaces a file, wholly or not at all; parents are made.

    Args:
        file: its place.
        write: writes it to another one, of the same name.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with draft_in(file.parent) as draft:
        write(draft.new / file.name)
        draft.take_place(replace=True)


def expand_home(path: str | os.PathLike[str], refusal: type[PifaError]) -> Path:
    """`path` with a home folder in the place of ~ or ~user.

    Raises:
        PifaError: `refusal`, if there is no such user or home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise refusal(f"{path} names the home of a user who is not there; write the path in full") from error


def resolve(path: str | os.PathLike[str], refusal: type[PifaError]) -> Path:
    """`path` whole and without links, so that what is renamed is the file or folder and not a link to it.

    Raises:
        PifaError: `refusal`, for links in a circle, a NUL in it, or a home or current folder that is not there.
    """
    try:
        return expand_home(path, refusal).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # of a circle RuntimeError, of a NUL ValueError
        raise refusal(f"{path} is no valid place: {error}; choose another one") from error


def _resolved(path: str | os.PathLike[str]) -> Path:
    return resolve(path, CheckpointError)


def _explain(error: OSError, final: Path) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return f"no space left on the disk of {final.parent}; make room or choose another place ({error})"
    if error.errno == errno.EBUSY:
        return f"it is a mount point; name a new folder in it ({error})"
    return f"{error}; choose another place or change its permissions"

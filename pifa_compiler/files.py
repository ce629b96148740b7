"""Files and folders that are written whole or not at all, and where they may be written: looked at before long work."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError, PifaError

_MODEL_FILES = (".safetensors", ".onnx")


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes its name `path` when the block ends without an error.

    If the block fails or is interrupted nothing is left of it, and what was at `path` is as before.

    Args:
        path: the folder's name; see `check_destination` for what may be there.
        overwrite: whether a saved model of that name may be replaced.

    Raises:
        CheckpointError: the destination is refused, or any OSError while writing.
    """
    final = _resolved(path)
    check_destination(final, overwrite=overwrite)
    unique = f"{final.name}.{secrets.token_hex(4)}"
    partial, retired = final.with_name(f".{unique}.partial"), final.with_name(f".{unique}.replaced")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if final.exists() and any(final.iterdir()):
            final.rename(retired)
        partial.rename(final)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written, nothing was changed: {_explain(error, final)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not final.exists():
            retired.rename(final)
        shutil.rmtree(retired, ignore_errors=True)


def remove_drafts(path: str | os.PathLike[str]) -> None:
    """Removes what an `atomic_folder` of this name left when its process was killed; only while no other writes it.

    What it was about to replace is put back.
    """
    final = _resolved(path)
    drafts = f".{glob.escape(final.name)}.*"
    for retired in final.parent.glob(f"{drafts}.replaced"):
        if not final.exists():
            retired.rename(final)
        shutil.rmtree(retired, ignore_errors=True)
    for partial in final.parent.glob(f"{drafts}.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def atomic_files(final: Path, companion: Path, refusal: type[PifaError]) -> Iterator[Path]:
    """A path in a new folder beside `final`, of the same name; what is there at the end is moved to its place.

    If the block fails or is interrupted nothing is left of it.

    Args:
        final: the file to write.
        companion: a second file that the block may write beside it; an old one goes if it does not.
        refusal: the error to raise.

    Raises:
        PifaError: `refusal`, for any OSError while writing.
    """
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial / final.name
        if not (partial / companion.name).exists():
            companion.unlink(missing_ok=True)  # of a file that is replaced
        for file in sorted(partial.iterdir(), reverse=True):  # weights before the graph that names them
            os.replace(file, final.with_name(file.name))
    except OSError as error:
        raise refusal(f"{final} could not be written: {error}; make room or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    """Refuses a folder that `atomic_folder` could not or should not write; call it before long work.

    Free are a name that does not exist and an empty folder. With `overwrite` a folder with a config.json or model file
    in it may be replaced as well, any other never: it was not made by a save.

    Raises:
        CheckpointError: something is there already, the place is not writable, or has less room than `needed_bytes`.
    """
    final = _resolved(path)
    try:
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{path} is a file; wanted the name of a folder to write")
        if final.is_dir() and any(final.iterdir()):
            if not overwrite:
                raise CheckpointError(f"{path} exists already; choose another name, or say overwrite (--force)")
            if not any(child.name == "config.json" or child.suffix in _MODEL_FILES for child in final.iterdir()):
                raise CheckpointError(f"{path} holds no saved model, so it is not replaced; choose another name")
        free = shutil.disk_usage(check_place(path, final, CheckpointError)).free
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; choose another place") from error
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {needed_bytes:,} bytes and {free:,} are free; make room or choose another place"
        )


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


def expand_home(path: str | os.PathLike[str], refusal: type[PifaError]) -> Path:
    """`path` with a home folder in the place of ~ or ~user.

    Raises:
        PifaError: `refusal`, if there is no such user or home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise refusal(f"{path} names the home of a user who is not there; write the path in full") from error


def _resolved(path: str | os.PathLike[str]) -> Path:
    """`path` without links, so that what is renamed is the folder and not a link to it."""
    return expand_home(path, CheckpointError).resolve()


def _explain(error: OSError, final: Path) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return f"no space left on the disk of {final.parent}; make room or choose another place ({error})"
    return f"{error}; choose another place or change its permissions"

"""Drafts: what is written lies in a hidden folder beside its place until it is whole, and takes its name then.

    .pifa-1a2b3c4d.draft/new/     what is written, under its own name
                         old/     what it replaces, until it is replaced
                         moving   what `new` held when it began to take its place
                         lock     held by the process that writes

The system frees the lock when its process ends, however it ends. A draft whose lock is free is nobody's: whoever writes
or reads beside it next puts back what was about to be replaced, and deletes the draft.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = ".pifa-{}.draft"
_LOCK, _MOVING = "lock", "moving"
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
"""Of renameat2(2)."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class Draft:
    """A folder that something is written into before it takes its place in the folder above.

    Attributes:
        parent: the folder above.
        new: where to write, under the names that it will have.
        old: where what is replaced lies for a while.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parent = folder, folder.parent
        self.new, self.old, self._moving = folder / "new", folder / "old", folder / _MOVING

    def try_place(self, *places: Path) -> None:
        """Raises what would keep files or folders from being written at `places` below `parent`; changes nothing there.

        Names are tried in the draft. A folder that is there is moved onto one that is not empty, which the system
        refuses last, after all that speaks against moving this one; a file gets a second name.

        Raises:
            OSError: a name is too long, a place is a mount point or not this user's to change, and the like.
        """
        for place in places:
            trial = self.folder / "trial" / place.relative_to(self.parent)
            (trial / "x").mkdir(parents=True)
            try:
                if place.is_dir():
                    place.rename(trial)
                    trial.rename(place)  # a file system that does not refuse it
                elif place.exists():
                    os.link(place, trial / "file")
            except OSError as error:
                # Not every file system knows second names; what lies on another one is a mount point.
                if error.errno not in _TAKEN and (place.is_dir() or error.errno == errno.EXDEV):
                    raise

    def take_place(self, *, replace: bool, companion: str = "") -> None:
        """Moves what lies in `new` to its place, all of it or nothing.

        Where the file system can exchange two names at once, a folder or file is there at every moment. Several files,
        and other file systems, need more than one step: then nothing is under the name of the last one for a moment,
        and never new beside old. A process that is killed in between leaves what `put_back` needs.

        Args:
            replace: whether what is there is replaced; an empty folder always is.
            companion: the name of something else that is replaced, by nothing if it is not in `new`.

        Raises:
            FileExistsError: something is there, and `replace` is not set.
            OSError: it cannot be moved; all is as it was.
        """
        for path in (*self.new.rglob("*"), self.new):
            if path.is_file() or path.is_dir():
                sync(path)
        names = sorted(os.listdir(self.new), reverse=True)  # weights before the graph that names them
        touched = sorted({*names, companion} - {""}) if replace else []
        replaced = [name for name in touched if self._is_there(name)]
        if len(names) > 1 or replaced not in ([], names) or (replaced and not self._exchange(names[0])):
            self._move_in_steps(names, replaced)
        elif not replaced:
            _move(self.new / names[0], self.parent / names[0])
        sync(self.parent)

    def _exchange(self, name: str) -> bool:
        """Whether the new and the old of this name could be exchanged at once."""
        return _renameat2(self.new / name, self.parent / name, _EXCHANGE) == 0

    def _move_in_steps(self, names: list[str], replaced: list[str]) -> None:
        self.old.mkdir()
        self._moving.write_text(json.dumps(names), encoding="utf-8")
        try:
            for name in replaced:
                (self.parent / name).rename(self.old / name)
            for name in names:
                _move(self.new / name, self.parent / name)
        except OSError:
            self.put_back()
            raise
        self._moving.unlink()

    def keep(self, name: str) -> Path:
        """Gives what cannot take its place a name that is free, which starts with `name`; returns it."""
        made = self.new / name
        kept = self.parent / f"{name[:200]}-{secrets.token_hex(4)}"
        (made if made.is_dir() else self.new).rename(kept)
        return kept

    def put_back(self) -> list[str]:
        """Undoes a `take_place` that was not completed; returns the names of what is in its old place again."""
        if not self._moving.exists():
            return []
        found = sorted(os.listdir(self.old), reverse=True)
        try:
            names = json.loads(self._moving.read_text(encoding="utf-8"))
        except ValueError:  # it was not written whole, so that nothing was moved
            names = []
        for name in reversed(names):
            if self._is_there(name) and not os.path.lexists(self.new / name):
                (self.parent / name).rename(self.new / name)
        for name in found:
            (self.old / name).rename(self.parent / name)
        self._moving.unlink()
        return found

    def end(self) -> list[str]:
        """Deletes the draft, its lock last, once all is put back; see `put_back`."""
        found = self.put_back()
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _LOCK:
                    path.unlink()
            (self.folder / _LOCK).unlink(missing_ok=True)
            self.folder.rmdir()
        return found

    def _is_there(self, name: str) -> bool:
        return os.path.lexists(self.parent / name)


@contextmanager
def draft_in(parent: Path) -> Iterator[Draft]:
    """A new draft in the folder `parent`; at the end nothing is left of it. Deletes what dead processes left there.

    Raises:
        OSError: it cannot be made, or what was about to be replaced cannot be put back: that stays in the draft then.
    """
    delete_abandoned(parent)
    draft, lock = _new_draft(parent)
    try:
        draft.new.mkdir()
        yield draft
    finally:
        try:
            draft.end()
        except KeyboardInterrupt:
            draft.end()  # what it had begun; a second interrupt leaves it to the next draft
            raise
        finally:
            if lock is not None:
                os.close(lock)


def delete_abandoned(parent: Path) -> None:
    """Deletes drafts in the folder `parent` whose processes are dead, and puts back what they were about to replace.

    It warns of what is put back. Other users' drafts, and those on file systems without locks, stay.
    """
    for folder in parent.glob(_NAME.format("?" * 8)):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():  # another user's may name anything
                continue
            lock = _locked(folder)
        except OSError:  # in use, or gone
            continue
        try:
            if found := Draft(folder).end():
                text = f"{parent / found[-1]} is as it was before: a process that was replacing it was killed"
                warnings.warn(text, stacklevel=3)
        except OSError:  # it may be read only; the next one tries again
            continue
        finally:
            os.close(lock)


def delete_at_once(folder: Path) -> None:
    """Deletes a folder: it is gone from its name at once, and if the process is killed then, the rest is abandoned.

    Raises:
        OSError: it cannot be moved.
    """
    doomed = folder.with_name(_NAME.format(secrets.token_hex(4)))
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that do not do it for folders
            raise
    finally:
        os.close(opened)


def _new_draft(parent: Path) -> tuple[Draft, int | None]:
    """A draft and its lock, as an open file; None where the file system has no locks."""
    while True:
        folder = parent / _NAME.format(secrets.token_hex(4))
        folder.mkdir()
        try:
            return Draft(folder), _locked(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for abandoned before it was locked
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Draft(folder), None
            Draft(folder).end()
            raise


def _locked(folder: Path) -> int:
    """The lock of a draft, as an open file.

    Raises:
        OSError: another process holds it, it is gone, or there can be none.
    """
    path = folder / _LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(path.stat(), os.fstat(lock)):
            raise FileNotFoundError(errno.ENOENT, "deleted in the meantime", str(path))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _move(source: Path, target: Path) -> None:
    """Renames what is not to replace anything but an empty folder.

    Raises:
        FileExistsError: something else is there.
    """
    try:
        if source.is_dir():
            source.rename(target)
            return
        if _renameat2(source, target, _NOREPLACE) == 0:
            return
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
    except OSError as error:
        if error.errno in _TAKEN:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _renameat2(source: Path, target: Path, flags: int) -> int:
    """The system call of Linux; 0 if it was done, else the number of an error, also where there is no such call."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    done = function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    return 0 if done == 0 else ctypes.get_errno()

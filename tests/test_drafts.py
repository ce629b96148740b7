"""Drafts take their place at once, or as if they had not been there, whenever their process is killed."""

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pifa_compiler import drafts
from pifa_compiler.drafts import Draft, delete_abandoned, draft_in

GRAPH, DATA = "model.onnx", "model.onnx.data"


class Killed(BaseException):
    """In the place of a signal: nothing that cleans up runs after it."""


def content(folder: Path) -> dict[str, str]:
    """All files below a folder, drafts included."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def public(folder: Path) -> dict[str, str]:
    """All files below a folder, without drafts."""
    return {name: text for name, text in content(folder).items() if not name.startswith(".pifa-")}


def assert_no_mixture(folder: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Where there is a graph, its own data is there as well, or has none."""
    now = public(folder)
    assert GRAPH not in now or now in (old | {"beside": "x"}, new | {"beside": "x"})


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., bool]]:
    """Runs a step with the n-th change of a name being the last thing that happens; whether there was one."""

    def prepare(n: int, *, exchanges: bool) -> Callable[..., bool]:
        def run(step: Callable[[], Any]) -> bool:
            calls = itertools.count()
            rename, unlink, call = Path.rename, Path.unlink, drafts._renameat2

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def instead(*args: Any, **options: Any) -> Any:
                    if next(calls) == n:
                        raise Killed
                    return function(*args, **options)

                return instead

            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", counted(rename))
                patch.setattr(Path, "unlink", counted(unlink))
                patch.setattr(drafts, "_renameat2", counted(call) if exchanges else lambda *_: errno.ENOSYS)
                try:
                    step()
                except Killed:
                    return True
            return False

        return run

    return prepare


FOLDER = {"m/config.json": "old", "m/weights": "old"}
CASES = {
    "folder": (FOLDER, {"m/config.json": "new", "m/weights": "new"}, ""),
    "new folder": ({}, {"m/config.json": "new"}, ""),
    "two files": ({GRAPH: "old", DATA: "old"}, {GRAPH: "new", DATA: "new"}, DATA),
    "two new files": ({}, {GRAPH: "new", DATA: "new"}, DATA),
    "one file for two": ({GRAPH: "old", DATA: "old"}, {GRAPH: "new"}, DATA),
    "two files for one": ({GRAPH: "old"}, {GRAPH: "new", DATA: "new"}, DATA),
    "one file": ({GRAPH: "old"}, {GRAPH: "new"}, DATA),
}


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk."""
    monkeypatch.setattr(drafts, "sync", lambda _: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.filterwarnings("ignore:.*is as it was before")
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_whenever_a_process_is_killed_the_old_or_the_new_is_there_whole(
    case: str, exchanges: bool, tmp_path: Path, killed_at: Any
) -> None:
    old, new, companion = CASES[case]
    for n, again in itertools.product(range(8), (None, 0, 1, 2)):
        parent = tmp_path / f"{n}-{again}"
        parent.mkdir()
        write(parent, old | {"beside": "x"})
        draft, lock = drafts._new_draft(parent)
        draft.new.mkdir()
        write(draft.new, new)
        run = killed_at(n, exchanges=exchanges)
        killed = run(lambda draft=draft: draft.take_place(replace=True, companion=companion))
        assert_no_mixture(parent, old, new)
        if exchanges and len({name.split("/")[0] for name in (*old, *new)}) == 1:
            assert public(parent) in (old | {"beside": "x"}, new | {"beside": "x"})
        os.close(lock)
        if again is not None:  # the process that puts back is killed as well
            killed_at(again, exchanges=exchanges)(lambda parent=parent: delete_abandoned(parent))
            assert_no_mixture(parent, old, new)
        delete_abandoned(parent)
        assert content(parent) in (old | {"beside": "x"}, new | {"beside": "x"})
        assert not list(parent.glob(".*"))
        assert killed or content(parent) == new | {"beside": "x"}


def test_what_is_put_back_is_said(tmp_path: Path, killed_at: Any) -> None:
    write(tmp_path, FOLDER)
    draft, lock = drafts._new_draft(tmp_path)
    write(draft.new, {"m/config.json": "new"})
    assert killed_at(1, exchanges=False)(lambda: draft.take_place(replace=True))
    assert not (tmp_path / "m").exists()
    os.close(lock)
    with pytest.warns(UserWarning, match="m is as it was before: a process that was replacing it was killed"):
        delete_abandoned(tmp_path)
    assert content(tmp_path) == FOLDER


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("step", range(4))
def test_what_fails_between_two_steps_is_undone(
    step: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {GRAPH: "old", DATA: "old"}
    write(tmp_path, old)
    steps = iter(range(100))
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if next(steps) == step:
            raise error
        return rename(source, target)

    monkeypatch.setattr(drafts, "_renameat2", lambda *_: errno.ENOSYS)

    def replace() -> None:
        with draft_in(tmp_path) as draft:
            write(draft.new, {GRAPH: "new", DATA: "new"})
            monkeypatch.setattr(Path, "rename", fail)
            draft.take_place(replace=True, companion=DATA)

    with pytest.raises(type(error)):
        replace()
    assert content(tmp_path) == old


def test_a_draft_in_use_stays_and_one_that_nobody_holds_goes(tmp_path: Path) -> None:
    (tmp_path / ".pifa-00000000.draft" / "new").mkdir(parents=True)
    (tmp_path / ".pifa-00000000.draft" / "new" / "x").touch()
    with draft_in(tmp_path) as draft:
        assert os.listdir(tmp_path) == [draft.folder.name]
        with draft_in(tmp_path) as other:
            assert {draft.folder, other.folder} == set(tmp_path.iterdir())
        delete_abandoned(tmp_path)
        assert draft.new.is_dir()
    assert os.listdir(tmp_path) == []


def test_links_and_files_that_are_called_like_drafts_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    (tmp_path / ".pifa-11111111.draft").symlink_to("mine")
    (tmp_path / ".pifa-22222222.draft").touch()
    delete_abandoned(tmp_path)
    assert (tmp_path / "mine" / "x").exists()
    assert (tmp_path / ".pifa-11111111.draft").is_symlink()
    assert (tmp_path / ".pifa-22222222.draft").exists()


def test_an_interrupt_while_a_draft_is_deleted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, calls = shutil.rmtree, itertools.count()

    def interrupted(*args: Any, **options: Any) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt
        rmtree(*args, **options)

    def save() -> None:
        with draft_in(tmp_path) as draft:
            write(draft.new, {"m/x": "ours"})

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert os.listdir(tmp_path) == []


def test_drafts_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, lock = drafts._new_draft(tmp_path)
    os.close(lock)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        delete_abandoned(tmp_path)
    assert draft.folder.exists()
    delete_abandoned(tmp_path)
    assert not draft.folder.exists()


@pytest.mark.parametrize("text", ["", '["m', "\0\0"])
def test_a_list_that_was_not_written_whole_is_of_nothing_moved(text: str, tmp_path: Path) -> None:
    write(tmp_path, FOLDER)
    draft, lock = drafts._new_draft(tmp_path)
    write(draft.folder, {"new/m/config.json": "new", "moving": text})
    draft.old.mkdir()
    os.close(lock)
    delete_abandoned(tmp_path)
    assert content(tmp_path) == FOLDER


def test_where_there_are_no_locks_drafts_are_made_and_never_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with draft_in(tmp_path) as draft:
        delete_abandoned(tmp_path)
        (draft.new / "x").touch()
        draft.take_place(replace=False)
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture(params=[True, False], ids=["exchanges", "steps"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the system call and without it."""
    if not request.param:
        monkeypatch.setattr(drafts, "_renameat2", lambda *_: errno.ENOSYS)
    return


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("there", [{"m/x": "theirs"}, {"m": "theirs"}], ids=["folder", "file"])
def test_nothing_that_is_there_is_replaced_unasked(there: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, there)
    with draft_in(tmp_path) as draft:
        write(draft.new, {"m/x": "ours"})
        with pytest.raises(FileExistsError):
            draft.take_place(replace=False)
        assert content(draft.new) == {"m/x": "ours"}
    assert content(tmp_path) == there


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("there", [GRAPH, DATA])
def test_of_two_files_none_takes_its_place_where_one_is_there(there: str, tmp_path: Path) -> None:
    write(tmp_path, {there: "theirs"})
    with draft_in(tmp_path) as draft:
        write(draft.new, {GRAPH: "ours", DATA: "ours"})
        with pytest.raises(FileExistsError):
            draft.take_place(replace=False, companion=DATA)
        assert content(draft.new) == {GRAPH: "ours", DATA: "ours"}
        kept = draft.keep(GRAPH)
    assert content(tmp_path) == {there: "theirs", f"{kept.name}/{GRAPH}": "ours", f"{kept.name}/{DATA}": "ours"}


@pytest.mark.usefixtures("either")
def test_an_empty_folder_is_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with draft_in(tmp_path) as draft:
        write(draft.new, {"m/x": "ours"})
        draft.take_place(replace=False)
    assert content(tmp_path) == {"m/x": "ours"}


def test_trying_a_place_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"m/x": "theirs", "file": "theirs"})
    (tmp_path / "empty").mkdir()
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    with draft_in(tmp_path) as draft:
        draft.try_place(*(tmp_path / name for name in ("m", "file", "empty", "new", "deep/er")))
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_the_name_of_what_is_kept_is_never_too_long(tmp_path: Path) -> None:
    with draft_in(tmp_path) as draft:
        (draft.new / ("x" * 255)).mkdir()
        kept = Draft(draft.folder).keep("x" * 255)
    assert os.listdir(tmp_path) == [kept.name]

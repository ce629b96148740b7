"""Where files and folders may be written, found out before the work; and what appears there during it."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pifa_compiler.errors import CheckpointError, ExportError
from pifa_compiler.files import atomic_files, atomic_folder, check_destination, check_files, resolve, write_whole

MODEL = {"config.json": json.dumps({"model_type": "llama"}), "model.safetensors": "x", "tokenizer.model": "x"}


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# What may be replaced


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"merges.txt": "x", "LICENSE": "x", "chat_template.jinja": "x", "README.md": "x", "pifa_report.json": "{}"},
        {"additional_chat_templates/tools.jinja": "x"},
        {"config.json": json.dumps({"model_type": "own", "auto_map": {}}), "modeling_own.py": "x"},
    ],
    ids=["least", "tokenizer", "templates", "code"],
)
def test_a_model_is_replaced_if_asked(more: dict[str, str], tmp_path: Path) -> None:
    folder = put(tmp_path / "m", MODEL | more)
    with pytest.raises(CheckpointError, match="exists already"):
        check_destination(folder)
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["m"]
    assert names(folder) == ["new"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"src/main.c": "x"}, "the folder src"),
        ({".git/HEAD": "x"}, "the folder .git"),
        ({"train.py": "x"}, "train.py"),
        ({"notes.tex": "x"}, "notes.tex"),
        ({"config.json": '{"port": 80}'}, "config.json is not a model's"),
        ({"config.json": "[]"}, "config.json is not a model's"),
        ({"config.json": "[" * 100_000}, "config.json is not a model's"),
        ({"config.json/x": ""}, "no config.json"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_is_not_a_model_alone_is_never_replaced(more: dict[str, str], said: str, tmp_path: Path) -> None:
    sound = {name: text for name, text in MODEL.items() if f"{name}/x" not in more}
    folder = put(tmp_path / "m", sound | more)
    before = names(folder)
    with pytest.raises(CheckpointError, match=re.escape(f"({said}), so it is not replaced")):
        check_destination(folder, overwrite=True)
    assert names(folder) == before


def test_a_folder_of_files_without_a_config_is_not_replaced(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", {"model.safetensors": "x"})
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_destination(folder, overwrite=True)


@pytest.mark.parametrize("name", [".", "..", "../..", "/"])
def test_the_folder_that_a_shell_stands_in_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = put(tmp_path / "a" / "b", MODEL)
    monkeypatch.chdir(here)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"works in, or holds it; name a new folder in it, such as.*pifa$"):
            check_destination(name, overwrite=overwrite)
    assert names(here) == sorted(MODEL)
    with atomic_folder("new") as partial:
        (partial / "x").touch()
    assert names(here / "new") == ["x"]


# What appears during the work


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [{"thesis.tex": "x"}, {"config.json": "{}"}], ids=["thesis", "config"])
def test_a_folder_that_appears_during_the_work_is_left_and_the_work_is_kept(
    there: dict[str, str], overwrite: bool, tmp_path: Path
) -> None:
    target = tmp_path / "m"

    def save() -> None:
        with atomic_folder(target, overwrite=overwrite) as partial:
            put(partial, MODEL)
            put(target, there)

    with pytest.raises(
        CheckpointError, match=f"made at {target} in the meantime and is left as it is.*lies in"
    ) as said:
        save()
    kept = Path(str(said.value).rpartition(" ")[2])
    assert names(tmp_path) == ["m", kept.name]
    assert names(target) == list(there)
    assert {name: (kept / name).read_text() for name in names(kept)} == MODEL


def test_of_two_saves_to_one_name_the_first_stays_and_the_second_is_kept(tmp_path: Path) -> None:
    def save() -> None:
        with atomic_folder(tmp_path / "m") as second:
            with atomic_folder(tmp_path / "m") as first:
                put(first, MODEL)
            put(second, MODEL | {"LICENSE": "x"})

    with pytest.raises(CheckpointError, match="in the meantime"):
        save()
    kept = next(path for path in tmp_path.iterdir() if path.name != "m")
    assert names(tmp_path / "m") == sorted(MODEL)
    assert names(kept) == sorted(MODEL | {"LICENSE": "x"})


def test_a_model_that_appears_is_replaced_if_asked_and_an_empty_folder_always(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "m", overwrite=True) as partial:
        put(tmp_path / "m", MODEL)
        (partial / "new").touch()
    with atomic_folder(tmp_path / "empty") as partial:
        (tmp_path / "empty").mkdir()
        (partial / "new").touch()
    assert names(tmp_path) == ["empty", "m"]
    assert names(tmp_path / "m") == names(tmp_path / "empty") == ["new"]


@pytest.mark.parametrize("appears", ["g.onnx", "g.onnx.data"])
def test_a_file_that_appears_during_the_work_is_left_and_the_work_is_kept(appears: str, tmp_path: Path) -> None:
    final, data = tmp_path / "g.onnx", tmp_path / "g.onnx.data"

    def export() -> None:
        with atomic_files(final, data, ExportError) as partial:
            put(partial.parent, {"g.onnx": "ours", "g.onnx.data": "ours"})
            (tmp_path / appears).write_text("theirs")

    with pytest.raises(ExportError, match="in the meantime and is left as it is") as said:
        export()
    kept = Path(str(said.value).rpartition(" ")[2])
    assert names(tmp_path) == sorted([appears, kept.name])
    assert (tmp_path / appears).read_text() == "theirs"
    assert [(kept / name).read_text() for name in names(kept)] == ["ours", "ours"]


# Places


def refusals(place: Path) -> Iterator[Callable[[], object]]:
    """The ways to ask for a place: as a folder, and as a file."""
    for overwrite in (False, True):
        yield lambda: check_destination(place, overwrite=overwrite)  # noqa: B023  called at once
    yield lambda: check_files(place, resolve(place, CheckpointError), refusal=CheckpointError)


@pytest.mark.parametrize("name", ["x" * 256, "a/" + "x" * 256, "x" * 256 + "/a", "a\0b"], ids=lambda name: name[:3])
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    for ask in refusals(tmp_path / name):
        with pytest.raises(CheckpointError, match=r"too long|null"):
            ask()
    assert names(tmp_path) == []


def test_the_longest_name_is_as_good_as_any(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / ("x" * 255)) as partial:
        put(partial, MODEL)
    with atomic_folder(tmp_path / ("x" * 255), overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path / ("x" * 255)) == ["new"]
    for text in ("old", "new"):
        write_whole(tmp_path / "deep" / ("y" * 255), lambda draft, text=text: draft.write_text(text))
    assert (tmp_path / "deep" / ("y" * 255)).read_text() == "new"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "a/b"):
        with pytest.raises(CheckpointError, match="no valid place"):
            check_destination(tmp_path / name)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a place on itself, or a file system of its own there, where that may be done."""
    mounted: list[Path] = []

    def mount_at(place: Path, *options: str) -> Path:
        run = subprocess.run(["mount", *(options or ("--bind", str(place))), str(place)], capture_output=True)
        if run.returncode:
            pytest.skip("may not mount anything")
        mounted.append(place)
        return place

    try:
        yield mount_at
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_mount_point_is_refused(tmp_path: Path, mount: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    for place in (mount(tmp_path / "empty"), mount(put(tmp_path / "m", MODEL))):
        with pytest.raises(CheckpointError, match="is a mount point; name a new folder in it"):
            check_destination(place, overwrite=True)
    assert names(tmp_path / "m") == sorted(MODEL)


def test_a_file_that_is_a_mount_point_is_refused(tmp_path: Path, mount: Callable[..., Path]) -> None:
    (tmp_path / "g.onnx").write_text("theirs")
    mount(tmp_path / "g.onnx")
    with pytest.raises(ExportError, match="cannot be written"):
        check_files("g.onnx", tmp_path / "g.onnx", refusal=ExportError)


def test_a_read_only_file_system_is_refused(tmp_path: Path, mount: Callable[..., Path]) -> None:
    (tmp_path / "ro").mkdir()
    mount(tmp_path / "ro", "-t", "tmpfs", "-o", "ro", "none")
    for ask in refusals(tmp_path / "ro" / "m"):
        with pytest.raises(CheckpointError, match="is not writable"):
            ask()


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_plain_files_are_replaced(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "g.onnx"
    if kind == "device":
        place.symlink_to("/dev/null")
        place = place.resolve()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(ExportError, match="wanted a file to write"):
        check_files("g.onnx", place, refusal=ExportError)


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", MODEL)
    inode = folder.stat().st_ino
    check_destination(folder, overwrite=True)
    check_destination(tmp_path / "new" / "deep")
    check_files("x", tmp_path / "new" / "x", tmp_path / "new" / "y", refusal=ExportError)
    assert names(tmp_path) == ["m"]
    assert folder.stat().st_ino == inode

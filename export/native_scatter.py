"""The native `PifaScatter` for onnxruntime on CPUs (pifa_scatter.c), built once for the machine by its C compiler."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..cache import folder_for

SOURCE = Path(__file__).with_name("pifa_scatter.c")
FLAGS = ("-std=c11", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden")

_SECONDS = 120.0


@functools.cache
def build() -> Path | str:
    """The library, built unless that was done before.

    The compiler is $CC, or the first of cc, gcc and clang. The library is kept in a folder whose name says what it was
    built from: source, command, compiler, processor.

    Returns:
        Its path, or why it cannot be had: models then run on their own functions.
    """
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler (cc, gcc, clang, or what $CC names); install one"
    try:
        version = subprocess.run(  # noqa: S603 -- the user's own compiler
            [*compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        ).stdout
        key = "\n".join((SOURCE.read_text(encoding="utf-8"), *compiler, *FLAGS, version, _processor()))
        folder = folder_for(key)
        # A library that a full disk or a crash cut short may take down the process that loads it.
        kept = next((file for file in folder.glob("pifa_scatter-*.so") if file.name == _name(file)), None)
        if kept is not None:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch, "pifa_scatter.so")
            command = [*compiler, *FLAGS, "-o", str(partial), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603
            if done.returncode != 0 or not partial.exists():
                said = (done.stderr.strip().splitlines() or ["no reason given"])[0]
                return f"{compiler[0]} could not build {SOURCE.name}: {said}"
            library = folder / _name(partial)
            os.replace(partial, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{SOURCE.name} could not be built: {error}"
    return library


def _name(library: Path) -> str:
    """What it is called in the cache: says whether its bytes are those that were built."""
    return f"pifa_scatter-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _compiler() -> list[str] | None:
    if named := shlex.split(os.environ.get("CC", "")):
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _processor() -> str:
    """What the code is built for: machines that differ in their vector units may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")

"""Runs of `compress_checkpoint` in a process of their own, which is killed at a call that it makes or after a time."""

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pifa_compiler import CompressConfig, Report, compress_checkpoint, drafts
from pifa_compiler.errors import PifaError

CONFIG = CompressConfig(density=0.6, rank_multiple=1)
RENAMES, DELETIONS = ("Path.replace", "Path.rename"), ("os.unlink", "os.rmdir")

# A fork of the process that tests run in could wait for ever for a thread that it does not have.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["pifa_compiler.compress_checkpoint", "transformers.models.llama.modeling_llama"])


@dataclass(frozen=True)
class Stop:
    """Where a run stops.

    Attributes:
        functions: those that count.
        call: the number of the call, from 0, that the process is killed in the place of.
        after_renames: how many folders are renamed before calls count.
        exchanges: whether the file system exchanges two names at once.
    """

    functions: tuple[str, ...]
    call: int
    after_renames: int = 0
    exchanges: bool = True


def tokens() -> list[torch.Tensor]:
    """The same three calibration batches every time."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 64, (1, 20), generator=generator) for _ in range(3)]


def streamed(source: Path, output: Path, config: CompressConfig = CONFIG, **options: Any) -> Report:
    """`compress_checkpoint` on `tokens`, with more memory than it needs."""
    return compress_checkpoint(source, output, tokens(), config, **({"memory": "64GiB"} | options))


def is_stopped(output: Path) -> bool:
    """Whether there is a run to go on with."""
    return (output.parent / f".{output.name}.run" / "run.json").exists()


def run(
    source: Path,
    output: Path,
    *,
    stop: Stop | None = None,
    seconds: float | None = None,
    file_bytes: int | None = None,
    **options: Any,
) -> tuple[int, str]:
    """One run in a process of its own, which goes on with one that was stopped.

    Args:
        source, output: folders.
        stop: where the process is killed; None for nowhere.
        seconds: after how long it is killed; None for never.
        file_bytes: how large its files may become.
        options: of `compress_checkpoint`.

    Returns:
        The exit code, 1 for what is refused and -9 for what was killed, and what is said.
    """
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    options = {"resume": is_stopped(output)} | options
    child = _PROCESSES.Process(target=_run, args=(theirs, source, output, stop, file_bytes, options))
    child.start()
    theirs.close()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    said = ours.recv() if child.exitcode == 1 else ""
    ours.close()
    assert child.exitcode is not None
    return child.exitcode, said


def _run(
    pipe: Any, source: Path, output: Path, stop: Stop | None, file_bytes: int | None, options: Mapping[str, Any]
) -> None:
    torch.set_num_threads(1)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if stop is not None:
        _prepare(stop)
    try:
        streamed(source, output, **options)
    except PifaError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


def _prepare(stop: Stop) -> None:
    """Has this process killed where `stop` says."""
    if not stop.exchanges:
        drafts._renameat2 = lambda *_: errno.ENOSYS
    if not stop.after_renames:
        _kill_at(stop)
        return
    rename, left = Path.rename, stop.after_renames

    def counted(path: Path, target: Path) -> Path:
        nonlocal left
        moved = rename(path, target)
        left -= 1
        if not left:
            _kill_at(stop)
        return moved

    Path.rename = counted  # type: ignore[method-assign]


def _kill_at(stop: Stop) -> None:
    calls = 0

    def instead(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == stop.call:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **options)

        return call

    owners = {"Path": Path, "os": os}
    for name in stop.functions:
        owner, _, attribute = name.partition(".")
        setattr(owners[owner], attribute, instead(getattr(owners[owner], attribute)))

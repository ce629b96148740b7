"""Kills saves, exports, compressions and distillations at any moment: what was there, or what is new, is whole.

    python tests/fuzz/fuzz_kills.py 1000 [SEED]

Each write replaces one model by another, or starts from nothing, in a process of its own that gets a SIGKILL, SIGTERM
or SIGINT. Half of them work as on a file system that cannot exchange two names at once. Then the same is written to the
end, and nothing else may be left. What goes wrong is printed, with its seed.
"""

import collections
import copy
import errno
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import asked
from onnx import helper
from onnx_models import low_rank_file, matrix, pifa_llama, save_graph
from pifa_compiler.export import rewrite_onnx, to_onnx
from stopped_runs import is_stopped, streamed, tokens
from tiny_models import tiny_llama
from torch import nn

from pifa_compiler import DistillConfig, PifaLinear, cli, distill, drafts
from pifa_compiler.checkpoint import save_pretrained

SECONDS = 60
"""That no write takes."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WEIGHTS = (15, 15, 1, 2, 2)
"""How often each is chosen: some take longer."""

_REPORT = "pifa_report.json"  # says how long it took

State = dict[str, bytes] | None
"""The files of a model; None for no model."""


@dataclass
class Attack:
    """One way to write.

    Attributes:
        write: puts model 0 or 1 at a place.
        name: of that place.
        versions: what comes of the two models.
        seconds: how long a write takes.
    """

    write: Callable[[int, Path], object]
    name: str
    versions: list[State]
    seconds: float


def attacks(folder: Path) -> dict[str, Attack]:
    """All of them, tried once."""
    models = [pifa_llama(), pifa_llama(intermediate_size=64)]
    dense = [folder / "dense-0", folder / "dense-1"]
    teachers = [tiny_llama(), tiny_llama(intermediate_size=64)]
    for source, model in zip(dense, teachers, strict=True):
        model.save_pretrained(source)
    apart = low_rank_file(folder / "apart.onnx", external=True)
    pair = [helper.make_node("MatMul", ["x", "V"], ["a"]), helper.make_node("MatMul", ["a", "U"], ["y"])]
    constants = [matrix("V", 24, 6), matrix("U", 6, 32)]
    inside = save_graph(folder / "inside.onnx", pair, constants, 24, {"y": 32})
    files = [apart, inside]
    layers = [nn.Sequential(PifaLinear(24, size, 6), nn.ReLU(), PifaLinear(size, 8, 4)) for size in (16, 20)]
    writes: dict[str, tuple[str, Callable[[int, Path], object]]] = {
        "save": ("m", lambda v, place: save_pretrained(copy.copy(models[v]), place, overwrite=True)),
        "rewrite": ("m.onnx", lambda v, place: rewrite_onnx(files[v], place, overwrite=True)),
        "export": ("m.onnx", lambda v, place: to_onnx(layers[v], place, torch.ones(2, 24), overwrite=True)),
        "compress": (
            "m",
            lambda v, place: streamed(dense[v], place, resume=is_stopped(place), overwrite=True),
        ),
        "distil": ("m", lambda v, place: _distilled(models[v], teachers[v], place)),
    }
    found = {}
    for kind, (name, write) in writes.items():
        (parent := folder / kind).mkdir()
        versions, seconds = [], []
        for version in (0, 1):
            started = time.perf_counter()
            assert _in_child(lambda write=write, v=version, place=parent / name: write(v, place)).ended() == 0
            seconds.append(time.perf_counter() - started)
            versions.append(state(parent, name))
        assert versions[0] != versions[1]
        found[kind] = Attack(write, name, versions, min(seconds))
    return found


def _distilled(model: nn.Module, teacher: nn.Module, place: Path) -> None:
    """Trains a model for a few steps, each of them durable, and saves it, as `pifa distill` does."""
    student, folder = copy.deepcopy(model), place.with_name(f".{place.name}.run")
    config = DistillConfig(steps=4, batches_per_step=1, save_minutes=1e-9)
    report = distill(student, teacher, tokens(), config, folder=folder, resume=is_stopped(place))
    assert report.distillation is not None
    if report.distillation.interrupted:
        raise KeyboardInterrupt  # the command saves the best so far, which would be another one every time
    save_pretrained(student, place, overwrite=True)
    drafts.delete_at_once(folder)


def state(parent: Path, name: str) -> State:
    """What is there of a model: the files of a folder, or a graph and its data."""
    place = parent / name
    if not place.exists():
        return None
    files = sorted(place.iterdir()) if place.is_dir() else sorted(parent.glob(f"{name}*"))
    return {file.name: b"" if file.name == _REPORT else file.read_bytes() for file in files}


class _Child:
    def __init__(self, pid: int) -> None:
        self.pid = pid

    def ended(self) -> int:
        """The exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _in_child(work: Callable[[], object], *, exchanges: bool = True) -> _Child:
    """Does something as the command line does, in a process of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child is where it ends by itself
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return _Child(pid)
    code = 1
    try:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        signal.signal(signal.SIGTERM, cli._stop)
        signal.signal(signal.SIGINT, cli._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        warnings.simplefilter("ignore")
        if not exchanges:
            drafts._renameat2 = lambda *_: errno.ENOSYS
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  it is said, whatever it is
        if cli._signals:  # as the command line does
            code = 130
        else:
            traceback.print_exc()
    finally:
        os._exit(code)


def one(seed: int, kind: str, attack: Attack, parent: Path) -> tuple[str, list[str]]:
    """What became of one killed write, and what is wrong with it."""
    chance, wrong = random.Random(seed), []
    place, before = parent / attack.name, state(parent, attack.name)
    if chance.random() < 0.2:
        shutil.rmtree(parent)
        parent.mkdir()
        before = None
    version = chance.randrange(2) if before is None else 1 - attack.versions.index(before)
    exchanges, sent = chance.random() < 0.5, chance.choice(SIGNALS)
    child = _in_child(lambda: attack.write(version, place), exchanges=exchanges)
    time.sleep(chance.uniform(0, 1.2 * attack.seconds))
    os.kill(child.pid, sent)
    code = child.ended()
    if code not in (0, 130, -sent):
        wrong.append(f"it ended with {code}")
    now, new = state(parent, attack.name), attack.versions[version]
    there = "old" if now == before else "new" if now == new else "other"
    in_steps = sent == signal.SIGKILL and (not exchanges or kind in ("rewrite", "export"))
    if there == "other" and not (in_steps and now is None):
        wrong.append(f"what is there is neither old nor new: {now and sorted(now)}")
    left = [path.name for path in parent.glob(".*") if path.name != f".{attack.name}.run"]
    if there == "other":
        drafts.delete_abandoned(parent)
        if state(parent, attack.name) != before:
            wrong.append("what was there is not put back")
    if (ended := _in_child(lambda: attack.write(version, place)).ended()) != 0:
        wrong.append(f"the next write ends with {ended}")
    if state(parent, attack.name) != new:
        wrong.append("the next write leaves something else")
    allowed = {attack.name} if place.is_dir() else set(new or ())
    if stray := set(os.listdir(parent)) - allowed:
        wrong.append(f"stray files: {sorted(stray)}")
    said = f"{kind}, {sent.name}: {there}{', a draft left for the next' if left else ''}"
    return said, [f"seed {seed} ({said}, exchanges {exchanges}): {each}" for each in wrong]


def run(seeds: range) -> tuple[collections.Counter[str], list[str]]:
    """What became of killed writes, and what went wrong, with its seed."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is as it was before")
    with tempfile.TemporaryDirectory() as scratch:
        ways = attacks(Path(scratch))
        for seed in seeds:
            kind = random.Random(seed).choices(list(ways), weights=WEIGHTS)[0]
            said, wrong = one(seed, kind, ways[kind], Path(scratch, kind))
            outcomes[said] += 1
            faults += wrong
            for each in wrong:
                print(each, flush=True)  # noqa: T201
    return outcomes, faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, first = asked()
    found, all_wrong = run(range(first, first + count))
    for outcome, times in sorted(found.items()):
        print(f"{times:5} {outcome}")  # noqa: T201
    print(f"{len(all_wrong)} of {count} wrong")  # noqa: T201
    sys.exit(bool(all_wrong))

"""Several processes share a run, started by torchrun as users do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from expert_models import tiny_mixtral
from tiny_models import tiny_llama

import pifa_compiler as pc
from pifa_compiler.processes import Processes

CONFIG = {"density": 0.6, "rank_multiple": 1}
REFINED = CONFIG | {"refine": 6}
SCRIPT = f"""
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import pifa_compiler as pc
from pifa_compiler.processes import joined
import os

if __name__ == "__main__":
    folder, resume = sys.argv[1], "resume" in sys.argv
    batches = torch.load(f"{{folder}}/batches.pt")

    def tell(done, total, what):
        print(os.getpid(), what, flush=True)

    with joined(os.environ, torch.device("cpu")):
        config = pc.CompressConfig(**{CONFIG!r})
        pc.compress_checkpoint(
            f"{{folder}}/dense", f"{{folder}}/two", batches, config, memory="4GiB", resume=resume, progress=tell
        )
        if "refined" in sys.argv:
            config = pc.CompressConfig(**{REFINED!r})
            pc.compress_checkpoint(f"{{folder}}/dense", f"{{folder}}/two-refined", batches, config, memory="4GiB")
"""


def torchrun(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(folder / "script.py"), str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a dense model, and calibration windows that are too few for one process of two to see all."""
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    torch.save([torch.randint(0, 64, (1, 48)) for _ in range(3)], tmp_path / "batches.pt")
    return tmp_path


def ranks_of(folder: Path) -> dict[str, int]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, int] = config["quantization_config"]["ranks"]
    return found


def compare(folder: Path) -> None:
    batches = torch.load(folder / "batches.pt")
    pc.compress_checkpoint(folder / "dense", folder / "one", batches, pc.CompressConfig(**CONFIG), memory="4GiB")
    assert ranks_of(folder / "two") == ranks_of(folder / "one")
    one, two = (pc.load_pretrained(folder / name).state_dict() for name in ("one", "two"))
    for name, wanted in one.items():
        # Sums in float64 in another order: 1e-16, grown by damped inverses (1e-3 each) and by what two singular values
        # next to each other make of it. Sums in float32 would leave 1e-4 and more.
        difference = float((two[name] - wanted).double().norm())
        assert difference <= 1e-6 * float(wanted.double().norm()), f"{name}: {difference}"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def compare_refined(folder: Path) -> None:
    """Gradients are added up in another order, in float32; where one is next to 0, steps are as long as elsewhere."""
    batches = torch.load(folder / "batches.pt")
    config = pc.CompressConfig(**REFINED)
    report = pc.compress_checkpoint(folder / "dense", folder / "one-refined", batches, config, memory="4GiB")
    assert any(note.startswith("refined") for layer in report.factorized for note in layer.notes)
    start, one, two = (pc.load_pretrained(folder / n).state_dict() for n in ("one", "one-refined", "two-refined"))
    first = [name for name in one if "layers.0.self_attn" in name and name.endswith(("w_pivot", "coeff"))]
    for name in first:  # what comes behind them was solved with other inputs
        moved, apart = float((one[name] - start[name]).norm()), float((two[name] - one[name]).norm())
        assert apart <= 0.05 * moved, f"{name}: {apart} of {moved}"
    assert any(not torch.equal(one[name], start[name]) for name in first)


@pytest.mark.timeout(280)
def test_two_processes_make_what_one_makes(model: Path) -> None:
    with torchrun(model, "refined") as process:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    compare(model)
    compare_refined(model)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_processes_make_the_same_experts(model: Path) -> None:
    tiny_mixtral().save_pretrained(model / "dense")
    with torchrun(model) as process:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert any(".experts." in name for name in pc.load_pretrained(model / "two").state_dict())
    compare(model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_dies_ends_the_run_within_a_minute_and_the_run_goes_on(model: Path) -> None:
    with torchrun(model) as process:
        assert process.stdout is not None
        # A line of the sweep: results are on disk.
        words = next(line.split() for line in process.stdout if "weight" in line)
        os.kill(int(words[-2]), signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=120)
        assert time.monotonic() - started < 60
        assert process.returncode != 0
    assert not (model / "two").exists()
    with torchrun(model, "resume") as process:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    compare(model)


def test_a_process_alone_waits_for_nobody() -> None:
    alone = Processes()
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
    assert list(alone.own(3)) == [0, 1, 2]
    x = torch.ones(2)
    assert alone.sum({"x": x})["x"] is x
    assert alone.gather("y") == ["y"]
    alone.wait()

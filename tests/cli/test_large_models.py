"""`pifa compress --memory`: models in files, runs that are stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner, Result

from pifa_compiler import cli

SHORT = ("--seqlen", "32", "--samples", "4", "--rank-multiple", "1", "--json")
STREAMED = (*SHORT, "--memory", "64GiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(f"w{i * i % 61}" for i in range(400)))
    return file


@pytest.fixture(scope="module")
def loaded(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pifa compress` makes of the model without --memory."""
    folder = tmp_path_factory.mktemp("compressed") / "pifa"
    assert pifa("compress", model, "-o", folder, "--data", text, *SHORT).exit_code == 0
    return folder


def pifa(*arguments: object) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_same_model(folder: Path, other: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_model_in_files_becomes_what_it_becomes_in_memory(model, text, loaded, tmp_path):
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, *STREAMED)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["planned_bytes"] == 64 << 30
    assert report["output"] == str(tmp_path / "out")
    assert_same_model(tmp_path / "out", loaded)
    assert os.listdir(tmp_path) == ["out"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(model, text, tmp_path):
    plan = ("compress", model, "-o", tmp_path / "out", "--data", text, *STREAMED, "--dry-run")
    result = pifa(*plan)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["memory"] == 64 << 30
    assert 0 < found["needs"]["process"] < found["least_memory"] < found["memory"]
    for_people = pifa(*(argument for argument in plan if argument != "--json"))
    assert for_people.exit_code == 0
    assert "memory" in for_people.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--memory", "1MiB"), 1, "give "),
        (("--memory", "plenty"), 1, "wanted a size such as 8GiB"),
        (("--resume",), 1, "holds no run to go on with"),
        (("--memory", "64GiB", "--data", "self"), 2, "needs the model in memory"),
        (("--memory", "64GiB", "--offload", "/proc/x"), 1, "/proc/x"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(options, code, words, model, text, tmp_path):
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT, *options)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert code == 2 or result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_run_that_a_signal_stops_goes_on(number, code, words, model, text, loaded, tmp_path):
    slow = (
        "import sys, time; from pifa_compiler import cli\n"
        "from pifa_compiler.reconstruction.working_folder import WorkingFolder\n"
        "usual, done = WorkingFolder.add_group, []\n"
        "def add_group(*args):\n"
        "    usual(*args); done.append(args)\n"
        "    if len(done) == 2: print('two groups', file=sys.stderr, flush=True); time.sleep(60)\n"
        "WorkingFolder.add_group = add_group\n"
        "cli.main()\n"
    )
    arguments = [str(each) for each in ("compress", model, "-o", tmp_path / "out", "--data", text, *STREAMED)]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", slow, *arguments],  # no other version of the package from where tests are run
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in background jobs
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "two groups\n"
        process.send_signal(number)
        out, said = process.communicate(timeout=100)
    assert (process.returncode, out, said) == (code, "", words)
    assert os.listdir(tmp_path) == [".out.run"]
    result = pifa(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_model(tmp_path / "out", loaded)
    assert os.listdir(tmp_path) == ["out"]

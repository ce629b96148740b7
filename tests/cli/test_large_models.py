"""`pifa compress --memory`: models in files, runs that are stopped and gone on with."""

import json
import os
import signal
from pathlib import Path

import pytest
from command_line import SHORT, pifa, run_python

STREAMED = (*SHORT, "--json", "--memory", "64GiB")


def assert_same_model(folder: Path, other: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_model_in_files_becomes_what_it_becomes_in_memory(model, text, compressed, tmp_path):
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, *STREAMED)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["planned_bytes"] == 64 << 30
    assert report["output"] == str(tmp_path / "out")
    assert_same_model(tmp_path / "out", compressed)
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
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT, "--json", *options)
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
def test_a_run_that_a_signal_stops_goes_on(number, code, words, model, text, compressed, tmp_path):
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
    # -P: no other version of the package from where tests are run
    with run_python("-P", "-c", slow, *arguments) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "two groups\n"
        process.send_signal(number)
        out, said = process.communicate(timeout=100)
    assert (process.returncode, out, said) == (code, "", words)
    assert os.listdir(tmp_path) == [".out.run"]
    result = pifa(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_model(tmp_path / "out", compressed)
    assert os.listdir(tmp_path) == ["out"]

"""Command lines that name what is damaged, hostile or not there: exit code 1 or 2, one line, no traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run_python
from tiny_models import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from pifa_compiler import cli, interrupts
from pifa_compiler.errors import CheckpointError

DEEP = "[" * 100_000
LONG = "y" * 5000
SHORT = ("--seqlen", "32", "--samples", "2")
NOT_UTF8 = b"w1 \xff".decode(errors="surrogateescape")
LAYER = ("bench", "layer", "--dims", "16", "--tokens", "1", "--dtype", "fp32", "--seconds", "0")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "words.txt").write_text(" ".join(f"w{i % 61}" for i in range(300)))
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be damaged, called `dense` in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return shutil.copytree(sound, tmp_path / "dense")


def assert_refused(*arguments: str, said: str = "") -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if result.exit_code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "dense", "-o", "~nosuchuser/x", "--data", "dense/words.txt"), "a user who is not there"),
        (("compress", "~nosuchuser/x", "-o", "out", "--data", "dense/words.txt"), "a user who is not there"),
        (("compress", "dense", "-o", LONG, "--data", "dense/words.txt"), "too long"),
        (("compress", "dense", "-o", "out", "--data", "dense/words.txt", "--rank", f"*={'9' * 5000}"), "PATTERN=RANK"),
        (("demo", "-o", "~nosuchuser/x"), "a user who is not there"),
        (("export", "dense", "-o", "~nosuchuser/x.onnx"), "a user who is not there"),
        (("export", "~nosuchuser/x.onnx", "-o", "x.onnx", "--from-onnx"), "a user who is not there"),
        (("export", "dense", "-o", f"{LONG}.onnx"), "too long"),
        (("eval", "dense", "--data", "~nosuchuser/x.txt"), "a user who is not there"),
        (("eval", "dense", "--data", f"{LONG}.txt"), "too long"),
        (("eval", LONG), "too long"),
        (("inspect", LONG), "too long"),
        (("bench", "model", "~nosuchuser/x"), "a user who is not there"),
        (("bench", "model", LONG), "too long"),
        (("generate", "dense", NOT_UTF8), "not UTF-8"),
        ((*LAYER, "--threads", "99999"), "1024"),
        ((*LAYER, "--threads", "9" * 30), "1024"),
        (("bench", "layer", "--dims", "9" * 5000), "from 2 to 65536"),
        (("bench", "onnx", "--threads", "99999"), "from 1 to 1024"),
        (("compare", "dense", "--data", "pydoc", "-o", LONG, *SHORT), "too long"),
        (("compare", "dense", "--data", "pydoc", "-o", "/dev/null", *SHORT), "is a device or pipe"),
        (("compare", "dense", "--data", "pydoc", "--plot", "/proc/x.png", *SHORT), "cannot be written"),
        ((*LAYER, "--plot", "nothing/x.png"), "cannot be written"),
        ((*LAYER, "--csv", "nothing/x.csv"), "cannot be written"),
        ((*LAYER, "--csv", "dense"), "cannot be written"),
        (("compress", "dense", "-o", ".", "--data", "dense/words.txt", "--force"), "name a new folder in it"),
        (("compress", "dense", "-o", "..", "--data", "dense/words.txt"), "name a new folder in it"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_odd_command_lines_are_refused(arguments: tuple[str, ...], said: str) -> None:
    assert_refused(*arguments, said=said)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_text_that_cannot_be_parsed_is_refused(suffix: str) -> None:
    Path(f"text{suffix}").write_text(DEEP)
    assert_refused("eval", "dense", "--data", f"text{suffix}", *SHORT[:2])


@pytest.mark.usefixtures("model")
def test_rows_that_cannot_be_parsed_are_refused() -> None:
    Path("rows.json").write_text(DEEP)
    assert_refused("compare", "dense", "-o", "rows.json", said="no rows of `pifa compare`")


@pytest.mark.parametrize(
    "content", ['{"model": ' + DEEP, '{"tokenizer_class": 7}', "{", "[]"], ids=lambda text: text[:20]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_with_json_that_cannot_be_read_is_refused(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    assert_refused("generate", "dense", "w1")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3},
        {"hidden_act": 7},
        {"head_dim": 0},
        {"num_hidden_layers": 10**9},
        {"hidden_size": "x"},
    ],
    ids=str,
)
def test_a_dense_model_whose_config_is_damaged_is_refused(changes: dict[str, object], model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert_refused("generate", "dense", "w1")


def test_a_config_that_no_random_weights_can_be_made_of_is_refused(model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 3}))
    assert_refused("bench", "model", "dense")


def test_code_of_another_repository_is_fetched_only_if_remote_code_is_allowed(model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_attn_implementation": "owner/kernel"}))
    assert_refused("generate", "dense", "w1", said="code that would be fetched and run")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, model: Path) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert_refused("generate", "dense", "w1", said="is no file")


def test_rows_that_cannot_be_written_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pifa_compiler.bench import layer

    times = {f"{name}_ms": 1.0 for name in ("dense", "lowrank", "plain", "pifa")}
    fields = layer.LayerRow.__dataclass_fields__.values()
    row = layer.LayerRow(**{each.name: times.get(each.name, 1) for each in fields if each.init})
    monkeypatch.setattr(layer, "layer_rows", lambda *_, **__: [row])
    for file in ("/proc/x", "/dev/full"):
        assert_refused(*LAYER, "--csv", file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "pifa_compiler", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (run.returncode, run.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("program", "module"),
    [(("-m", "pifa_compiler"), "numpy"), (("-m", "pifa_compiler"), "pifa_compiler.cli"), (("pifa",), "numpy")],
    ids=str,
)
def test_ctrl_c_while_a_package_is_imported_is_one_line(program: tuple[str, ...], module: str, tmp_path: Path) -> None:
    at_import = f"""
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
    (tmp_path / "sitecustomize.py").write_text(at_import)
    (tmp_path / "pifa").write_text("from pifa_compiler.__main__ import main\nmain()")
    with run_python(*program, "inspect", "nothing-here", cwd=tmp_path, PYTHONPATH=str(tmp_path)) as run:
        out, said = run.communicate()
    assert (run.returncode, said, out) == (130, "interrupted\n", "")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts this process's handlers of signals back; until then Ctrl-C is Python's, also in a job of the background."""
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in known.items():
        signal.signal(number, handler)
    cli._signals.clear()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("error", [None, TypeError, CheckpointError])
def test_a_signal_is_one_line_whatever_a_library_makes_of_it(
    sent: int,
    code: int,
    said: str,
    error: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), sent)
        except KeyboardInterrupt as interrupt:
            raise (error or KeyboardInterrupt)("as numpy makes one") from interrupt

    monkeypatch.setattr("pifa_compiler.checkpoint.inspect.inspect", stopped)
    monkeypatch.setattr(sys, "argv", ["pifa", "inspect", "folder"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (code, f"{said}\n")


def test_programs_that_import_the_package_keep_their_way_with_ctrl_c() -> None:
    assert signal.getsignal(signal.SIGINT) is not interrupts._end

"""Gives `pifa` odd command lines: each ends with code 0, 1 or 2, what is refused in one line, and nothing is damaged.

    python tests/fuzz/fuzz_command_lines.py 200 [SEED]

prints the seed, and every command line that was answered otherwise; it goes on until so many were refused. A command
line is a sound one of any verb with values, options and arguments exchanged, added or left out.
"""

import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
import transformers
import typer
from typer.testing import CliRunner

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import asked
from onnx_models import low_rank_file, pifa_llama
from tiny_models import tiny_llama, tiny_tokenizer

from pifa_compiler import cli
from pifa_compiler.checkpoint import save_pretrained

SECONDS = 60

TEXT = ("--data", "words.txt", "--seqlen", "32")
SOUND = (
    ("compress", "dense", "-o", "out", "--density", "0.6", *TEXT, "--samples", "2"),
    ("compress", "dense", "-o", "out", "--memory", "64GiB", *TEXT, "--samples", "2", "--offload", "work"),
    ("distill", "pifa", "--teacher", "dense", "-o", "out", "--steps", "1", *TEXT, "--windows-per-step", "1"),
    ("eval", "pifa", *TEXT, "--windows", "1"),
    ("generate", "pifa", "w1 w2", "--max-new-tokens", "2"),
    ("inspect", "pifa", "--verify"),
    ("export", "pifa", "-o", "out.onnx"),
    ("export", "low.onnx", "-o", "out.onnx", "--from-onnx"),
    ("compare", "dense", "-o", "rows.json", "--densities", "0.5", "--methods", "svd", "--windows", "1", *TEXT),
    ("bench", "layer", "--dims", "16", "--tokens", "1", "--dtype", "fp32", "--seconds", "0", "--csv", "rows.csv"),
    ("bench", "model", "pifa", "--prompt-tokens", "2", "--decode-context", "2", "--seconds", "0", "--repeats", "1"),
    ("bench", "onnx", "--dims", "16", "--tokens", "1", "--threads", "1", "--seconds", "0"),
    ("demo", "-o", "pifa"),
)

ODD = (
    "", " ", "-", "--", "-1", "0", "1", "3", "1e999", "-1e999", "nan", "inf", "9" * 5000, "1" * 30, "0x10", "1_0", "x",
    "x" * 300, "x/" * 2000, "~nosuchuser/x", "~", "*", "[", "(", "{}", "=", "*=", "*=1", "=1", "*=-1", "*=99999", "\n",
    "é", b"\xff".decode(errors="surrogateescape"), "a,b", ",", "1,,2", "8GiB", "8XiB", "-8GiB", "1e400GiB", "cuda:99",
    "cpu", "meta", ".", "./", "words.txt", "dense", "pifa", "low.onnx", "dense/config.json", "pipe", "circle", "broken",
    "deep.json", "deep.jsonl", "empty.txt", "bytes.txt", "bytes.parquet", "bytes.onnx", "bytes.gguf", "nothing/there",
    "nothing.txt", "x.onnx", "x.csv", "x.png", "x.svg", "/dev/full", "/dev/null", "/dev/zero", "/proc/x",
    "/proc/self/mem", "owner/name", "owner/name/x", "../x", "svd", "two-sided+owl", "wanda-2:4", "+", "fp16",
    "pickle.bin",
)  # fmt: skip


def prepare() -> None:
    """Models, texts and damaged files in the current folder."""
    tokenizer = tiny_tokenizer(model_max_length=128)
    tiny_llama().save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    save_pretrained(pifa_llama(), "pifa", tokenizer=tokenizer)
    low_rank_file(Path("low.onnx"))
    Path("words.txt").write_text(" ".join(f"w{i % 61}" for i in range(900)))
    for name in ("deep.json", "deep.jsonl"):
        Path(name).write_text("[" * 100_000)
    Path("empty.txt").touch()
    for suffix in (".txt", ".parquet", ".onnx", ".gguf"):
        Path(f"bytes{suffix}").write_bytes(random.Random(0).randbytes(3000))
    Path("pickle.bin").write_bytes(b"\x80\x04N.")
    os.mkfifo("pipe")
    Path("circle").symlink_to("circle")
    shutil.copytree("pifa", "broken")
    os.truncate("broken/model.safetensors", 1000)


def content(folder: Path) -> dict[str, bytes]:
    """What must not change: all files that were prepared."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def odd(seed: int) -> list[str]:
    """A command line."""
    chance = random.Random(seed)
    line = list(chance.choice(SOUND))
    verb = 2 if line[0] == "bench" else 1
    options = list(_options(tuple(line[:verb])))
    for _ in range(chance.choice((1, 1, 2, 3))):
        what = chance.choice(("exchange",) * 6 + ("add",) * 4 + ("drop", "repeat", "unknown"))
        place = chance.randrange(verb, len(line) + 1)
        if what == "exchange" and place < len(line):
            line[place] = chance.choice(ODD)
        elif what == "add":
            name, takes_value = chance.choice(options)
            line += [name, chance.choice(ODD)] if takes_value else [name]
        elif what == "drop" and place < len(line):
            del line[place]
        elif what == "repeat" and place < len(line):
            line.insert(place, line[place])
        elif what == "unknown":
            line.insert(place, chance.choice(("--no-such-option", "-z", chance.choice(ODD))))
    return line


def _options(verb: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Names of a verb's options, and whether each takes a value."""
    command = typer.main.get_command(cli.app)
    for name in verb:
        command = command.commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.param_type_name == "option" and "--build-native" not in parameter.opts:
            for name in parameter.opts:
                yield name, not parameter.is_flag  # type: ignore[attr-defined]


def attempt(line: list[str]) -> tuple[int, str | None]:
    """The exit code of a command line, and what is wrong with the answer."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(action="ignore"):
            result = CliRunner().invoke(cli.app, line)
    finally:
        signal.alarm(0)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"
    if result.exit_code not in (0, 1, 2):
        return result.exit_code, "exit code"
    if "Traceback" in result.output:
        return result.exit_code, f"a traceback: {result.output[-300:]}"
    if result.exit_code == 1 and not (result.stderr.startswith("error: ") and result.stderr.count("\n") == 1):
        return 1, f"not one line: {result.stderr[-500:]!r}"
    if result.exit_code and result.stdout:
        return result.exit_code, f"standard output: {result.stdout[:200]!r}"
    return result.exit_code, None


def run(count: int, first: int) -> tuple[collections.Counter[int], list[str]]:
    """Exit codes of command lines from a seed on, until `count` were refused; and what went wrong, with its seed."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    codes: collections.Counter[int] = collections.Counter()
    faults = []
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch, "sound")
        sound.mkdir()
        with contextlib.chdir(sound):
            prepare()
        wanted = content(sound)
        seed = first
        while codes[1] + codes[2] < count:
            work = Path(scratch, "a", "b", "work")  # some levels deep, for lines that name the folder above
            shutil.copytree(sound, work, symlinks=True, ignore=lambda *_: ["pipe"])
            os.mkfifo(work / "pipe")
            line = odd(seed)
            with contextlib.chdir(work):
                code, wrong = attempt(line)
            codes[code] += 1
            now = content(work)
            changed = [name for name in wanted if now.get(name) != wanted[name] and name != "empty.txt"]
            if changed and "--force" not in line:
                wrong = f"{wrong or ''} changed: {changed}"
            if left := [path for path in now if ".pifa-" in path]:
                wrong = f"{wrong or ''} left: {left}"
            if wrong:
                faults.append(f"seed {seed}: {[part[:60] for part in line]}: {wrong}")
                print(faults[-1], flush=True)  # noqa: T201
            shutil.rmtree(Path(scratch, "a"))
            seed += 1
    return codes, faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    found, all_wrong = run(*asked())
    print(f"exit codes {dict(found)}, {len(all_wrong)} wrong")  # noqa: T201
    sys.exit(bool(all_wrong))

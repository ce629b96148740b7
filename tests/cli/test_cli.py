"""The command line, on a tiny model: what it prints, what it refuses, and what it leaves behind."""

import errno
import json
import os
import signal
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import SHORT, pifa, refusal, run_python
from tiny_models import tiny_llama, tiny_tokenizer

from pifa_compiler import LayerReport
from pifa_compiler.cli import tables
from pifa_compiler.cli.output import print_json
from pifa_compiler.device import device_name, find_device
from pifa_compiler.report import Report

VERBS = ("compress", "compare", "eval", "generate", "inspect", "demo")


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, said = process.communicate(timeout=200)
    return process.returncode, out, said


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damaged_copy(model: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a saved model with some of its tensors replaced."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**state, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_compress_prints_what_it_did_and_what_to_do_next(model: Path, text: Path, tmp_path: Path) -> None:
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, "--skip", "*.k_proj", *SHORT)
    assert result.exit_code == 0, result.stderr
    for line in ("0.5 asked", "12 in PIFA form, 3 left dense", "skipped by pattern '*.k_proj'", "tied to an embedding"):
        assert line in result.stdout
    assert f"pifa eval {tmp_path / 'out'} --data {text}" in result.stdout
    assert "AutoModelForCausalLM.from_pretrained" in result.stdout
    assert left_in(tmp_path) == ["out"]
    assert {"model.safetensors", "tokenizer.json", "pifa_report.json"} <= set(left_in(tmp_path / "out"))


def test_compress_as_json_prints_one_object_with_the_keys_that_scripts_read(
    model: Path, text: Path, tmp_path: Path
) -> None:
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, "--rank", "*.o_proj=5", "--json", *SHORT)
    found = json.loads(result.stdout)
    assert found.keys() >= {"density_requested", "density", "params_before", "params_after", "seconds", "layers"}
    assert found["density_requested"] == 0.5
    assert found["device"] == device_name(find_device())
    assert found["density"] <= 0.5
    assert found["params_after"] < found["params_before"] == sum(p.numel() for p in tiny_llama().parameters())
    ranks = {layer["name"]: layer["rank"] for layer in found["layers"]}
    assert ranks["model.layers.0.self_attn.o_proj"] == 5


def test_the_defaults_are_those_that_the_help_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)  # none is broken over two lines
    shown = " ".join(pifa("compress", "--help").stdout.replace("│", " ").split())
    for default in ("0.5", "two-sided", "0.25", "gradients", "0.001", "pydoc", "32", "128", "2048", "0"):
        assert f"[default: {default}]" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_ends_in_an_example(verb: str) -> None:
    result = pifa(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: pifa {verb}" in result.stdout


def test_the_version_is_printed() -> None:
    result = pifa("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("pifa-compiler 0.")


def test_inspect_shows_shapes_ranks_numbers_and_reasons(compressed: Path) -> None:
    result = pifa("inspect", compressed)
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "layers.0.mlp.up_proj" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:5] == ["48 x 32", "10", "1,536", "710"]
    assert "in bf16" in result.stdout
    assert "weight is tied to an embedding" in result.stdout
    assert "0.5 asked" in result.stdout


def test_inspect_as_json_adds_up(compressed: Path) -> None:
    found = json.loads(pifa("inspect", compressed, "--json").stdout)
    assert len(found["layers"]) == 15
    assert found["stored_after"] == sum(layer["stored_after"] for layer in found["layers"]) < found["stored_before"]
    in_pifa_form = [layer for layer in found["layers"] if layer["rank"] is not None]
    assert len(in_pifa_form) == 14
    assert all(layer["error"] > 0 for layer in in_pifa_form)
    for name in ("max_coeff", "bf16_error"):
        assert found[name] == max(layer[name] for layer in in_pifa_form)
        assert [layer[name] for layer in found["layers"] if layer["rank"] is None] == [None]
    tensors = safetensors.torch.load_file(compressed / "model.safetensors")
    for layer in in_pifa_form:
        w_pivot, coeff = (tensors[f"{layer['name']}.{part}"] for part in ("w_pivot", "coeff"))
        exact = torch.cat((w_pivot, coeff @ w_pivot))
        rounded = torch.cat((w_pivot.bfloat16().float(), coeff.bfloat16().float() @ w_pivot.bfloat16().float()))
        error = float((rounded - exact).norm() / exact.norm())
        assert 0.7 * error < layer["bf16_error"] < 1.4 * error  # 16 probes know a norm to 1 / sqrt(2 * 16)


def test_inspect_reads_shapes_from_the_tensors_where_there_is_no_report(compressed: Path, tmp_path: Path) -> None:
    folder = damaged_copy(compressed, tmp_path / "bare")
    (folder / "pifa_report.json").unlink()
    found = json.loads(pifa("inspect", folder, "--json").stdout)
    assert len(found["layers"]) == 14
    assert {tuple(layer["shape"]) for layer in found["layers"]} == {(32, 32), (16, 32), (48, 32), (32, 48)}
    assert all(layer["error"] is None for layer in found["layers"])


def test_inspect_refuses_a_damaged_report_and_a_dense_model(compressed: Path, model: Path, tmp_path: Path) -> None:
    folder = damaged_copy(compressed, tmp_path / "bad")
    (folder / "pifa_report.json").write_text('{"layers": [{"name": "x"}]}')
    assert "pifa_report.json is damaged" in refusal(pifa("inspect", folder))
    assert "is not a PIFA model" in refusal(pifa("inspect", model))
    assert "does not exist" in refusal(pifa("inspect", tmp_path / "none"))


@pytest.mark.parametrize(
    "change",
    [
        {"notes": 7}, {"notes": [7]}, {"shape": "48x32"}, {"shape": ["48", "32"]}, {"shape": [48]}, {"name": 7},
        {"name": ["x"]}, {"rank": "10"}, {"error": "small"}, {"skipped": 7}, {"stored_before": None}, {"quality": 7},
    ],
    ids=str,
)  # fmt: skip
def test_inspect_refuses_an_odd_entry_of_a_report(change: dict[str, object], compressed: Path, tmp_path: Path) -> None:
    folder = damaged_copy(compressed, tmp_path / "odd")
    report = json.loads((folder / "pifa_report.json").read_text())
    report["layers"][0].update(change)
    (folder / "pifa_report.json").write_text(json.dumps(report))
    assert "pifa_report.json is damaged" in refusal(pifa("inspect", folder))


def test_inspect_shows_notes_as_they_are(compressed: Path, tmp_path: Path) -> None:
    folder = damaged_copy(compressed, tmp_path / "odd")
    report = json.loads((folder / "pifa_report.json").read_text())
    report["layers"][0]["notes"] = ["[/red] is no markup"]
    (folder / "pifa_report.json").write_text(json.dumps(report))
    assert "[/red]" in pifa("inspect", folder).stdout


def test_inspect_refuses_tensors_of_eight_bits(compressed: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.coeff"
    odd = torch.zeros(38, 10, dtype=torch.float8_e4m3fn)
    assert "float8_e4m3fn" in refusal(pifa("inspect", damaged_copy(compressed, tmp_path / "odd", **{name: odd})))


def test_inspect_verifies_checksums_if_asked(compressed: Path, tmp_path: Path) -> None:
    assert pifa("inspect", compressed, "--verify").exit_code == 0
    odd = damaged_copy(compressed, tmp_path / "odd", **{"model.norm.weight": torch.zeros(32)})
    assert pifa("inspect", odd).exit_code == 0
    assert "model.norm.weight first" in refusal(pifa("inspect", odd, "--verify"))


def test_eval_measures_the_perplexity_of_dense_and_compressed(model: Path, compressed: Path, text: Path) -> None:
    for folder in (model, compressed):
        result = pifa("eval", folder, "--data", text, "--seqlen", "32", "--windows", "3", "--json")
        found = json.loads(result.stdout)
        assert found.keys() == {"perplexity", "tokens", "windows", "seqlen", "device"}
        assert found["perplexity"] > 1
        assert (found["tokens"], found["windows"], found["seqlen"]) == (93, 3, 32)
    assert pifa("eval", model, "--data", text, "--seqlen", "32").stdout.startswith("perplexity ")


def test_generate_writes_the_same_text_eager_and_compiled(compressed: Path) -> None:
    words = ("generate", compressed, "w1 w2 w3", "--max-new-tokens", "12", "--json")
    eager, compiled = (json.loads(pifa(*words, *extra).stdout) for extra in ((), ("--compile",)))
    assert eager["text"] == compiled["text"] != ""
    assert eager["tokens"] == compiled["tokens"] <= 12
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    assert pifa("generate", compressed, "w1 w2", "--max-new-tokens", "2").stdout.startswith("w1 w2")


def test_generate_is_what_transformers_generates(compressed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(compressed), AutoTokenizer.from_pretrained(compressed)
    tokens = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    wanted = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, 3:]
    found = json.loads(pifa("generate", compressed, "w1 w2 w3", "--max-new-tokens", "12", "--json").stdout)
    assert found["text"] == tokenizer.decode(wanted, skip_special_tokens=True)


def test_generate_refuses_a_prompt_that_is_empty_or_too_long(compressed: Path) -> None:
    assert "empty" in refusal(pifa("generate", compressed, " "), code=2)
    assert "lower --max-new-tokens" in refusal(pifa("generate", compressed, "w1", "--max-new-tokens", "128"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--density", "0"), "density must be a number in (0, 1], got 0"),
        (("--density", "1.5"), "density must be a number in (0, 1], got 1.5"),
        (("--density", "abc"), "--density"),
        (("--density", "nan"), "density must be a number in (0, 1], got nan"),
        (("--method", "magic"), "'magic' is not one of"),
        (("--mix", "2"), "mix must be a number in [0, 1], got 2"),
        (("--damping", "-1"), "damping must be a number 0 or more"),
        (("--gradient-damping", "0"), "gradient_damping must be a number 1e-6 or more"),
        (("--rank", "q_proj"), "--rank takes PATTERN=RANK"),
        (("--rank", "q_proj=0"), "must be an integer of 1 or more, got 0"),
        (("--rank-multiple", "0"), "--rank-multiple"),
        (("--samples", "0"), "--samples"),
        (("--seqlen", "1"), "--seqlen"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--dtype", "int4"), "'int4' is not one of"),
        (("--no-such-option",), "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_usage_is_exit_code_2_before_anything_is_read(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    shown = refusal(pifa("compress", "no-such-model", "-o", tmp_path / "out", *options), code=2)
    assert said in " ".join(shown.replace("│", " ").split())
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("arguments", [("compress", "x"), ("generate", "x"), ("frobnicate",)], ids=" ".join)
def test_a_missing_argument_or_verb_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    refusal(pifa(*arguments), code=2)


def test_an_output_folder_that_exists_asks_for_force(model: Path, text: Path, compressed: Path, tmp_path: Path) -> None:
    out = damaged_copy(compressed, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    arguments = ("compress", model, "-o", out, "--data", text, "--density", "0.4", *SHORT)
    assert "--force" in refusal(pifa(*arguments))
    assert (out / "model.safetensors").read_bytes() == before
    assert pifa(*arguments, "--force").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert left_in(tmp_path) == ["out"]


def test_a_destination_that_cannot_be_written_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(pifa("compress", "no-such-model", "-o", tmp_path / "file" / "out"))


def test_an_unwritable_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a superuser may write anywhere
    assert "is not writable" in refusal(pifa("compress", "no-such-model", "-o", tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "said"), [("", "holds no text"), ("w1 w2 w3", "the text has 3 tokens")], ids=["empty", "too-short"]
)
def test_an_empty_or_short_text_is_refused(content: str, said: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(content)
    assert said in refusal(pifa("compress", model, "-o", tmp_path / "out", "--data", file, *SHORT))
    assert said in refusal(pifa("eval", model, "--data", file, "--seqlen", "32"))
    assert left_in(tmp_path) == ["text.txt"]


def test_a_missing_text_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no file" in refusal(pifa("compress", "no-such-model", "-o", out, "--data", tmp_path / "no.txt"))
    assert "no known text source" in refusal(pifa("eval", "no-such-model", "--data", "tea-leaves"))
    assert '"self"' in refusal(pifa("eval", "no-such-model", "--data", "self"))


def test_windows_longer_than_the_model_takes_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    result = pifa("compress", model, "-o", tmp_path / "out", "--data", text)
    assert "at most 128 tokens at once, got windows of 2048; lower --seqlen" in refusal(result)


def test_a_weight_that_is_not_finite_is_refused_by_name(model: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = damaged_copy(model, tmp_path / "bad", **{name: torch.full((48, 32), torch.nan)})
    said = refusal(pifa("compress", bad, "-o", tmp_path / "out", "--data", text, *SHORT))
    assert name in said
    assert "NaN" in said
    assert left_in(tmp_path) == ["bad"]


def test_a_model_that_is_in_pifa_form_already_has_nothing_left_to_compress(
    compressed: Path, text: Path, tmp_path: Path
) -> None:
    said = refusal(pifa("compress", compressed, "-o", tmp_path / "out", "--data", text, *SHORT))
    assert "left to compress" in said
    assert left_in(tmp_path) == []


def test_pickles_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    pickle = tmp_path / "pytorch_model.bin"
    torch.save({}, pickle)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    tiny_tokenizer().save_pretrained(tmp_path)
    for offered in (pickle, tmp_path):
        said = refusal(pifa("compress", offered, "-o", tmp_path / "out", "--data", text, *SHORT))
        assert "pickle" in said


def test_a_tokenizer_with_more_words_than_the_model_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    folder = damaged_copy(model, tmp_path / "other")
    tiny_tokenizer(("<s>", "</s>", "<unk>", *(f"w{i}" for i in range(90)))).save_pretrained(folder)
    for arguments in (("compress", folder, "-o", tmp_path / "out", "--data", text), ("generate", folder, "w1")):
        assert "largest id is 92, but the model has 64 embedding rows" in refusal(pifa(*arguments))


def test_a_pattern_that_matches_nothing_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    said = refusal(pifa("compress", model, "-o", tmp_path / "out", "--data", text, "--skip", "*.qproj", *SHORT))
    assert "q_proj" in said


def test_an_interrupt_leaves_nothing_behind(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in (
        "pifa_compiler.reconstruction.sweep.Sweep.run",
        "transformers.PreTrainedTokenizerFast.save_pretrained",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            result = pifa("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT)
        assert result.exit_code == 130
        assert result.stderr == "interrupted\n"
        assert left_in(tmp_path) == []


def test_ctrl_c_ends_the_program_with_code_130_and_no_half_folder(model: Path, text: Path, tmp_path: Path) -> None:
    slow = (
        "import sys, time; from pifa_compiler import cli\nfrom pifa_compiler.reconstruction import sweep\n"
        "sweep.Sweep.run = lambda *_, **__: (print('sweeping', file=sys.stderr, flush=True), time.sleep(60))\n"
        "cli.main()\n"
    )
    arguments = ("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT)
    process = run_python("-c", slow, *arguments)
    assert process.stderr is not None
    assert process.stderr.readline() == "sweeping\n"
    process.send_signal(signal.SIGINT)
    assert finished(process) == (130, "", "interrupted\n")
    assert left_in(tmp_path) == []


def test_a_full_disk_is_explained_and_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", fill)
    said = refusal(pifa("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT))
    assert "no space left" in said
    assert left_in(tmp_path) == []


def test_stdout_is_json_alone_when_libraries_print_and_warn(model: Path, text: Path) -> None:
    noisy = (
        "import warnings, pifa_compiler.hf.text as c\n"
        "usual = c.tokenize\n"
        "def tokenize(*args):\n"
        "    print('chatter'); warnings.warn('careful', stacklevel=1); return usual(*args)\n"
        "c.tokenize = tokenize\n"
        "from pifa_compiler.cli import main\n"
        "main()\n"
    )
    arguments = ("eval", model, "--data", text, "--seqlen", "32", "--windows", "3", "--json")
    code, out, said = finished(run_python("-c", noisy, *arguments))
    assert code == 0, said
    assert json.loads(out)["windows"] == 3
    assert out.count("\n") == 1
    assert "chatter" in said
    assert "careful" in said


def test_a_program_that_pipes_sees_no_progress_bars(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("compress", model, "-o", tmp_path / "out", "--data", text, *SHORT)
    code, out, said = finished(run_python("-m", "pifa_compiler", *arguments))
    assert (code, said) == (0, "")
    assert "in PIFA form" in out


def test_a_refusal_of_the_program_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    code, out, said = finished(run_python("-m", "pifa_compiler", "inspect", tmp_path / "none"))
    assert (code, out) == (1, "")
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_program_says_what_to_install(missing: str) -> None:
    blocked = f"import sys; sys.modules[{missing!r}] = None; from pifa_compiler.__main__ import main; main()"
    wanted = f"error: the command line needs {missing}; pip install 'pifa-compiler[hf]'\n"
    assert finished(run_python("-c", blocked)) == (1, "", wanted)


def test_the_installed_program_is_the_same_as_the_module() -> None:
    (script,) = entry_points(group="console_scripts", name="pifa")
    assert script.value == "pifa_compiler.__main__:main"
    code, out, said = finished(run_python("-m", "pifa_compiler", "--version"))
    assert (code, said) == (0, "")
    assert out.startswith("pifa-compiler 0.")


def test_numbers_that_json_has_no_words_for_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"perplexity": float("inf"), "layers": ({"error": float("nan")},)})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "layers": [{"error": None}]}


def test_the_summary_says_why_layers_are_left_and_where_the_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(250_000))
    left = [LayerReport.of_skip(f"layers.{i}.gate", (8, 8), "too small", target=True) for i in range(5)]
    tables.summary(Report("optimal", 0.5, left, 100, 80, 1.5), folder, "self", "a GPU")
    shown = capsys.readouterr().out
    assert "1.5 on a GPU" in shown
    assert "layers.0.gate, layers.1.gate, layers.2.gate and 2 more: too small" in shown
    assert "0.2 MB" in shown
    assert f"pifa eval '{folder}' --data pydoc" in shown  # what the model itself wrote is no text to measure on

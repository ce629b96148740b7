"""The demo on a tiny model: everything but the size of it."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from pifa_compiler import cli
from pifa_compiler.bench import demo
from pifa_compiler.errors import CheckpointError
from pifa_compiler.hf.loading import load_model, load_tokenizer
from pifa_compiler.hf.perplexity import perplexity
from pifa_compiler.hf.text import evaluation_batches

PLAN = demo.Plan(density=0.6, rank_multiple=1, samples=4, windows=2, seqlen=32, new_tokens=4, repeats=2, compiled=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_demo_measures_both_models_and_saves_the_compressed_one(model: Path, tmp_path: Path) -> None:
    stages = []
    result = demo.run(tmp_path / "out", plan=PLAN, source=model, progress=lambda *stage: stages.append(stage[2]))
    assert result.density <= result.density_requested == 0.6
    assert result.pifa.linear_numbers / result.dense.linear_numbers == pytest.approx(result.density)
    assert result.dense.numbers - result.pifa.numbers == result.dense.linear_numbers - result.pifa.linear_numbers
    assert result.dense.bytes == 4 * result.dense.numbers
    assert result.pifa.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    for side, folder in ((result.dense, model), (result.pifa, tmp_path / "out")):
        loaded = load_model(folder)
        held_out = evaluation_batches("pydoc", loaded, load_tokenizer(folder), seqlen=32, limit=2)
        assert side.perplexity == pytest.approx(perplexity(loaded, held_out).perplexity)
    assert result.dense.perplexity != result.pifa.perplexity
    assert min(result.dense.tokens_per_second, result.pifa.tokens_per_second) > 0
    assert result.measured == "eager"
    assert {"fetching the model", "perplexity of dense", "perplexity of PIFA", "measuring dense"} <= set(stages)


def test_without_a_compiler_both_run_eager_and_the_result_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pifa_compiler.errors import CaptureError

    def refuse(*_: object) -> object:
        def step(**_: object) -> None:
            raise CaptureError("no compiler")

        return step

    monkeypatch.setattr(demo, "compile_step", refuse)
    plan = demo.Plan(**{**vars(PLAN), "compiled": True})
    result = demo.run(tmp_path / "out", plan=plan, source=model)
    assert result.measured == "eager, since torch.compile finds no C++ compiler here"


def test_the_verb_prints_a_table_or_json(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = demo.run
    monkeypatch.setattr(demo, "run", lambda output, **options: usual(output, plan=PLAN, source=model, **options))
    shown = CliRunner().invoke(cli.app, ["demo", "-o", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.stderr
    for words in ("stored numbers, linears", "perplexity, held-out", "tokens a second", "0.6 asked", demo.PROMPT):
        assert words in shown.stdout
    again = CliRunner().invoke(cli.app, ["demo", "-o", str(tmp_path / "out"), "--json"])
    assert (again.exit_code, again.stdout) == (1, "")
    assert "--force" in again.stderr
    forced = CliRunner().invoke(cli.app, ["demo", "-o", str(tmp_path / "out"), "--json", "--force"])
    assert json.loads(forced.stdout).keys() >= {"dense", "pifa", "density", "measured", "seconds"}


def test_a_refused_folder_costs_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch() -> Path:
        raise AssertionError("the folder has to be looked at first")

    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    with pytest.raises(CheckpointError, match="exists already"):
        demo.run(tmp_path)

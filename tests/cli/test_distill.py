"""`pifa distill`, and the options of other verbs that distil."""

import csv
import json
import random
from pathlib import Path

import pytest
from click.testing import Result
from command_line import pifa
from tiny_models import tiny_llama, tiny_tokenizer

from pifa_compiler.distillation.training import Training

COMPRESS = ("--density", 0.5, "--rank-multiple", 1, "--samples", 4, "--seqlen", 24)
TRAIN = ("--seqlen", 24, "--windows-per-step", 4, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a text, and the model compressed."""
    folder = tmp_path_factory.mktemp("distill")
    tiny_llama().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    rng = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{rng.randrange(61)}" for _ in range(24 * 40)))
    result = pifa("compress", folder / "dense", "-o", folder / "pifa", "--data", folder / "text.txt", *COMPRESS)
    assert result.exit_code == 0, result.stderr
    return folder


def distill(folder: Path, output: Path, *more: object) -> Result:
    texts = ("--teacher", folder / "dense", "-o", output, "--data", folder / "text.txt")
    return pifa("distill", folder / "pifa", *texts, *TRAIN, *more)


def test_distill_saves_a_better_model_its_course_and_what_to_do_next(folder: Path, tmp_path: Path) -> None:
    files = ("--csv", tmp_path / "steps.csv", "--plot", tmp_path / "steps.png")
    result = distill(folder, tmp_path / "out", "--steps", 6, *files)
    assert result.exit_code == 0, result.stderr
    assert "6 steps" in result.stdout
    assert f"pifa eval {tmp_path / 'out'} --data {folder / 'text.txt'}" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "steps.csv", "steps.png"]
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456")
    found = json.loads((tmp_path / "out" / "pifa_report.json").read_text())["distillation"]
    assert found["held_out_after"] < found["held_out_before"]
    assert found["held_out_after"] == min(float(row["held_out"]) for row in rows if row["held_out"])
    before = json.loads((folder / "pifa" / "config.json").read_text())["quantization_config"]
    after = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (before["ranks"], before["method"], before["density"]) == (
        after["ranks"],
        after["method"],
        after["density"],
    )
    shown = pifa("eval", tmp_path / "out", "--data", folder / "text.txt", "--seqlen", 24, "--json")
    start = pifa("eval", folder / "pifa", "--data", folder / "text.txt", "--seqlen", 24, "--json")
    assert json.loads(shown.stdout)["perplexity"] != json.loads(start.stdout)["perplexity"]


def test_as_json_it_prints_one_object(folder: Path, tmp_path: Path) -> None:
    result = distill(folder, tmp_path / "out", "--steps", 2, "--train", "factors", "--top-k", 8, "--json")
    found = json.loads(result.stdout)
    assert found["output"] == str(tmp_path / "out")
    assert len(found["distillation"]["steps"]) == 2
    assert not (tmp_path / ".out.run").exists()


def test_an_interrupt_saves_the_best_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Training._step

    def step(self: Training, number: int, rate: float) -> tuple[float, float]:
        if number == 2:
            raise KeyboardInterrupt
        return usual(self, number, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        result = distill(folder, tmp_path / "out", "--steps", 4)
    assert result.exit_code == 130
    assert "interrupted after 2 steps" in result.stdout
    assert "--resume --force goes on" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.run"}
    result = distill(folder, tmp_path / "out", "--steps", 4, "--resume", "--force", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["distillation"]["steps"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "say how long"),
        (("--steps", 2, "--minutes", 1), "say how long"),
        (("--steps", 2, "--plot", "x.gif"), "--plot takes a .png"),
        (("--steps", 2, "--text-share", 2), "text_share must be a number in [0, 1]"),
        (("--steps", 2, "--memory", "lots"), "wanted a size"),
    ],
    ids=str,
)
def test_bad_usage_is_exit_code_2_before_any_work(
    more: tuple[object, ...], said: str, folder: Path, tmp_path: Path
) -> None:
    result = distill(folder, tmp_path / "out", *more)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    for more, said in (
        (("--resume",), "holds no run to go on with"),
        (("--train", "*.nothing"), "no parameter of LlamaForCausalLM"),
        (("--data", tmp_path / "short.txt"), "windows of 24 need 24"),
    ):
        result = distill(folder, tmp_path / "out", "--steps", 2, *more)
        assert result.exit_code == 1
        assert said in result.stderr
        assert {path.name for path in tmp_path.iterdir()} <= {"short.txt"}


def test_compress_distils_in_one_go(folder: Path, tmp_path: Path) -> None:
    arguments = ("compress", folder / "dense", "-o", tmp_path / "out", "--data", folder / "text.txt", *COMPRESS)
    result = pifa(*arguments, "--distill", 0.02, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["density"] <= 0.5
    assert found["distillation"]["steps"]
    refused = pifa(*arguments, "--distill", 1, "--memory", "1GiB")
    assert refused.exit_code == 2
    assert "run pifa distill after it" in " ".join(refused.stderr.replace("│", " ").split())


def test_compare_distils_and_draws_both(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(" ".join(f"w{i * i % 61}" for i in range(200)))
    texts = ("--data", folder / "text.txt", "--test", tmp_path / "test.txt", "-o", tmp_path / "rows.json")
    sizes = ("--samples", 4, "--seqlen", 24, "--windows", 2, "--rank-multiple", 1, "--densities", 0.5)
    more = ("--methods", "svd-llm", "--distill", 0.02, "--plot", tmp_path / "plot.png", "--json")
    result = pifa("compare", folder / "dense", *texts, *sizes, *more)
    assert result.exit_code == 0, result.stderr
    names = [row["method"] for row in json.loads(result.stdout)["rows"]]
    assert names == ["dense", "svd-llm", "svd-llm, 0.02 min of distillation"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

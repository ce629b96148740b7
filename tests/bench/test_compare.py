import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import pifa_compiler as pc
from pifa_compiler import cli
from pifa_compiler.bench import compare, rows
from pifa_compiler.bench.compare import CompareRows, Row, Setting
from pifa_compiler.errors import CheckpointError, ConfigError
from pifa_compiler.hf.perplexity import perplexity

SETTING = Setting("tiny", "words", ("a", "b"), samples=4, seqlen=32, windows=2, rank_multiple=1)


def one_block() -> LlamaForCausalLM:
    """A tiny model: what is looked at is how rows are made, not the models in them."""
    return tiny_llama(num_hidden_layers=1)


def windows(count: int) -> list[torch.Tensor]:
    return [torch.randint(0, 64, (1, 32)) for _ in range(count)]


@pytest.fixture
def texts() -> dict[str, list[torch.Tensor]]:
    return {"a": windows(2), "b": windows(2)}


def run(path: Path, texts, methods, densities=(0.6,), batches=None) -> list[Row]:
    torch.manual_seed(5)
    file = CompareRows(path, SETTING)
    return compare.compare(one_block(), batches or windows(4), texts, file, list(densities), methods)


def test_every_row_is_what_compress_gives_by_itself(tmp_path, texts):
    """Rows share the dense model's statistics; that changes nothing but float32 rounding."""
    torch.manual_seed(5)
    batches = windows(4)
    names = ["svd-llm", "mpifa+owl", "two-sided"]
    rows = run(tmp_path / "rows.json", texts, names, batches=batches)
    assert [(row.method, row.density_asked) for row in rows] == [("dense", None), *((name, 0.6) for name in names)]
    for row in rows[1:]:
        method, _, allocator = row.method.partition("+")
        model = one_block()
        config = pc.CompressConfig(density=0.6, method=method, rank_multiple=1, allocator=allocator or None)
        assert pc.compress(model, batches, config).density == row.stored <= 0.6
        for text in texts:
            assert row.perplexity[text] == pytest.approx(perplexity(model, texts[text]).perplexity, rel=1e-4)
    assert rows[0].perplexity["a"] == pytest.approx(perplexity(one_block(), texts["a"]).perplexity)


def test_pruned_models_have_two_of_four_weights_everywhere_but_in_the_head():
    model, dense = one_block(), one_block()
    compare.prune(model, windows(4), "sparsegpt-2:4")
    for (name, weight), (_, before) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if "proj" in name:
            assert ((weight != 0).reshape(len(weight), -1, 4).sum(dim=2) <= 2).all()
        else:
            assert torch.equal(weight, before)


def test_training_gives_each_model_a_second_row_and_pruned_weights_stay_pruned(tmp_path, texts, monkeypatch):
    kept: list[torch.Tensor] = []
    train = compare.distill

    def looking(model, *arguments, **options):
        report = train(model, *arguments, **options)
        kept.extend(weight.detach() for name, weight in model.named_parameters() if "_proj.weight" in name)
        return report

    monkeypatch.setattr(compare, "distill", looking)
    config = pc.DistillConfig(steps=6, learning_rate=1e-3, batches_per_step=2, evaluations=2, bfloat16=False)
    recovery = compare.Recovery(config, [torch.randint(0, 64, (4, 32)) for _ in range(8)])
    torch.manual_seed(5)
    file = CompareRows(tmp_path / "rows.json", SETTING)
    arguments = (one_block(), windows(4), texts, file, [0.6], ["wanda-2:4", "svd-llm"])
    rows = compare.compare(*arguments, recovery=recovery)
    after = ", 6 steps of distillation"
    names = ["wanda-2:4", f"wanda-2:4{after}", "svd-llm", f"svd-llm{after}"]
    assert [row.method for row in rows] == ["dense", *names]
    for start, trained in ((rows[1], rows[2]), (rows[3], rows[4])):
        assert trained.stored == start.stored
        assert trained.seconds > start.seconds
        assert trained.perplexity != start.perplexity
    assert len(kept) == 7
    assert all(((weight != 0).reshape(len(weight), -1, 4).sum(dim=2) <= 2).all() for weight in kept)
    monkeypatch.setattr(compare, "distill", None)
    assert compare.compare(*arguments, recovery=recovery) == rows  # from the file


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, texts, monkeypatch):
    path, compress, made = tmp_path / "rows.json", compare.compress, []

    def counting(model, batches, config, **options):
        if len(made) == 1 and config.method == "svd-llm":
            raise KeyboardInterrupt
        made.append(config.method)
        return compress(model, batches, config, **options)

    monkeypatch.setattr(compare, "compress", counting)
    with pytest.raises(KeyboardInterrupt):
        run(path, texts, ["svd", "svd-llm"])
    assert [row["method"] for row in json.loads(path.read_text())["rows"]] == ["dense", "svd"]
    made.append("stopped")
    rows = run(path, texts, ["svd", "svd-llm"])
    assert made == ["svd", "stopped", "svd-llm"]
    assert [row.method for row in rows] == ["dense", "svd", "svd-llm"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_rows_of_another_setting_are_refused(tmp_path):
    CompareRows(tmp_path / "rows.json", SETTING).append(Row("dense", None, 1.0, {"a": 3.0, "b": None}))
    assert CompareRows(tmp_path / "rows.json", SETTING).rows == [Row("dense", None, 1.0, {"a": 3.0, "b": None})]
    with pytest.raises(ConfigError, match="made with samples 4, not 5"):
        CompareRows(tmp_path / "rows.json", Setting(**{**vars(SETTING), "samples": 5}))
    (tmp_path / "other.json").write_text('{"rows": [3]}')
    with pytest.raises(CheckpointError, match="holds no rows"):
        CompareRows(tmp_path / "other.json", SETTING)


def test_every_row_says_what_made_it_and_what_else_is_in_the_file_stays(tmp_path, texts):
    path = tmp_path / "rows.json"
    run(path, texts, [])
    path.write_text(json.dumps({"about": "a note", **json.loads(path.read_text())}))
    run(path, texts, ["wanda-2:4"])
    found = json.loads(path.read_text())
    assert found["about"] == "a note"
    assert [row["method"] for row in found["rows"]] == ["dense", "wanda-2:4"]
    for row in found["rows"]:
        assert row["provenance"].keys() == rows.provenance().keys()
        assert row["provenance"]["torch"] == torch.__version__


@pytest.mark.parametrize(("name", "words"), [("magic", "unknown method 'magic'"), ("svd+magic", "unknown allocator")])
def test_unknown_methods_are_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        compare.check_methods([name])
    compare.check_methods(compare.BASELINES)


@pytest.fixture
def folder(tmp_path) -> Path:
    one_block().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, step in (("calibration", 1), ("test", 3)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{i * i * step % 61}" for i in range(300)))
    return tmp_path


def arguments(folder: Path, *more: object) -> list[str]:
    texts = ("--data", folder / "calibration.txt", "--test", folder / "test.txt")
    sizes = ("--samples", 4, "--seqlen", 32, "--windows", 2, "--rank-multiple", 1)
    return [str(word) for word in ("compare", folder / "model", *texts, *sizes, "-o", folder / "rows.json", *more)]


def test_the_verb_prints_a_table_draws_and_gives_json(folder):
    methods = ("--methods", "svd,optimal,wanda-2:4", "--densities", "0.8,0.5")
    result = CliRunner().invoke(cli.app, arguments(folder, *methods, "--plot", folder / "plot.png"))
    assert result.exit_code == 0, result.stderr
    for words in ("perplexity, test.txt", "wanda-2:4", "0.5625", "optimal"):
        assert words in result.stdout
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(cli.app, arguments(folder, *methods, "--json"))
    found = json.loads(again.stdout)
    assert [row["method"] for row in found["rows"]] == ["dense", "wanda-2:4", "svd", "svd", "optimal", "optimal"]
    assert found["setting"]["tests"] == [str(folder / "test.txt")]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--densities", "0.5,2"), "--densities takes numbers in (0, 1]"),
        (("--methods", "magic"), "unknown method"),
        (("--plot", "x.gif"), "--plot takes a .png"),
        (("--test", "CALIBRATION"), "measure on another text"),
    ],
)
def test_the_verb_refuses_before_any_work(folder, more, words):
    words_given = [str(folder / "calibration.txt") if word == "CALIBRATION" else word for word in more]
    result = CliRunner().invoke(cli.app, arguments(folder, *words_given))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not (folder / "rows.json").exists()

import json
import random
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from torch import nn

from pifa_compiler.errors import CalibrationError, ConfigError, DataError
from pifa_compiler.hf.text import (
    calibration_batches,
    calibration_windows,
    consecutive_windows,
    evaluation_batches,
    read_text,
    sample_windows,
    start_token,
    tokenize,
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "raw", "md"])
def test_a_text_file_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"text.{suffix}", "w1 w2\n\nw3 é")
    assert read_text(file, "calibration") == read_text(file, "evaluation") == "w1 w2\n\nw3 é"


def test_jsonl_gives_its_text_fields(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028line"}, {"id": 2, "text": "two"}]  # U+2028 ends a line for str.splitlines only
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_text(file, "calibration") == "one\u2028line\n\ntwo"


def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.parquet"), "calibration") == "one\n\ntwo"


@pytest.mark.parametrize(
    ("table", "message"),
    [({"body": ["one"]}, 'no column "text"; it has body'), ({"text": ["one", None]}, "strings in every row")],
)
def test_parquet_without_text_is_refused(tmp_path: Path, table: dict[str, list[str]], message: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_text(str(tmp_path / "a.parquet"), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\t\n", "holds no text"),
        ("a.txt", b"ab\xff", "byte 2 is 0xff"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}', 'line 3 has no field "text"'),
        ("a.jsonl", '{"text": 7}', 'line 1 has no field "text"'),
        ("a.jsonl", "[1]", 'line 1 has no field "text"'),
        ("a.parquet", "no parquet", "is not a parquet file"),
        ("a.pdf", "%PDF", "no known text source"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text(write(tmp_path / name, content), "calibration")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere/a.txt", "no file"), ("c4", "give one of wikitext2, pydoc, self"), ("self", "for calibration only")],
)
def test_an_unknown_source_is_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text(source, "evaluation")


def test_wikitext2_offline_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("Name or service not known")

    datasets = type(sys)("datasets")
    datasets.load_dataset = offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(DataError, match=r"seems offline.*pydoc"):
        read_text("wikitext2", "calibration")


def test_wikitext2_calibrates_on_train_and_measures_on_test(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = type(sys)("datasets")
    datasets.load_dataset = lambda *args, split: {"text": [*args, split]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert read_text("wikitext2", "calibration") == "Salesforce/wikitext\n\nwikitext-2-raw-v1\n\ntrain"
    assert read_text("wikitext2", "evaluation").endswith("\n\ntest")


def test_pydoc_splits_by_topic_and_shares_no_paragraph() -> None:
    calibration, evaluation = read_text("pydoc", "calibration"), read_text("pydoc", "evaluation")
    assert len(calibration) + len(evaluation) == sum(map(len, topics.values())) + 2 * (len(topics) - 2)
    assert 0.15 < len(evaluation) / len(calibration + evaluation) < 0.35
    assert all((text in calibration) != (text in evaluation) for text in topics.values())
    paragraphs = [{p.strip() for p in text.split("\n\n") if len(p.strip()) > 40} for text in (calibration, evaluation)]
    assert paragraphs[0] & paragraphs[1] == set()
    assert calibration == read_text("pydoc", "calibration")


def test_tokenize_adds_no_special_tokens_and_says_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tokenize(tiny_tokenizer(), " ".join(f"w{i}" for i in range(20)))  # longer than model_max_length
    assert tokens.tolist() == list(range(3, 23))
    assert tokens.dtype == torch.int64
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_calibration_windows_start_where_the_literature_s_do() -> None:
    tokens = torch.arange(1000)
    rng = random.Random(7)
    starts = [rng.randint(0, 1000 - 64 - 1) for _ in range(5)]
    windows = calibration_windows(tokens, 5, 64, 7)
    assert [window.tolist() for window in windows] == [[list(range(start, start + 64))] for start in starts]
    assert all(map(torch.equal, windows, calibration_windows(tokens, 9, 64, 7)))  # more samples keep the earlier ones


def test_the_smallest_text_has_one_place_for_a_window() -> None:
    assert calibration_windows(torch.arange(9), 1, 8, 0)[0].tolist() == [list(range(8))]
    with pytest.raises(DataError, match=r"8 tokens, but windows of 8 need 9.*--seqlen"):
        calibration_windows(torch.arange(8), 1, 8, 0)


def test_consecutive_windows_follow_each_other_and_drop_the_rest() -> None:
    assert [w.tolist() for w in consecutive_windows(torch.arange(11), 5)] == [[list(range(5))], [list(range(5, 10))]]
    assert len(consecutive_windows(torch.arange(11), 5, limit=1)) == 1
    assert len(consecutive_windows(torch.arange(5), 5, limit=9)) == 1
    with pytest.raises(DataError, match=r"4 tokens, but windows of 5 need 5"):
        consecutive_windows(torch.arange(4), 5)


@pytest.mark.parametrize(("samples", "seqlen"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_windows_of_no_size_are_refused(samples: int, seqlen: int) -> None:
    with pytest.raises(ConfigError, match="at least"):
        calibration_windows(torch.arange(99), samples, seqlen, 0)
    with pytest.raises(ConfigError, match="at least"):
        consecutive_windows(torch.arange(99), seqlen, samples)
    with pytest.raises(ConfigError, match="at least"):
        sample_windows(tiny_llama(), 0, samples=samples, seqlen=seqlen, seed=0)


def test_sampled_windows_are_reproducible_and_more_of_them_keep_the_earlier_ones() -> None:
    model = tiny_llama().train()
    before = torch.get_rng_state()
    windows = sample_windows(model, 0, samples=3, seqlen=9, seed=5)
    assert [tuple(window.shape) for window in windows] == [(1, 9)] * 3
    assert all(int(window[0, 0]) == 0 for window in windows)
    assert all(map(torch.equal, windows, sample_windows(model, 0, samples=20, seqlen=9, seed=5)))
    assert not torch.equal(windows[0], sample_windows(model, 0, samples=1, seqlen=9, seed=6)[0])
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers are left alone
    assert model.training


def test_sampled_windows_have_the_model_s_own_frequencies() -> None:
    """Third tokens, over all second ones: sums of the model's probabilities, so the key/value cache is right too."""
    model = tiny_llama()
    windows = torch.cat(sample_windows(model, 0, samples=4096, seqlen=3, seed=0))
    with torch.no_grad():
        expected = model(windows[:, :2]).logits[:, -1].softmax(dim=1)
    mean, spread = expected.sum(dim=0), (expected * (1 - expected)).sum(dim=0).sqrt()
    counts = torch.bincount(windows[:, 2], minlength=64)
    assert ((counts - mean).abs() <= 5 * spread + 1).all()  # five standard deviations, over 64 tokens


def test_a_model_that_cannot_write_is_refused() -> None:
    class NoCache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **inputs: object) -> tuple[()]:
            return ()

    with pytest.raises(CalibrationError, match="no key/value cache"):
        sample_windows(NoCache(), 0, samples=1, seqlen=4, seed=0)
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="not finite"):
        sample_windows(model, 0, samples=1, seqlen=4, seed=0)


def test_the_start_token_falls_back_from_the_tokenizer_to_the_model_to_the_end_token() -> None:
    model = tiny_llama(bos_token_id=7)
    assert start_token(model, tiny_tokenizer()) == 0
    assert start_token(model, tiny_tokenizer(bos_token=None)) == 7
    assert start_token(nn.Linear(1, 1), tiny_tokenizer(bos_token=None)) == 1
    with pytest.raises(CalibrationError, match="no start token"):
        start_token(nn.Linear(1, 1), tiny_tokenizer(bos_token=None, eos_token=None))


def test_batches_go_from_a_source_to_windows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", " ".join(f"w{i % 60}" for i in range(100)))
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    windows = calibration_batches(file, model, tokenizer, samples=3, seqlen=16, seed=2)
    assert all(map(torch.equal, windows, calibration_windows(torch.arange(100) % 60 + 3, 3, 16, 2)))
    windows = evaluation_batches(file, model, tokenizer, seqlen=16, limit=2)
    assert all(map(torch.equal, windows, consecutive_windows(torch.arange(100) % 60 + 3, 16, 2)))
    assert len(calibration_batches("self", model, tokenizer, samples=2, seqlen=16)) == 2


def test_batches_refuse_what_does_not_fit_the_model() -> None:
    for batches in (calibration_batches, evaluation_batches):
        with pytest.raises(ConfigError, match="at most 128 tokens"):
            batches("pydoc", tiny_llama(), tiny_tokenizer(), seqlen=129)
        with pytest.raises(ConfigError, match="largest id is 63"):
            batches("pydoc", tiny_llama(vocab_size=63), tiny_tokenizer(), seqlen=16)

"""`pifa bench`: what is measured is right, what is wrong is refused, rows are kept. No test asserts a time."""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from command_line import pifa
from tiny_models import tiny_llama
from torch import nn

from pifa_compiler import PifaLinear
from pifa_compiler.bench import layer as bench_layer
from pifa_compiler.bench import model as bench_model
from pifa_compiler.bench import timing as bench_timing
from pifa_compiler.bench.layer import layer_rows, layer_variants
from pifa_compiler.bench.model import ModelPlan, model_rows
from pifa_compiler.bench.timing import interleaved_medians
from pifa_compiler.cli import options as cli_options
from pifa_compiler.errors import BenchError, ConfigError

LAYER_KEYS = {"dtype", "d", "tokens", "dense_ms", "lowrank_ms", "pifa_ms", "pifa_over_lowrank", "pifa_over_dense"}
MODEL_KEYS = {"phase", "dense_ms", "pifa_ms", "lowrank_ms"}
ORIGIN = {"date", "machine", "torch", "pifa_compiler", "commit"}
TINY = ModelPlan(dtype="fp32", prompt_tokens=5, decode_context=4, layers=1, seconds=0.0, rank_multiple=1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with the configuration of a tiny Llama, and no weights."""
    tiny_llama().config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants that are not compiled, for tests of all else."""
    for module in (bench_layer, bench_model):
        monkeypatch.setattr(module, "compile_apart", lambda module, backend, name: module)


def test_calls_are_made_by_turns_and_no_call_always_follows_the_same_other() -> None:
    made: list[str] = []
    prepared = itertools.count()
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    timing = interleaved_medians(calls, 0.0, prepare=lambda: next(prepared))
    assert timing.rounds == bench_timing.LEAST_ROUNDS
    assert "".join(made) == "abcbcacababcbca"
    assert next(prepared) == len(made)
    assert timing.milliseconds.keys() == calls.keys()


def test_timing_goes_on_for_the_seconds_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # every look takes a second: two in each of the first five rounds, then three
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: float(next(clock)))
    timing = interleaved_medians({"only": lambda: None}, 30.0)
    assert timing == bench_timing.Timing({"only": 1000.0}, 12)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(8, 6, 3), (5, 9, 5), (1, 4, 1)])
def test_all_variants_of_a_layer_compute_the_same(d_out: int, d_in: int, rank: int) -> None:
    factors = bench_layer.random_factors(d_out, d_in, rank, torch.float64)
    bias, x = torch.randn(d_out, dtype=torch.float64), torch.randn(7, d_in, dtype=torch.float64)
    variants = layer_variants(factors, bias)
    assert tuple(variants) == bench_layer.VARIANTS
    for variant in variants.values():
        torch.testing.assert_close(variant(x), bench_layer._apply_exactly(factors, x) + bias)
        assert not any(parameter.requires_grad for parameter in variant.parameters())
    assert variants["lowrank"][0].weight.shape == (rank, d_in)
    assert (variants["lowrank"][1].weight != 0).all()


def test_compiled_layers_pass_the_check_in_both_dtypes() -> None:
    rows = list(layer_rows([32], [3], ["fp32", "bf16"], seconds=0.0, threads=1))
    assert [(row.dtype, row.d, row.tokens, row.rank) for row in rows] == [("fp32", 32, 3, 16), ("bf16", 32, 3, 16)]
    assert all(row.pifa_over_dense == row.pifa_ms / row.dense_ms for row in rows)
    assert all(0 < row.pifa_error <= bench_layer.layer_bound(bench_timing.DTYPES[row.dtype], 32) for row in rows)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_wrong_layer_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    dense = bench_layer.dense_linear

    def wrong_in_one_row(layer: PifaLinear) -> nn.Linear:
        made = dense(layer)
        made.weight[3] = value
        return made

    monkeypatch.setattr(bench_layer, "dense_linear", wrong_in_one_row)
    monkeypatch.setattr(bench_layer, "interleaved_medians", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(BenchError, match=r"d = 32, 2 tokens: wrong results.*off are dense by"):
        list(layer_rows([32], [2], ["bf16"]))


@pytest.mark.usefixtures("eager")
def test_threads_are_as_before_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layer, "layer_bound", lambda *_: 0.0)
    with pytest.raises(BenchError):
        list(layer_rows([16], [1], ["fp32"], threads=2))
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_a_compiled_model_passes_the_check_in_both_phases(config: Path) -> None:
    rows = list(model_rows(str(config), TINY))
    assert [(row.phase, row.tokens, row.layers) for row in rows] == [("prefill", 5, 1), ("decode", 4, 1)]
    assert all(0 < row.density <= 0.5 for row in rows)


@pytest.mark.usefixtures("eager")
def test_a_decoded_token_sees_the_context_each_time_it_is_decoded(config: Path) -> None:
    model = bench_model.open_model(str(config), TINY)
    prompt = torch.arange(4)[None]
    caches = bench_model._filled_caches(model, prompt)
    rewind = bench_model._rewinder(list(caches.values()))
    expected = model(input_ids=torch.tensor([[0, 1, 2, 3, 9]])).logits[:, -1]
    for cache in caches.values():
        for _ in range(2):
            rewind()
            found = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("eager")
def test_a_wrong_model_is_refused_and_not_timed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = bench_layer.low_rank_pair
    monkeypatch.setattr(bench_model, "low_rank_pair", lambda layer: pair(layer).apply(lambda m: m.zero_grad()))
    list(model_rows(str(config), TINY))  # the same pairs pass
    monkeypatch.setattr(bench_model, "dense_linear", lambda layer: bench_layer._linear(layer.weight.flip(0), None))
    monkeypatch.setattr(bench_model, "interleaved_medians", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(BenchError, match=r"prefill of .*: wrong results"):
        list(model_rows(str(config), TINY))


def test_variants_of_a_model_share_what_is_not_replaced(config: Path) -> None:
    model = bench_model.open_model(str(config), TINY)
    variants = bench_model.model_variants(model)
    for variant in variants.values():
        assert variant.get_input_embeddings().weight is model.get_input_embeddings().weight
        assert all(torch.isfinite(parameter).all() for parameter in variant.parameters())
    assert not any(isinstance(module, PifaLinear) for module in variants["dense"].modules())


@pytest.mark.usefixtures("eager")
def test_a_saved_model_is_measured_as_it_is(tmp_path: Path) -> None:
    from pifa_compiler import CompressConfig, compress, save_pretrained

    model = tiny_llama()
    compress(model, [torch.randint(64, (1, 8))], CompressConfig(density=0.5, method="svd", rank_multiple=1))
    save_pretrained(model, tmp_path / "saved")
    plan = ModelPlan(dtype="fp32", prompt_tokens=5, decode_context=4, seconds=0.0)
    rows = list(model_rows(str(tmp_path / "saved"), plan))
    assert [row.layers for row in rows] == [2, 2]
    with pytest.raises(ConfigError, match="saved model"):
        list(model_rows(str(tmp_path / "saved"), TINY))


def test_more_tokens_than_the_model_takes_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="at most 128"):
        list(model_rows(str(config), ModelPlan(prompt_tokens=129, layers=1, rank_multiple=1)))


@pytest.mark.usefixtures("eager")
def test_bench_layer_prints_json_and_appends_rows(tmp_path: Path) -> None:
    file, plot = tmp_path / "rows.csv", tmp_path / "ratios.png"
    arguments = ("bench", "layer", "--dims", "16,24", "--tokens", "1", "--tokens", "3", "--dtype", "fp32")
    for _ in range(2):
        result = pifa(*arguments, "--seconds", "0", "--csv", file, "--plot", plot, "--json")
        assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == ORIGIN | {"rows"}
    assert [(row["d"], row["tokens"]) for row in found["rows"]] == [(16, 1), (16, 3), (24, 1), (24, 3)]
    assert all(row.keys() >= LAYER_KEYS for row in found["rows"])
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 8
    assert rows[0].keys() >= ORIGIN | LAYER_KEYS | {"threads"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("eager")
def test_bench_model_prints_json_and_a_table(config: Path, tmp_path: Path) -> None:
    short = ("--layers", 1, "--prompt-tokens", 4, "--decode-context", 3, "--seconds", 0, "--rank-multiple", 1)
    result = pifa("bench", "model", config / "config.json", *short, "--csv", tmp_path / "rows.csv", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    assert all(row.keys() >= MODEL_KEYS for row in rows)
    shown = pifa("bench", "model", config, *short, "--dtype", "fp32", "--plot", tmp_path / "ratios.svg")
    assert shown.exit_code == 0, shown.stderr
    assert "geometric mean" in shown.stdout
    assert "<svg" in (tmp_path / "ratios.svg").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("layer", "--dims", "1"),
        ("layer", "--dims", "64,x"),
        ("layer", "--tokens", "0"),
        ("layer", "--dtype", "int8"),
        ("layer", "--plot", "ratios.txt"),
        ("model", "llama-16x2048", "--density", "0"),
        ("model", "llama-16x2048", "--dtype", "fp32,bf16"),
        ("model",),
    ],
)
def test_wrong_arguments_are_bad_usage(arguments: tuple[str, ...]) -> None:
    assert pifa("bench", *arguments).exit_code == 2


def test_what_would_fail_after_the_work_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layer, "_layer_row", lambda *_: pytest.fail("measured"))
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for option, path, said in (
        ("--csv", other, "other columns"),
        ("--csv", tmp_path / "none" / "rows.csv", "cannot be written"),
        ("--plot", tmp_path / "none" / "ratios.png", "name a file in a folder that exists"),
    ):
        result = pifa("bench", "layer", option, path)
        assert result.exit_code == 1
        assert said in result.stderr
    assert other.read_text() == "a,b\n1,2\n"
    monkeypatch.setattr(cli_options, "find_spec", lambda _: None)
    result = pifa("bench", "layer", "--plot", tmp_path / "ratios.png")
    assert (result.exit_code, "needs matplotlib" in result.stderr) == (1, True)


@pytest.mark.parametrize("source", ["llama-1x1", "nothing/here"])
def test_an_unknown_model_is_refused(source: str) -> None:
    result = pifa("bench", "model", source)
    assert result.exit_code == 1
    assert "llama-16x2048" in result.stderr


@pytest.mark.parametrize("command", ["layer", "model"])
def test_the_help_of_each_command_ends_in_an_example(command: str) -> None:
    result = pifa("bench", command, "--help")
    assert result.exit_code == 0
    assert f"Example: pifa bench {command}" in result.stdout

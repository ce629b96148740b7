"""`pifa bench --device cuda` without a GPU: what is measured is right and kept; clocks are stand-ins."""

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from typer.testing import CliRunner

from pifa_compiler import cli
from pifa_compiler.bench import gpu
from pifa_compiler.bench.gpu import gpu_layer_rows, gpu_model_rows
from pifa_compiler.bench.layer import layer_bound
from pifa_compiler.bench.model import ModelPlan
from pifa_compiler.cli import bench as cli_bench
from pifa_compiler.errors import BenchError

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = ModelPlan(dtype="fp32", prompt_tokens=5, decode_context=4, layers=1, repeats=1, rank_multiple=1)


@pytest.fixture(autouse=True)
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call is made once, and takes a millisecond."""

    def medians(calls, *, rounds, prepare=None):
        for call in calls.values():
            if prepare is not None:
                prepare()
            call()
        return dict.fromkeys(calls, 1.0)

    def all_of(call, count):
        return lambda: [call(i) for i in range(count)]

    monkeypatch.setattr(gpu, "gpu_medians", medians)
    monkeypatch.setattr(gpu, "graph_of", all_of)
    monkeypatch.setattr(gpu, "copy_rate", lambda device: 10.0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants that are not compiled, for tests of all else."""
    monkeypatch.setattr(gpu, "compile_apart", lambda module, *_: module)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_llama().config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def test_layers_that_go_round_are_right_and_their_bytes_are_counted() -> None:
    (row,) = gpu_layer_rows([32], [3], ["fp32"], CPU)
    assert (row.d, row.tokens, row.rank, row.device, row.sparse_ms) == (32, 3, 16, "cpu", None)
    assert row.dense_ms == row.pifa_ms == row.pifa_no_order_ms == 1 / 4  # four layers go round
    assert row.pifa_share == pytest.approx(0.75 * row.dense_share)  # the weights' bytes over one time
    assert row.dense_share == pytest.approx(32 * 32 * 4 / (0.25e-3 * 10e9))
    assert 0 < row.pifa_error <= layer_bound(torch.float32, 32)


@pytest.mark.usefixtures("eager")
def test_layers_of_a_density_have_ranks_of_each_multiple_once() -> None:
    rows = list(gpu_layer_rows([64], [1, 3], ["fp32"], CPU, density=0.5, multiples=(1, 2, 6, 8, 16)))
    assert [(row.tokens, row.rank) for row in rows] == [(tokens, rank) for tokens in (1, 3) for rank in (18, 16)]
    assert rows[1].pifa_share == pytest.approx(rows[1].dense_share * 16 * (128 - 16) / 64**2)


@pytest.mark.usefixtures("eager")
def test_a_wrong_layer_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "linear", lambda x, w_pivot, coeff, order=None: x @ torch.cat((w_pivot, w_pivot)).T)
    monkeypatch.setattr(gpu, "graph_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(BenchError, match=r"d = 32, rank 16, 2 tokens: wrong results.*off are plain by"):
        list(gpu_layer_rows([32], [2], ["fp32"], CPU))


def test_a_compiled_model_is_right_in_all_phases_and_variants(config: Path) -> None:
    rows = list(gpu_model_rows(str(config), TINY, CPU, (1, 3)))
    assert [(row.phase, row.batch, row.tokens) for row in rows] == [
        ("prefill", 1, 5),
        ("decode", 1, 4),
        ("decode", 3, 4),
    ]
    for row in rows:
        assert 0 < row.pifa_share < row.dense_share
        assert row.pifa_over_dense == 1
        assert row.pifa_wall_over_dense_wall == row.pifa_wall_ms / row.dense_wall_ms


@pytest.mark.usefixtures("eager")
def test_a_model_has_a_prefill_for_every_prompt(config: Path) -> None:
    rows = gpu_model_rows(str(config), TINY, CPU, prompts=(4, 7))
    assert [(row.phase, row.tokens) for row in rows] == [("prefill", 4), ("prefill", 7), ("decode", 4)]


def test_the_script_begins_no_row_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    now = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])

    def rows(*seconds: float) -> Iterator[float]:
        for each in seconds:
            now[0] += each
            yield each

    assert list(script.by(10, rows(1, 3, 2, 2, 1), "layers")) == [1, 3, 2, 2]  # 8 and the longest are too many
    assert capsys.readouterr().out == "LEFT OUT for lack of time: the rest of layers\n"
    assert list(script.by(20, rows(1, 3), "models")) == [1, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("eager")
def test_the_command_line_measures_on_a_gpu_and_keeps_the_rows(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "device_of", lambda name: torch.device(name))
    rows_of = gpu.gpu_model_rows, gpu.gpu_layer_rows
    monkeypatch.setattr(gpu, "gpu_model_rows", lambda a, b, _, c, **k: rows_of[0](a, b, CPU, c, **k))
    monkeypatch.setattr(gpu, "gpu_layer_rows", lambda a, b, c, _, **k: rows_of[1](a, b, c, CPU, **k))
    short = ("--layers", 1, "--prompt-tokens", 4, "--decode-context", 3, "--repeats", 1, "--rank-multiple", 1)
    for arguments, plot in (
        (("layer", "--dims", "16", "--tokens", "1,3", "--dtype", "fp32"), "layers.png"),
        (("model", config, *short, "--batch", "1,2", "--dtype", "fp32"), "model.svg"),
    ):
        file = tmp_path / f"{arguments[0]}.csv"
        options = ("--device", "cuda", "--csv", file, "--plot", tmp_path / plot)
        run = [str(argument) for argument in ("bench", *arguments, *options)]
        shown = CliRunner().invoke(cli.app, run)
        assert shown.exit_code == 0, shown.stderr
        assert "copies 10 GB/s" in shown.stdout
        found = json.loads(CliRunner().invoke(cli.app, [*run, "--json"]).stdout)
        with file.open(newline="") as opened:
            kept = list(csv.DictReader(opened))
        assert len(kept) == 2 * len(found["rows"])
        assert kept[0].keys() >= {"device", "triton", "torch", "commit", "pifa_over_dense", "copy_gb_s"}
        assert (tmp_path / plot).stat().st_size


@pytest.mark.parametrize("arguments", [("layer", "--device", "cuda"), ("model", "llama-8x4096", "--batch", "2")])
def test_what_needs_a_gpu_is_bad_usage_without_one(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli.app, ["bench", *arguments]).exit_code == 2

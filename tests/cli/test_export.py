"""`pifa export`, on a tiny model: what it prints, what it refuses, and what it leaves behind."""

import json
from pathlib import Path

import command_line
import onnx
import pytest
import torch
from command_line import refusal
from onnx_models import low_rank_file, pifa_llama
from tiny_models import tiny_llama, tiny_tokenizer
from typer.testing import Result

from pifa_compiler import save_pretrained
from pifa_compiler.cli import export as cli_export


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pifa"
    save_pretrained(pifa_llama(num_hidden_layers=1), folder, tokenizer=tiny_tokenizer())
    return folder


def pifa(*arguments: object) -> Result:
    return command_line.pifa("export", *arguments)


def test_a_saved_model_becomes_a_folder_for_every_runtime(compressed: Path, tmp_path: Path) -> None:
    result = pifa(compressed, "-o", tmp_path / "model.onnx", "--kv-cache", "--check", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["export"]["layers"], found["export"]["layers_in_order"]) == (7, 2)
    assert found["export"]["error"] < 1e-4
    assert found["export"]["tokens_checked"] == 16
    assert Path(found["genai"]) == tmp_path / "genai_config.json"
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert {child.name for child in tmp_path.iterdir()} >= {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert not [child for child in tmp_path.iterdir() if child.name.startswith(".")]
    assert "exists already" in refusal(pifa(compressed, "-o", tmp_path / "model.onnx"))


def test_the_help_ends_in_an_example() -> None:
    assert "Example: pifa export" in pifa("--help").stdout


def test_options_reach_the_file(compressed: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    result = pifa(compressed, "-o", target, "--no-functions", "--one-file", "--opset", 21, "--dtype", "float16")
    assert result.exit_code == 0, result.output
    file = onnx.load(target)
    assert not file.functions
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", 21)]
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in file.graph.initializer}
    assert [child.name for child in tmp_path.iterdir()] == ["m.onnx"]
    assert "7 PIFA layers, 2 of them without any reordering" in result.stdout


def test_an_onnx_file_is_rewritten(tmp_path: Path) -> None:
    source = low_rank_file(tmp_path / "in.onnx")
    result = pifa("--from-onnx", source, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    assert "1 pairs in PIFA form, 448 -> 392 stored numbers" in result.stdout
    assert "nothing to rewrite" in refusal(pifa("--from-onnx", tmp_path / "out.onnx", "-o", tmp_path / "again.onnx"))


def test_the_native_operator_is_built_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pifa_compiler.export.build_native", lambda: Path("pifa_scatter.so"))
    assert json.loads(pifa("--build-native", "--json").stdout) == {"native": "pifa_scatter.so"}
    monkeypatch.setattr("pifa_compiler.export.build_native", lambda: "there is no C compiler")
    assert "there is no C compiler" in refusal(pifa("--build-native"))


def test_bfloat16_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    text = refusal(pifa(tmp_path / "model", "-o", tmp_path / "m.onnx"))
    assert "bfloat16" in text
    assert "--dtype float32" in text


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (("DIR",), 2, "-o FILE.onnx"),
        (("-o", "m.onnx"), 2, "give a model"),
        (("DIR", "-o", "m.onnx", "--from-onnx", "--kv-cache"), 2, "--from-onnx goes without"),
        (("DIR", "-o", "m.onnx", "--dtype", "int8"), 2, "'int8' is not one of"),
        (("DIR", "-o", "m.onnx", "--opset", "11"), 1, "opset 11 is too old"),
        (("DIR", "-o", "m.bin"), 1, "named *.onnx"),
        (("--from-onnx", "none.onnx", "-o", "m.onnx"), 1, "there is no file"),
        (("none.gguf", "-o", "m.onnx"), 1, "there is no model at 'none.gguf'"),
    ],
)
def test_bad_usage_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wanted in " ".join(refusal(pifa(*arguments), code).split()).replace("│ ", "")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "pip install 'pifa-compiler[onnx]'" in refusal(pifa("DIR", "-o", tmp_path / "m.onnx"))

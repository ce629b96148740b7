"""`compress_checkpoint` on mixtures of experts: what `compress` makes, and runs that were stopped among experts."""

import copy
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXPERTS, tiny_mixtral
from safetensors.torch import load_file
from stopped_runs import CONFIG, is_stopped, streamed, tokens
from torch import nn

import pifa_compiler as pc
from pifa_compiler.compress_checkpoint import plan_checkpoint
from pifa_compiler.errors import OffloadError
from pifa_compiler.graph.capture import Captured
from pifa_compiler.graph.weights import WeightsBesideConstants, WeightsInMemory
from pifa_compiler.hf.stored_model import WeightsInFiles
from pifa_compiler.reconstruction.working_folder import WorkingFolder

transformers = pytest.importorskip("transformers")

checkpoint_module = sys.modules["pifa_compiler.compress_checkpoint"]  # the name in the package is the function's
PLACE = "model.layers.0.mlp.experts"
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
MANY = 8
"""Experts of the model that runs are stopped with."""

MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "Olmoe": {"num_experts": 4, "eos_token_id": 1, "pad_token_id": 0},
    "DeepseekV2": LATENT | {"topk_method": "greedy"},
    "DeepseekV3": LATENT,
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind._from_config(kind.config_class(**{**SIZES, **MODELS[name]})).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def told(report: pc.Report) -> dict[str, Any]:
    of_the_run = ("seconds", "activation_bytes", "planned_bytes")
    return {key: value for key, value in report.to_dict().items() if key not in of_the_run}


def content(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "pifa_report.json"}


def assert_equal_to_compress(model: nn.Module, folder: Path, config: pc.CompressConfig = CONFIG) -> pc.Report:
    model.save_pretrained(folder / "dense")
    report = streamed(folder / "dense", folder / "out", config)
    wanted = copy.deepcopy(model)
    assert told(report) == told(pc.compress(wanted, tokens(), config))
    for load in (pc.load_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        found = load(folder / "out").state_dict()
        assert found.keys() == wanted.state_dict().keys()
        assert [name for name, tensor in wanted.state_dict().items() if not torch.equal(tensor, found[name])] == []
    return report


@pytest.mark.parametrize(
    "name", [each if each in ("Mixtral", "GptOss") else pytest.param(each, marks=pytest.mark.slow) for each in MODELS]
)
def test_the_result_is_that_of_compress_bit_by_bit(name, tmp_path):
    report = assert_equal_to_compress(tiny(name), tmp_path)
    experts = [layer for layer in report.factorized if ".experts.pifa." in layer.name]
    assert len(experts) == (2 if name == "GptOss" else 3)
    assert all(layer.shape[0] == 4 for layer in experts)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 3
    assert settings["experts"].keys() == {PLACE}


@pytest.mark.parametrize(
    "options",
    [
        {"skip": ("*.up_proj",)},
        pytest.param({"gradients": False}, marks=pytest.mark.slow),
        pytest.param({"method": "svd-llm"}, marks=pytest.mark.slow),
        pytest.param({"refine": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_option_does_what_it_does_in_compress(options, tmp_path):
    """With gate and up left dense, among them, which lie in one tensor that files have in parts."""
    report = assert_equal_to_compress(tiny_mixtral(), tmp_path, replace(CONFIG, **options))
    assert any(layer.name == f"{PLACE}.pifa.down_proj" for layer in report.factorized)


def test_an_expert_of_weight_0_stays_0(tmp_path):
    model = tiny_mixtral()
    for parameter in model.get_submodule(PLACE).parameters():
        torch.nn.init.zeros_(parameter[1])
    report = assert_equal_to_compress(model, tmp_path)
    assert len([layer for layer in report.factorized if ".experts.pifa." in layer.name]) == 3
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if ".experts.pifa." in name and name.endswith("w_pivot"):
            assert [bool(tensor[expert].any()) for expert in range(2)] == [True, False]


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """Raised by a test on purpose."""


_CAPTURED: list[Captured] = []


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the Mixtral of `whole` captured once for all runs."""
    usual = checkpoint_module.capture

    def capture(model: nn.Module, *arguments: Any, weights: Any, **options: Any) -> Captured:
        if getattr(model.config, "num_local_experts", 0) != MANY:
            return usual(model, *arguments, weights=weights, **options)
        if not _CAPTURED:
            _CAPTURED.append(usual(model, *arguments, weights=weights, **options))
        own = WeightsBesideConstants(WeightsInMemory(_CAPTURED[0].graph), weights)
        return replace(_CAPTURED[0], weights=own)

    monkeypatch.setattr(checkpoint_module, "capture", capture)


@dataclass(frozen=True)
class Whole:
    """A run that was not stopped: its source, what it wrote, and the names that it read."""

    source: Path
    content: dict[str, Any]
    read: list[str]


_WHOLE: list[Whole] = []


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Whole:
    if not _WHOLE:
        folder, names = tmp_path_factory.mktemp("whole"), list[str]()
        read = WeightsInFiles.read
        tiny_mixtral(num_local_experts=MANY).save_pretrained(folder / "dense")
        with monkeypatch.context() as patch:
            patch.setattr(WeightsInFiles, "read", lambda self, name: names.append(name) or read(self, name))
            streamed(folder / "dense", folder / "out")
        _WHOLE.append(Whole(folder / "dense", content(folder / "out"), names))
    return _WHOLE[0]


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ends a run in the place of its write of that number, of all that it keeps in the working folder."""
    write, calls = WorkingFolder._write, 0

    def counted(self: WorkingFolder, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise Stopped
        write(self, *arguments)

    monkeypatch.setattr(WorkingFolder, "_write", counted)


def test_a_run_that_was_stopped_goes_on_with_the_sums_of_all_experts(whole, tmp_path, monkeypatch):
    """Of 24 linears of experts, in five blocks, the first is reached after the head; sums of all after the last."""
    source, output = whole.source, tmp_path / "out"
    for call in (3, 20, 30, 2, 10, 15):
        with monkeypatch.context() as patch:
            stop_at(patch, call)
            with pytest.raises(Stopped):
                streamed(source, output, resume=is_stopped(output))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.run").rglob("*.safetensors")}
    kept: dict[Path, int] = {}

    def look(*_: object) -> None:
        kept.update({path: path.stat().st_mtime_ns for path in done if path.exists()})

    streamed(source, output, resume=True, progress=look)
    assert {path.parent.name for path in done} >= {"linears", "experts", "blocks", "groups"}
    assert kept == done
    assert content(output) == whole.content
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_sums_of_experts_are_refused_and_made_again_as_the_message_says(whole, tmp_path, monkeypatch):
    source, output = whole.source, tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 40)
        with pytest.raises(Stopped):
            streamed(source, output)
    for path in (tmp_path / ".out.run" / "experts").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OffloadError, match=r"experts/.* is damaged .*; delete it and .*blocks"):
        streamed(source, output, resume=True)
    for room in ("experts", "blocks"):
        for path in (tmp_path / ".out.run" / room).iterdir():
            path.unlink()
    streamed(source, output, resume=True)
    assert content(output) == whole.content


def test_the_weights_of_an_expert_are_read_without_those_of_others(whole):
    assert f"{PLACE}.up_proj.{MANY - 1}.weight" in whole.read
    assert not {f"{PLACE}.gate_up_proj", f"{PLACE}.down_proj"} & {*whole.read}


def test_the_plan_counts_experts_and_the_tokens_that_go_to_them(whole, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "few")
    few, many = (
        plan_checkpoint(folder, tmp_path / "out", tokens(), CONFIG, memory="64GiB").needs
        for folder in (tmp_path / "few", whole.source)
    )
    assert few.written == 3 * 4 * (EXPERTS * 2 * 48 * 32)  # three copies of gate and up, in float32
    assert many.written == MANY / EXPERTS * few.written
    assert many.kept - few.kept > (MANY - EXPERTS) * 2 * 4 * 48**2  # gradients at gate and up of each
    assert many.block > few.block
    # As many tokens go to twice the experts, each a half of them.
    assert many.products == pytest.approx(few.products)
    with pytest.raises(OffloadError, match="a tensor of all experts"):
        plan_checkpoint(whole.source, tmp_path / "out", tokens(), CONFIG, memory="1KiB")


@pytest.mark.slow
def test_experts_of_other_classes_stay_dense_and_the_report_says_why(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 4, "intermediate_size_mlp": 64, "moe_layers": [0], "num_experts_per_tok": 1}
    model = transformers.Llama4ForCausalLM._from_config(transformers.Llama4TextConfig(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    report = assert_equal_to_compress(model, tmp_path)
    left = {layer.name: str(layer.skipped) for layer in report.skipped}
    for name in ("gate_up_proj", "down_proj"):
        assert "is no class of experts" in left[f"model.layers.0.feed_forward.experts.{name}"]

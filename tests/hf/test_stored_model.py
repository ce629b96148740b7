import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from pifa_compiler.errors import CheckpointError, ConfigError
from pifa_compiler.hf.stored_model import open_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_model_is_opened_without_values_and_its_tensors_are_read_when_asked_for(folder):
    stored = open_model(folder)
    expected = tiny_llama().state_dict()
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    assert not any(buffer.is_meta for buffer in stored.model.buffers())
    for name, tensor in expected.items():
        assert torch.equal(stored.weights.read(name), tensor)
    assert stored.weights.read("lm_head.weight") is not None  # tied: its place is that of the embedding
    stored.weights.give_back()
    stored.weights.give_back()
    assert stored.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_weights_come_in_the_dtype_asked_for_and_buffers_stay(folder):
    stored = open_model(folder, dtype="bfloat16")
    assert stored.model.dtype == torch.bfloat16
    assert stored.weights.read("model.norm.weight").dtype == torch.bfloat16
    assert stored.weights.read("model.rotary_emb.inv_freq").dtype == torch.float32
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        open_model(folder, dtype="int4")


def test_a_tensor_that_no_file_holds_or_whose_file_is_gone_is_refused(folder):
    stored = open_model(folder)
    with pytest.raises(CheckpointError, match="no file holds the tensor nothing"):
        stored.weights.read("nothing")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="copy or save it again"):
        stored.weights.read("model.norm.weight")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def lose_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size // 2)


def claim_many_numbers(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    first_shard(folder).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def claim_a_long_header(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 10**12) + bytes(64))


def pipe_as_shard(folder: Path) -> None:
    path = first_shard(folder)
    path.unlink()
    os.mkfifo(path)


def folder_as_shard(folder: Path) -> None:
    path = first_shard(folder)
    path.unlink()
    path.mkdir()


def pipe_as_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


def change_index(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps(value))

    return change


def other_shape(folder: Path) -> None:
    path = first_shard(folder)
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: torch.zeros(3, 5)}, path)


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.timeout(60)  # none of these is waited for
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_shard, "is missing"),
        (truncate_shard, "truncated or no safetensors file"),
        (claim_many_numbers, "truncated or no safetensors file"),
        (claim_a_long_header, "truncated or no safetensors file"),
        (pipe_as_shard, "is no file"),
        (folder_as_shard, "is no file"),
        (pipe_as_index, "is no file"),
        (change_index({"weight_map": {"x": "../../etc/passwd"}}), "wanted safetensors files beside it"),
        (change_index({"weight_map": {"x": "/etc/x.safetensors"}}), "wanted safetensors files beside it"),
        (change_index({"weight_map": {"x": 3}}), "no table `weight_map`"),
        (change_index({"weight_map": []}), "no table `weight_map`"),
        (change_index({"weight_map": {}}), "lacks"),
        (change_index([1]), "wanted a JSON object"),
        (other_shape, r"is \[3, 5\], a LlamaForCausalLM of its config.json has"),
        (change_config(vocab_size=65), "a LlamaForCausalLM of its config.json has"),
        (change_config(hidden_size="many"), "that can be read"),
        (change_config(num_attention_heads=0), "that can be read"),
        (change_config(num_hidden_layers=3), r"lacks model\.layers\.2"),
        (change_config(num_hidden_layers=10**9), r"says num_hidden_layers: 1000000000, the files hold \d+ tensors"),
        (change_config(_attn_implementation="someone/kernel"), "code that would be fetched"),
        (change_config(model_type="nothing"), "that can be read"),
        (change_config(quantization_config={"quant_method": "gptq"}), "quantized model; wanted one with plain weights"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_that_are_not_what_they_should_be_are_refused(damage, words, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_to_be(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot reach the Hugging Face Hub for 'nobody/nothing-at-all'"):
        open_model("nobody/nothing-at-all")

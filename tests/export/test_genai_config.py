"""The folder that a KV-cache export makes, in the hands of onnxruntime-genai itself."""

import json
from pathlib import Path

import pytest
import torch
from onnx_models import pifa_llama
from pifa_compiler.export import to_onnx, write_genai_config
from tiny_models import tiny_llama, tiny_tokenizer

from pifa_compiler.errors import ExportError


def test_onnxruntime_genai_writes_what_the_model_writes(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    model = pifa_llama()
    to_onnx(model, tmp_path / "model.onnx", kv_cache=True)
    write_genai_config(model, tmp_path / "model.onnx", tiny_tokenizer())
    opened = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(opened)
    parameters.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(opened, parameters)
    generator.append_tokens([[5, 6, 7, 8]])
    while not generator.is_done():
        generator.generate_next_token()
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_length=24, do_sample=False)
    assert [int(token) for token in generator.get_sequence(0)] == wanted[0].tolist()


def test_the_config_says_what_the_file_holds(tmp_path: Path) -> None:
    found = json.loads(write_genai_config(tiny_llama(), tmp_path / "m.onnx", tiny_tokenizer()).read_text())
    decoder = found["model"]["decoder"]
    assert (decoder["filename"], decoder["num_hidden_layers"]) == ("m.onnx", 2)
    assert (decoder["head_size"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (8, 4, 2)
    assert (found["model"]["eos_token_id"], found["model"]["context_length"]) == (1, 128)
    assert (tmp_path / "tokenizer.json").is_file()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    write_genai_config(tiny_llama(), tmp_path / "m.onnx", tiny_tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    with pytest.raises(ExportError, match="exists already"):
        write_genai_config(tiny_llama(), tmp_path / "m.onnx")
    write_genai_config(tiny_llama(), tmp_path / "m.onnx", tiny_tokenizer(), overwrite=True)
    assert (tmp_path / "tokenizer.json").read_text() != "mine"


def test_a_model_that_never_stops_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=None)
    with pytest.raises(ExportError, match="no eos_token_id"):
        write_genai_config(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []

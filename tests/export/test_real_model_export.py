"""SmolLM2 at density 0.5 as an ONNX file, beside PyTorch."""

import copy
from pathlib import Path

import pytest
import torch
from pifa_compiler.export import generate_greedily, session, to_onnx
from real_model import smollm2

from pifa_compiler import CompressConfig, compress


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_writes_the_same_64_tokens_with_and_without_the_native_operator(tmp_path: Path) -> None:
    dense, tokenizer = smollm2()
    model = copy.deepcopy(dense)
    texts = ["The capital of France is", "Low-rank matrices are made of two thin factors, and"]
    batch = tokenizer(texts[1], return_tensors="pt")
    compress(model, [batch["input_ids"]], CompressConfig(0.5, "svd"))
    exported = to_onnx(model, tmp_path / "model.onnx", kv_cache=True, check=True)
    assert exported.error is not None
    assert exported.error < 1e-4
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    assert not padded["attention_mask"].all()
    wanted = model.generate(**padded, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    for native in (False, True):
        opened = session(tmp_path / "model.onnx", native=native)
        assert torch.equal(generate_greedily(opened, padded["input_ids"], padded["attention_mask"], 64), wanted)

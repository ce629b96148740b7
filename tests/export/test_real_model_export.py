"""SmolLM2 at density 0.5 as an ONNX file, beside PyTorch."""

import copy
import re
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pifa_compiler.export import generate_greedily, session, to_onnx
from real_model import smollm2

from pifa_compiler import CompressConfig, compress


def first_logits(opened: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a first pass, with an empty past."""
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in opened.get_inputs()[2:]
    }
    feed = {"input_ids": tokens.numpy(), "attention_mask": np.ones(tokens.shape, np.int64), **past}
    return torch.from_numpy(opened.run(["logits"], feed)[0])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_writes_the_same_64_tokens_with_and_without_the_native_operator(tmp_path: Path) -> None:
    dense, tokenizer = smollm2()
    model = copy.deepcopy(dense)
    text = " ".join(line for line in (getdoc(part) or "" for part in (str, dict, list, re, Path)) if line)
    texts = ["The capital of France is", "Low-rank matrices are made of two thin factors, and"]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    compress(model, [tokens], CompressConfig(density=0.5))
    assert to_onnx(model, tmp_path / "model.onnx", kv_cache=True, check=True).layers == 210
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    assert not padded["attention_mask"].all()
    wanted = model.generate(**padded, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    with torch.no_grad():
        wanted_logits = model(tokens).logits
    for native in (False, True):
        opened = session(tmp_path / "model.onnx", native=native)
        logits = first_logits(opened, tokens)
        # PyTorch's own float32 logits are off by some 3e-6 of the largest here.
        assert (logits - wanted_logits).abs().max() <= 1e-4 * wanted_logits.abs().max()
        assert torch.equal(generate_greedily(opened, padded["input_ids"], padded["attention_mask"], 64), wanted)

"""The main job on real weights: SmolLM2-135M compressed, saved, loaded, compiled, writing text."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import smollm2
from torch import nn

import pifa_compiler as pc
from pifa_compiler.hf.generate import compile_step, generate, prompt_tokens
from pifa_compiler.hf.perplexity import perplexity
from pifa_compiler.hf.text import calibration_batches, evaluation_batches
from pifa_compiler.modules import count_numbers

# The model is compressed once for all of them, which takes longer where others compete for the cores.
pytestmark = pytest.mark.timeout(900)


EVERY_TENTH_BLOCK = ("*.layers.[1-9].*", "*.layers.?[1-9].*")  # the patterns of what is skipped


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(EVERY_TENTH_BLOCK, id="every tenth block"),
        pytest.param((), id="all blocks", marks=pytest.mark.slow),
    ],
)
def compressed(request: pytest.FixtureRequest) -> tuple[Any, Any, pc.Report]:
    """The model at density 0.7 in place, its tokenizer and the report; one short window calibrates it."""
    dense, tokenizer = smollm2()
    model = copy.deepcopy(dense)
    batches = calibration_batches("pydoc", model, tokenizer, samples=1, seqlen=512)
    report = pc.compress(model, batches, pc.CompressConfig(density=0.7, rank_multiple=16, skip=request.param))
    return model, tokenizer, report


def test_the_report_is_true_of_the_model(compressed):
    model, _, report = compressed
    left = [layer for layer in report.layers if not layer.target]
    assert sum(layer.target for layer in report.layers) in (21, 210)  # seven linears a block
    assert [layer.name for layer in left if not layer.skipped.startswith("skipped by pattern")] == ["lm_head"]
    assert 0.69 < report.density <= 0.7
    assert all(layer.stored_after < layer.stored_before for layer in report.factorized)
    assert report.notes == []  # the output gradients were taken
    assert report.params_before == 134_515_008
    assert report.params_after == count_numbers(model)
    for layer in report.factorized:
        # gate and up share their pivot rows: the product of their coefficients is bounded, not each by itself, and
        # even a coefficient of 16 costs float32 no more than four of its 24 bits.
        shared = layer.name.endswith(("gate_proj", "up_proj"))
        assert layer.quality.max_coeff < (16 if shared else 1.1), layer.name


def test_perplexity_is_that_of_the_same_model_as_pairs(compressed):
    """To 5 digits in float32. The pairs are U = Q, V = R w_pivot, with Q R the QR of the rows' coefficients."""
    model, tokenizer, report = compressed
    windows = evaluation_batches("pydoc", model, tokenizer, seqlen=512, limit=1)
    wanted = perplexity(model, windows).perplexity
    pifa = {layer.name: model.get_submodule(layer.name) for layer in report.factorized}
    try:
        for name, layer in pifa.items():
            rows = torch.cat((torch.eye(layer.rank), layer.coeff.detach()))[layer.row_order()].double()
            q, r = torch.linalg.qr(rows)
            u, v = (
                nn.Linear(layer.rank, layer.out_features, bias=False),
                nn.Linear(layer.in_features, layer.rank, bias=False),
            )
            u.weight.data, v.weight.data = q.float(), (r @ layer.w_pivot.detach().double()).float()
            model.set_submodule(name, nn.Sequential(v, u))
        assert perplexity(model, windows).perplexity == pytest.approx(wanted, rel=1e-5)
    finally:
        for name, layer in pifa.items():
            model.set_submodule(name, layer)


def test_perplexity_rises_by_less_than_half_of_what_truncated_weights_of_the_same_ranks_cost(compressed):
    """The yardstick looks at no data: each dense weight is replaced by its nearest of the rank that the layer has."""
    model, tokenizer, report = compressed
    windows = evaluation_batches("pydoc", model, tokenizer, seqlen=512, limit=1)
    yardstick = copy.deepcopy(smollm2()[0])
    losses = {"dense": math.log(perplexity(yardstick, windows).perplexity)}
    for layer in report.factorized:
        weight = yardstick.get_submodule(layer.name).weight
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        weight.data = (u[:, : layer.rank] * s[: layer.rank]) @ vh[: layer.rank]
    losses["truncated"] = math.log(perplexity(yardstick, windows).perplexity)
    losses["compressed"] = math.log(perplexity(model, windows).perplexity)
    rise = {name: loss - losses["dense"] for name, loss in losses.items()}
    assert 0 < rise["compressed"] < rise["truncated"] / 2


def test_save_load_and_generate_compiled(compressed, tmp_path: Path):
    model, tokenizer, report = compressed
    pc.save_pretrained(model, tmp_path / "smol", tokenizer=tokenizer, report=report)
    size = sum(file.stat().st_size for file in (tmp_path / "smol").rglob("*.safetensors"))
    assert size == pytest.approx(4 * report.params_after, rel=0.001)  # float32, int32 and a header
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smol")
    prompt = prompt_tokens(loaded, tokenizer, "The capital of France is", 12)
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    eager = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    step = compile_step(loaded, "pifa")
    assert generate(loaded, prompt, 12, step=step).tokens == eager

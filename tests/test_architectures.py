"""Tiny models of many architectures: compressed, compiled, saved, loaded and made to generate."""

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, Call
from programs import quiet
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch.utils import _pytree as pytree

import pifa_compiler as pc
from pifa_compiler.experts import PifaGroupedLinear

transformers = pytest.importorskip("transformers")

QUICK = ("DeepSeek-V2", "ALBERT", "T5", "CLIP", "Wav2Vec2", "Qwen2-VL", "nn.MultiheadAttention")


def outputs_of(model: nn.Module, call: Call) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(dict(found) if isinstance(found := model(**call), dict) else found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_report(report: pc.Report, model: nn.Module, architecture: Architecture) -> None:
    """The report is true of the model, and says what of the model stays as it was."""
    kinds = (pc.PifaLinear, PifaGroupedLinear)
    pifa = {key: module for key, module in model.named_modules() if isinstance(module, kinds)}
    assert pifa.keys() == {layer.name for layer in report.factorized} != set()
    assert report.density <= 0.7
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert report.params_after == stored + sum(module.pivots.numel() for module in pifa.values())
    kept = sum(layer.stored_after for layer in report.factorized)
    assert report.untouched == report.params_after - kept
    assert sum(other.numbers for other in report.others) <= report.untouched
    assert len(report.notes) == len(architecture.notes)
    for words in architecture.notes:
        assert any(words in note for note in report.notes)
    known = ("allocator", "output head", "tied to an embedding", "no rank takes fewer", "not reached", "router")
    known += ("is no class of experts", "Router") if architecture.dense else ()
    assert [layer for layer in report.skipped if not any(words in str(layer.skipped) for words in known)] == []
    usual = ("Embedding", "Norm", "Conv", "PifaLinear", "PifaGroupedLinear", "Linear")
    left = {other.kind for other in report.others if other.numbers >= 3000 and not any(u in other.kind for u in usual)}
    assert left == (
        {architecture.dense} if architecture.dense else left & {"XLNetRelativeAttention", "ParametrizationList"}
    )


def check_saved(model: nn.Module, call: Call, folder: str) -> None:
    """What is saved loads, bit by bit."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, outputs_of(again, call), outputs_of(model, call)))


def check_generates(model: nn.Module, call: Call) -> None:
    given = {key: value for key, value in call.items() if not key.startswith("decoder")}
    generated = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] >= 3  # Whisper leaves out the token that it starts from


def check_compiled(model: nn.Module, call: Call, follows_other_code: bool) -> None:
    """Compiled, it computes the same in float32, to the order of sums through some layers."""
    torch._dynamo.reset()
    wanted = outputs_of(model, call)
    if follows_other_code:
        captured = outputs_of(torch.compile(model, backend="eager"), call)
        assert not are_close(captured, wanted)
        wanted = captured
        torch._dynamo.reset()
    assert are_close(outputs_of(torch.compile(model, backend="pifa"), call), wanted)


def are_close(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(bool((g - w).abs().max() <= 1e-5 * w.abs().max()) for g, w in zip(got, wanted, strict=True))


def check(architecture: Architecture, folder: str) -> None:
    torch.manual_seed(0)
    model, batches = architecture.make().eval(), [architecture.call() for _ in range(2)]
    outputs_of(model, batches[0])  # RWKV scales its weights at the first call
    report = pc.compress(model, batches, pc.CompressConfig(density=0.7, rank_multiple=1))
    check_report(report, model, architecture)
    assert all(torch.isfinite(value).all() for value in outputs_of(model, batches[0]))
    if isinstance(model, transformers.PreTrainedModel):
        check_saved(model, batches[0], folder)
        if model.can_generate():
            check_generates(model, batches[0])
    check_compiled(model, batches[0], architecture.follows_other_code)


@pytest.mark.parametrize(
    "architecture", [each for each in ARCHITECTURES if each.shown in QUICK], ids=lambda each: each.shown
)
def test_an_architecture_goes_all_the_way(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, example_inputs, **options: gm.forward)
    with quiet():
        check(architecture, str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what models, Dynamo and Inductor warn of on the way is the same without us
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.shown)
def test_every_architecture_goes_all_the_way_with_generated_code(architecture, tmp_path):
    check(architecture, str(tmp_path))

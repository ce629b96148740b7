"""LoRA on PIFA layers, with the real PEFT."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

import pifa_compiler as pc
from pifa_compiler import dense_weight
from pifa_compiler.errors import ConfigError, RankError, WeightError

peft = pytest.importorskip("peft")

# PEFT's own: it asks transformers 5 for an attribute by its former name (peft 0.21).
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def model(*, keep_dense: tuple[str, ...] = ("*.down_proj",)) -> nn.Module:
    """A compressed Llama, of which some layers stay as they were."""
    made = tiny_llama()
    pc.compress(made, batches(), pc.CompressConfig(density=0.6, rank_multiple=1, skip=keep_dense))
    return made


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (2, 24), generator=generator) for _ in range(2)]


def config(**options: object) -> "peft.LoraConfig":
    return peft.LoraConfig(**({"target_modules": TARGETS, "r": 3, "lora_alpha": 6} | options))


def trained(made: nn.Module, name: str = "default", *, seed: int = 5) -> None:
    """Fills an adapter's B, zero until it is trained, with numbers."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in made.named_parameters():
        if "lora_B" in key and f".{name}." in key:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(made: nn.Module) -> torch.Tensor:
    found: torch.Tensor = made(batches()[0]).logits
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    return model()


@pytest.fixture
def base(compressed: nn.Module) -> nn.Module:
    return copy.deepcopy(compressed)


@pytest.fixture
def adapted(base: nn.Module) -> nn.Module:
    made = peft.get_peft_model(base, config()).eval()
    trained(made)
    return made


def written(made: nn.Module) -> nn.Module:
    """The same model with nn.Linear layers that hold W + scaling B A: what LoRA means."""
    plain = copy.deepcopy(made.get_base_model())
    for name, layer in list(plain.named_modules()):
        if not isinstance(layer, peft.tuners.lora.layer.Linear):
            continue
        weight = layer.get_base_layer().weight.detach().double().clone()
        for each in layer.active_adapters:
            weight += layer.scaling[each] * layer.lora_B[each].weight.double() @ layer.lora_A[each].weight.double()
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = nn.Parameter(weight.float().detach())
        plain.set_submodule(name, dense)
    return plain


def test_adapters_start_without_effect_and_then_add_to_the_weight(base):
    before = logits(base)
    made = peft.get_peft_model(base, config()).eval()
    assert torch.equal(logits(made), before)
    trained(made)
    assert difference(logits(made), before) > 1e-3
    assert difference(logits(made), logits(written(made))) < 1e-5  # products in float32 in another order
    with made.disable_adapter():
        assert torch.equal(logits(made), before)


def test_the_dense_weight_is_never_put_together(base, monkeypatch):
    monkeypatch.setattr(dense_weight, "put_together", lambda *_: pytest.fail("the weight was read"))
    made = peft.get_peft_model(base, config(target_modules=["q_proj", "v_proj"]))
    made(batches()[0], labels=batches()[0]).loss.backward()


def test_training_moves_the_adapters_alone_as_it_does_beside_a_dense_weight(base):
    made = peft.get_peft_model(base, config()).eval()
    trained(made)
    plain = peft.get_peft_model(dense_copy(base), config()).eval()
    adapters = {name: value for name, value in made.state_dict().items() if "lora_" in name}
    assert not plain.load_state_dict(adapters, strict=False).unexpected_keys
    tokens = batches()[0]
    for each in (made, plain):
        each(tokens, labels=tokens).loss.backward()
    ours, theirs = (dict(each.named_parameters()) for each in (made, plain))
    learned = [name for name, parameter in ours.items() if parameter.grad is not None]
    assert learned
    assert all("lora_" in name for name in learned)
    for name in learned:
        assert difference(ours[name].grad, theirs[name].grad) < 1e-4


def dense_copy(adapted_base: nn.Module) -> nn.Module:
    """The compressed model below an adapter, with nn.Linear in place of PIFA layers, and without the adapter."""
    plain = tiny_llama()
    layers = {name.replace(".base_layer", ""): layer for name, layer in adapted_base.named_modules()}
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(layers[name].weight.detach().clone())
    return plain


def test_adapters_are_saved_and_loaded_over_a_saved_pifa_model(adapted, tmp_path):
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any("pivot" in path.name for path in (tmp_path / "adapter").iterdir())
    again = model()
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), wanted)


def test_several_adapters_are_switched_and_mixed_in_a_batch(adapted):
    first = logits(adapted)
    adapted.add_adapter("other", config(r=2))
    trained(adapted, "other", seed=9)
    adapted.set_adapter("other")
    second = logits(adapted)
    assert difference(second, first) > 1e-3
    with torch.no_grad():
        mixed = adapted(batches()[0], adapter_names=["default", "other"]).logits
    assert difference(mixed[0], first[0]) < 1e-6
    assert difference(mixed[1], second[1]) < 1e-6


def test_merging_is_refused_with_the_reason_and_the_way(adapted):
    before = logits(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(WeightError, match=r"merge_lora\(model\)"):
            merge()
    assert torch.equal(logits(adapted), before)


def test_merge_lora_loses_nothing_and_says_what_ranks_became(adapted, tmp_path):
    wanted = logits(adapted)
    ranks = {name: layer.rank for name, layer in adapted.get_base_model().named_modules() if hasattr(layer, "rank")}
    report = pc.merge_lora(adapted)
    merged = adapted.get_base_model()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert difference(logits(merged), wanted) < 1e-5
    for layer in report.layers:
        assert layer.rank == ranks[f"{layer.name}.base_layer"] + 3
        assert "of rank 3 merged" in layer.notes[0]
    pc.save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(pc.load_pretrained(tmp_path / "merged").eval()), logits(merged))


def test_merge_lora_at_the_same_rank_takes_the_nearest_weight(adapted):
    weights = {name: layer for name, layer in written(adapted).named_modules() if isinstance(layer, nn.Linear)}
    report = pc.merge_lora(adapted, lossless=False)
    for layer in report.layers:
        found, weight = adapted.get_base_model().get_submodule(layer.name), weights[layer.name].weight.detach().double()
        values = torch.linalg.svdvals(weight)
        best = float(values[layer.rank :].square().sum().sqrt())
        assert found.rank == layer.rank
        assert float((found.weight.detach().double() - weight).norm()) < 1.001 * best
        assert f"{best / float(weight.norm()):.1e} of the weight's norm is lost" in layer.notes[0]


def test_an_adapter_that_is_not_finite_leaves_the_model_as_it_was(adapted):
    name, parameter = next((n, p) for n, p in adapted.named_parameters() if "v_proj.lora_B" in n)
    parameter.data.fill_(float("nan"))
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    with pytest.raises(RankError, match="v_proj with adapters default"):
        pc.merge_lora(adapted)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) or key == name for key in before)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")],
)
def test_adapters_that_want_a_stored_weight_are_refused(options, words, base):
    with pytest.raises(ConfigError, match=words):
        peft.get_peft_model(base, config(target_modules=["q_proj"], **options))


def test_what_has_no_adapters_is_refused(base):
    with pytest.raises(ConfigError, match="wanted a model with adapters"):
        pc.merge_lora(base)
    made = peft.get_peft_model(base, config(target_modules=["down_proj"]))
    with pytest.raises(ConfigError, match="no active adapter is on a PIFA layer"):
        pc.merge_lora(made)


def test_adapters_on_the_factors_are_the_other_way(base, tmp_path):
    before = logits(base)
    names = [name for name, _ in base.named_parameters() if name.endswith(("q_proj.w_pivot", "q_proj.coeff"))]
    made = peft.get_peft_model(base, peft.LoraConfig(target_modules=[], target_parameters=names, r=2)).eval()
    assert torch.equal(logits(made), before)
    tokens = batches()[0]
    made(tokens, labels=tokens).loss.backward()
    assert any(parameter.grad is not None for name, parameter in made.named_parameters() if "lora_B" in name)
    trained(made)
    changed = logits(made)
    assert difference(changed, before) > 1e-3
    merged = made.merge_and_unload()
    assert difference(logits(merged), changed) < 1e-5


def test_an_adapted_model_is_compiled(adapted):
    compiled = torch.compile(adapted, backend="pifa")
    assert difference(logits(compiled), logits(adapted)) < 1e-5


@pytest.mark.parametrize("first", ["peft", "pifa_compiler"])
def test_either_package_may_be_imported_first(first, tmp_path: Path):
    second = {"peft": "pifa_compiler", "pifa_compiler": "peft"}[first]
    code = (
        f"import {first}\nimport {second}\nimport torch, peft, pifa_compiler as pc\n"
        "net = torch.nn.Sequential(pc.PifaLinear(8, 6, 3))\n"
        "made = peft.get_peft_model(net, peft.LoraConfig(target_modules=['0']))\n"
        "print(type(made.base_model.model[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "PifaLora\n", done.stderr

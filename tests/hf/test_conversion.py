"""What transformers makes of the tensors in files when it loads a model, and what of that is read by itself."""

from pathlib import Path

import pytest
import torch
from expert_models import EXPERTS, tiny_mixtral
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.core_model_loading import Chunk, MergeModulelist, Transpose, WeightConverter

from pifa_compiler.errors import CheckpointError
from pifa_compiler.exchange.expert_layers import experts_as_layers
from pifa_compiler.hf import conversion
from pifa_compiler.hf.conversion import Origin, Part
from pifa_compiler.hf.stored_model import StoredModel, open_model

PLACE = "model.layers.0.mlp.experts"


def gpt_oss() -> nn.Module:
    """Experts whose files have them as they are in memory, transposed and with biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": EXPERTS}
    return GptOssForCausalLM(GptOssConfig(**sizes)).eval()


def opened(model: nn.Module, folder: Path, **options: str) -> StoredModel:
    model.save_pretrained(folder, max_shard_size="30KB")
    return open_model(folder, **options)


@pytest.mark.parametrize("make", [tiny_mixtral, gpt_oss])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_are_those_that_transformers_loads(make, dtype, tmp_path):
    stored = opened(make(), tmp_path / "m", **({} if dtype is None else {"dtype": dtype}))
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype or "auto").eval()
    for name, tensor in wanted.state_dict().items():
        assert stored.weights.read(name).dtype == tensor.dtype
        assert torch.equal(stored.weights.read(name), tensor), name
    stored.weights.give_back()
    with experts_as_layers(stored.model, in_files=True) as found, experts_as_layers(wanted) as layers:
        stored.weights.add_views(found.views())
        assert found.views().keys() == layers.views().keys() != set()
        stored.weights.expect(found.views())
        for name in reversed(found.views()):
            expert, own = stored.weights.read(name), wanted.get_parameter(name)
            assert torch.equal(expert, own), name
            assert expert.stride() == own.stride()


def parts(*names: str) -> tuple[Part, ...]:
    return tuple(Part(Path("f"), name, name.partition(".")[0]) for name in names)


def test_an_entry_is_made_alone_only_where_nothing_else_goes_into_it():
    merged = WeightConverter("w", "x", [MergeModulelist(dim=0)])
    of_all = Origin("x", parts("w.0", "w.1"), merged)
    assert of_all.entry(1) == Origin("x", parts("w.1"), merged)
    for operations in ([MergeModulelist(dim=1)], [MergeModulelist(dim=0), Transpose(0, 1)], [Chunk(dim=0)]):
        assert Origin("x", parts("w.0", "w.1"), WeightConverter("w", "x", operations)).entry(1) is None
    assert Origin("x", parts("w.0")).entry(0) is None


def test_an_expert_that_is_missing_or_of_another_shape_is_refused(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=rf"{PLACE}.down_proj is \[3, 32, 48\], a MixtralForCausalLM"):
        open_model(tmp_path)
    save_file(tensors | {name: torch.zeros(3, 5)}, path)
    with pytest.raises(CheckpointError, match=rf"cannot make {PLACE}.down_proj .* from .*w2.weight and others"):
        open_model(tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if ".w2." not in key}, path)
    with pytest.raises(CheckpointError, match=rf"lacks {PLACE}.down_proj of a MixtralForCausalLM: it is incomplete"):
        open_model(tmp_path)


def test_tensors_that_would_be_taken_for_others_when_they_are_loaded_again_are_refused(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    renaming = conversion._renaming

    def other(model: nn.Module):
        rename, converters = renaming(model)
        return (lambda name: ("model.norm.weight", None) if "0.input_layernorm" in name else rename(name)), converters

    monkeypatch.setattr(conversion, "_renaming", other)
    with pytest.raises(CheckpointError, match=r"would take .*0.input_layernorm.weight .* for model.norm.weight"):
        conversion.check_own_names(tiny_llama())

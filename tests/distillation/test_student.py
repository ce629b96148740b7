"""The copy that is trained, and its way back into the model."""

from pathlib import Path

import pytest
import torch
from expert_models import put_experts_in_pifa_form, tiny_mixtral
from tiny_models import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM

from pifa_compiler.distillation.student import Student, blocks_of, trained_names
from pifa_compiler.errors import ConfigError, OffloadError
from pifa_compiler.factors import factorize
from pifa_compiler.modules import replace_linear, storage_of


@pytest.fixture
def model() -> LlamaForCausalLM:
    """One layer in PIFA form."""
    model = tiny_llama(attention_bias=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    replace_linear(model, "model.layers.0.mlp.up_proj", factorize(weight.detach(), rank=5))
    return model


FACTORS = ["model.layers.0.mlp.up_proj.w_pivot", "model.layers.0.mlp.up_proj.coeff"]


def test_kinds_and_patterns_name_parameters(model: nn.Module) -> None:
    assert trained_names(model, ("factors",)) == FACTORS
    norms = trained_names(model, ("norms",))
    assert len(norms) == 5
    assert all(name.endswith("norm.weight") for name in norms)
    assert all(name.endswith("_proj.bias") for name in trained_names(model, ("biases",)))
    assert trained_names(model, ("*.1.*up_proj.weight", "factors")) == [*FACTORS, "model.layers.1.mlp.up_proj.weight"]


def test_what_names_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no parameter of LlamaForCausalLM is called '\*.w_pivots'"):
        trained_names(model, ("*.w_pivots",))
    with pytest.raises(ConfigError, match="has none of factors to train: compress"):
        trained_names(tiny_llama(), ("factors",))


def test_a_student_is_trained_while_the_model_stays_the_same_on_disk(model: nn.Module, tmp_path: Path) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_()
    model.train()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    places = {name: storage_of(each) for name, each in model.named_parameters()}
    with Student(model, FACTORS, torch.device("cpu"), tmp_path) as student:
        theirs, ours = dict(student.copy.named_parameters()), dict(model.named_parameters())
        assert [name for name, each in theirs.items() if each.requires_grad] == FACTORS == list(student.parameters)
        assert all(each.requires_grad for each in ours.values())
        assert model.training
        assert not student.copy.training
        assert not {storage_of(each) for each in ours.values()} & {*places.values(), *map(storage_of, theirs.values())}
        assert not list(tmp_path.iterdir())  # the file has no name
        with torch.no_grad():
            for each in student.parameters.values():
                each.add_(1)
        assert all(torch.equal(each, before[name]) for name, each in ours.items())
        on_disk = {name: each.data_ptr() for name, each in ours.items()}
        student.give_back(student.values())
        assert all(each.data_ptr() != on_disk[name] for name, each in ours.items())
    assert all(torch.equal(ours[name], before[name] + (name in FACTORS)) for name in ours)


def test_values_return_from_disk_if_nothing_comes_back(model: nn.Module, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with Student(model, FACTORS, torch.device("cpu"), tmp_path):
        on_disk = {name: each.data_ptr() for name, each in model.state_dict().items()}
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.data_ptr() != on_disk[name] for name, each in model.state_dict().items())


def test_what_is_shared_stays_shared(model: nn.Module, tmp_path: Path) -> None:
    teacher = tiny_llama(attention_bias=True)
    teacher.model.embed_tokens.weight = model.model.embed_tokens.weight
    model.model.layers[0].input_layernorm.weight.data = teacher.model.layers[0].input_layernorm.weight.data
    teacher.model.norm.weight.data[0] += 1
    both = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    places = [storage_of(model.get_parameter(name)) for name in both]
    with Student(model, FACTORS, torch.device("cpu"), tmp_path, teacher) as student:
        theirs, known = dict(student.copy.named_parameters()), dict(teacher.named_parameters())
        shared = {name for name in theirs.keys() & known if storage_of(theirs[name]) == storage_of(known[name])}
        assert shared == {name for name in theirs.keys() & known if torch.equal(theirs[name], known[name])}
        assert {*both, "model.layers.1.mlp.up_proj.weight"} <= shared
        assert "model.norm.weight" not in shared
    assert [storage_of(each.get_parameter(name)) for name in both for each in (model, teacher)] == [
        place for place in places for _ in range(2)
    ]


def test_a_folder_that_cannot_be_written_leaves_the_model_alone(model: nn.Module, tmp_path: Path) -> None:
    places = [storage_of(each) for each in model.parameters()]
    with pytest.raises(OffloadError, match="cannot be written"):
        Student(model, FACTORS, torch.device("cpu"), tmp_path / "none")
    assert [storage_of(each) for each in model.parameters()] == places


def test_values_return_in_the_models_dtype(model: nn.Module, tmp_path: Path) -> None:
    model.to(torch.bfloat16)
    student = Student(model, FACTORS, torch.device("cpu"), tmp_path)
    assert {each.dtype for each in student.copy.parameters()} == {torch.float32}
    student.give_back({name: value + 0.001 for name, value in student.values().items()})
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_all_values_return_or_none(model: nn.Module, tmp_path: Path) -> None:
    student = Student(model, FACTORS, torch.device("cpu"), tmp_path)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    odd = {name: value + 1 for name, value in student.values().items()}
    odd[FACTORS[1]] = torch.ones(3, device="meta")  # has no values to return
    with pytest.raises(NotImplementedError, match="meta"):
        student.give_back(odd)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_computing_twice_changes_no_gradient(model: nn.Module, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (1, 12))
    found = []
    for twice in (False, True):
        student = Student(model, FACTORS, torch.device("cpu"), tmp_path)
        if twice:
            student.compute_twice()
        student.copy(ids, use_cache=False).logits.square().sum().backward()
        found.append([each.grad for each in student.parameters.values()])
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)
    assert len(blocks_of(model)) == 2


def test_factors_of_experts_are_trained(tmp_path: Path) -> None:
    mixture = tiny_mixtral()
    put_experts_in_pifa_form(mixture, names=["down_proj"])
    names = [f"model.layers.0.mlp.experts.pifa.down_proj.{part}" for part in ("w_pivot", "coeff")]
    assert trained_names(mixture, ("factors",)) == names
    student = Student(mixture, names, torch.device("cpu"), tmp_path)
    tokens = torch.arange(12).reshape(2, 6)
    student.copy(tokens).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters.values())

"""Layers that compress and compact leave as they are, because another in their place would not do the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import pifa_compiler as pc
from pifa_compiler.exchange.allowed import Exchangeable
from pifa_compiler.graph.capture import capture

CONFIG = pc.CompressConfig(density=0.6, rank_multiple=1, gradients=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def reasons(report: pc.Report) -> dict[str, str]:
    return {layer.name: str(layer.skipped) for layer in report.skipped}


def compressed(model: nn.Module) -> dict[str, str]:
    """Compresses and says why layers were left; those have to be the same objects as before."""
    before = dict(model.named_modules())
    found = reasons(pc.compress(model, [torch.randn(40, 16)], CONFIG))
    assert all(model.get_submodule(name) is before[name] for name in found if name in before)
    return found


HOOKS = {
    "forward hooks": lambda layer: layer.register_forward_hook(lambda module, x, y: 3 * y),
    "forward pre hooks": lambda layer: layer.register_forward_pre_hook(lambda module, x: (3 * x[0],)),
    "backward hooks": lambda layer: layer.register_full_backward_hook(lambda module, x, y: None),
    "state dict hooks": lambda layer: layer.register_state_dict_post_hook(lambda *arguments: None),
    "load state dict pre hooks": lambda layer: layer.register_load_state_dict_pre_hook(lambda *arguments: None),
    "weight has hooks": lambda layer: layer.weight.register_hook(lambda gradient: 2 * gradient),
    "forward is replaced": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight) * 3),
    "layer has scale beside its weight": lambda layer: layer.register_buffer("scale", torch.ones(())),
    "layer has probe": lambda layer: setattr(layer, "probe", nn.Module),
}


@pytest.mark.parametrize("words", HOOKS)
@pytest.mark.parametrize("door", ["compress", "compact"])
def test_what_was_put_on_a_layer_keeps_it_where_it_is(words: str, door: str) -> None:
    model, x = Mlp(), torch.randn(40, 16)
    model.a.weight.data = torch.randn(24, 2) @ torch.randn(2, 16)
    HOOKS[words](model.a)
    layer, wanted = model.a, model.a(x)
    report = pc.compact(model, x) if door == "compact" else pc.compress(model, [x], CONFIG)
    assert words in reasons(report)["a"]
    assert model.a is layer
    assert torch.equal(model.a(x), wanted)


def test_values_that_were_set_on_a_layer_go_along() -> None:
    model = Mlp()
    model.a.scale_init = 0.5
    compressed(model)
    assert isinstance(model.a, pc.PifaLinear)
    assert model.a.scale_init == 0.5


class Reads(Mlp):
    """`more` reads the layers' parameters in its own way."""

    more: Any

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + type(self).more(self, x)


READERS = {
    "weight is computed from a.weight by mul": lambda self, x: F.linear(x, self.a.weight * 4)[:, :16],
    "weight is computed from a.weight by tanh": lambda self, x: F.linear(x, torch.tanh(self.a.weight))[:, :16],
    "weight is computed from a.weight by slice": lambda self, x: F.linear(x, self.a.weight[:16]),
    "weight is read by Reads itself, by sum": lambda self, x: self.a.weight.sum(),
    "weight is read by Reads itself, by linear_2": lambda self, x: F.linear(x, self.a.weight)[:, :16],
    "bias is read by Reads itself, by slice": lambda self, x: self.a.bias[:16],
}


@pytest.mark.parametrize("words", READERS)
def test_a_parameter_that_others_read_stays_as_it_is(words: str) -> None:
    model = Reads()
    type(model).more = READERS[words]
    assert words in compressed(model)["a"]
    assert isinstance(model.b, pc.PifaLinear)


def test_a_weight_that_is_divided_beside_a_residual_is_left_alone() -> None:
    class Scaled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.linear(torch.relu(self.a(x)), self.b.weight / 2)

    model, x = Scaled(), torch.randn(40, 16)
    model.a.weight.data = torch.randn(24, 5) @ torch.randn(5, 16)
    wanted = model(x)
    report = pc.compress(model, [x], pc.CompressConfig(ranks={"a": 5}, rank_multiple=1))
    assert reasons(report) == {"b": "weight is computed from b.weight by div"}
    # a is of rank 5 already; the damping of two-sided moves it by some 1e-3 of its size.
    assert (model(x) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_weight_is_left_alone(norm: Any) -> None:
    model = Mlp()
    norm(model.a)
    model.eval()
    found = compressed(model)
    assert found["a"].startswith("weight is computed from a.parametrizations.weight.original")
    assert parametrize.is_parametrized(model.a)
    assert "parametrization" in reasons(pc.compact(Mlp_with(model.a), torch.randn(3, 16)))["0"]


def Mlp_with(layer: nn.Module) -> nn.Module:  # noqa: N802
    return nn.Sequential(layer, nn.ReLU())


def test_a_layer_called_by_others_than_its_own_forward_is_left_with_the_caller() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.out = nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True), nn.Linear(16, 16)
            self.own = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(self.mha(x, x, x, need_weights=False)[0], self.own))

    model = Attention()
    found = reasons(pc.compress(model, [torch.randn(4, 6, 16)], CONFIG))
    assert "weight is read by MultiheadAttention itself (mha)" in found["mha.out_proj"]
    assert found["mha.in_proj_weight"] == (
        "weight is a parameter of MultiheadAttention itself, not of a linear layer; put it into an nn.Linear"
    )
    assert "a parameter of Attention itself" in found["own"]
    assert isinstance(model.out, pc.PifaLinear)


class Plain(nn.Linear):
    """As Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class LouderInTraining(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2 if self.training else super().forward(input)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "is_linear"), [(Plain, True), (Louder, False), (LouderInTraining, False)])
def test_a_subclass_is_a_linear_if_its_code_computes_the_same(kind: type, is_linear: bool, bias: bool) -> None:
    model, x = Mlp(), torch.randn(40, 16)
    model.a = kind(16, 24, bias=bias)
    model.a.weight.data = torch.randn(24, 3) @ torch.randn(3, 16)
    model.eval()
    other, wanted = copy.deepcopy(model), model(x)
    report = pc.compact(model, x)
    assert isinstance(model.a, pc.PifaLinear) is is_linear
    assert is_linear or "not known to compute what nn.Linear does" in reasons(report)["a"]
    assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    pc.compress(other, [x], CONFIG)
    assert isinstance(other.a, pc.PifaLinear) is is_linear


class Doubled(Tensor):
    pass


def tied(model: Mlp) -> None:
    model.register_parameter("also", model.a.weight)


def named_twice(model: Mlp) -> None:
    model.again = model.a


def kept_in_a_list(model: Mlp) -> None:
    model.layers = [model.a]


def bound_to_an_attribute(model: Mlp) -> None:
    model.project = model.a.forward


def view_in_a_buffer(model: Mlp) -> None:
    model.register_buffer("view", model.a.weight.detach()[:2])


def view_in_an_attribute(model: Mlp) -> None:
    model.transposed = {"of a": model.a.weight.detach().T}


def of_another_kind(model: Mlp) -> None:
    model.a.weight = nn.Parameter(model.a.weight.detach().as_subclass(Doubled))


def half_precision(model: Mlp) -> None:
    model.a.weight = nn.Parameter(model.a.weight.detach().to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (tied, "weight is tied to also"),
        (named_twice, "layer is used elsewhere too, as again"),
        (kept_in_a_list, "layer is used elsewhere too, as layers"),
        (bound_to_an_attribute, "layer is used elsewhere too, as project"),
        (view_in_a_buffer, "weight is tied to view"),
        (view_in_an_attribute, "weight is tied to transposed"),
        (of_another_kind, "weight is a Doubled"),
        (half_precision, "weight is no plain floating-point tensor: torch.float8_e4m3fn"),
    ],
)
def test_a_layer_that_is_not_its_parents_alone_is_left(share: Any, words: str) -> None:
    model = Mlp()
    share(model)
    assert Exchangeable(model, None).why_not("a").startswith(words)
    assert Exchangeable(model, None).why_not("b") is None


def test_a_capture_says_in_whose_code_a_linear_ran() -> None:
    graph = capture(Mlp(), [torch.randn(2, 16)]).graph
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [next(reversed(node.meta["nn_module_stack"].values()))[0] for node in nodes] == ["a", "b"]

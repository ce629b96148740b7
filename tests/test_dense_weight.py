import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from graphs import low_rank
from torch import Tensor, nn
from torch.nn import functional as F

from pifa_compiler import PifaLinear, dense_weight, factorize
from pifa_compiler.errors import WeightError


def layer(requires_grad: bool = True) -> tuple[PifaLinear, Tensor]:
    weight = low_rank(24, 16, 5)
    return PifaLinear.from_factors(factorize(weight), torch.zeros(24), requires_grad), weight


@pytest.fixture
def put_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the weights that were put together."""
    seen: list[int] = []
    original = dense_weight.put_together

    def counted(w_pivot: Tensor, coeff: Tensor, order: Tensor | None) -> Tensor:
        seen.append(w_pivot.shape[1])
        return original(w_pivot, coeff, order)

    monkeypatch.setattr(dense_weight, "put_together", counted)
    return seen


def test_what_it_is_like_is_known_without_putting_it_together(put_together):
    pifa, _ = layer()
    weight = pifa.to(torch.bfloat16).weight
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.device, weight.layout) == (torch.bfloat16, torch.device("cpu"), torch.strided)
    assert weight.shape == weight.size() == (24, 16)
    assert (weight.ndim, weight.dim(), len(weight), weight.numel(), weight.size(1)) == (2, 2, 24, 24 * 16, 16)
    assert (weight.stride(), weight.itemsize, weight.nbytes, weight.element_size()) == ((16, 1), 2, 768, 2)
    assert weight.is_floating_point()
    assert torch.is_floating_point(weight)
    assert weight.is_contiguous()
    assert [weight.is_cuda, weight.is_meta, weight.is_sparse, weight.is_quantized, weight.is_complex()] == [False] * 5
    assert weight.requires_grad
    assert not weight.is_leaf
    assert weight.grad is None
    assert not weight.detach().requires_grad
    assert not weight.data.requires_grad
    assert torch.zeros_like(weight).equal(torch.zeros(24, 16, dtype=torch.bfloat16))
    assert weight.new_empty(3).dtype == torch.bfloat16
    with torch.no_grad():
        assert not pifa.weight.requires_grad
    assert not layer(requires_grad=False)[0].weight.requires_grad
    assert put_together == []


def test_values_are_those_of_the_layer_however_they_are_read():
    pifa, weight = layer()
    x, dense = torch.randn(3, 16), pifa.weight.detach().clone()
    assert type(dense) is Tensor
    torch.testing.assert_close(dense, weight, rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    for got, wanted in (
        (F.linear(x, pifa.weight), x @ dense.T),
        (x @ pifa.weight.T, x @ dense.T),
        (pifa.weight[3:5], dense[3:5]),
        (pifa.weight.double(), dense.double()),
        (torch.cat((pifa.weight, pifa.weight)), torch.cat((dense, dense))),
        (copy.deepcopy(pifa.weight.detach()), dense),
        (pickle.loads(pickle.dumps(pifa.weight.detach())), dense),  # noqa: S301  just written
        (torch.from_numpy(pifa.weight.detach().numpy()), dense),
        (torch.tensor(pifa.weight.tolist()), dense),
        (torch.zeros(24, 16).copy_(pifa.weight), dense),
    ):
        assert torch.equal(got, wanted)
    assert repr(pifa.weight.detach()) == repr(dense)
    with torch.inference_mode():
        assert torch.equal(pifa.weight + 0, dense)


def test_it_shows_the_factors_as_they_are_when_it_is_read(put_together):
    weight = (pifa := layer()[0]).weight
    first = weight.detach().clone()
    assert torch.equal(weight * 1, first)
    assert len(put_together) == 2  # `detach` made a second stand-in; each puts it together once
    with torch.no_grad():
        pifa.w_pivot.mul_(2)
    assert torch.equal(weight * 1, 2 * first)


def test_gradients_reach_both_factors():
    pifa, _ = layer()
    target = torch.randn(24, 16)
    (pifa.weight * target).sum().backward()
    found = pifa.w_pivot.grad, pifa.coeff.grad
    rows = torch.cat((pifa.w_pivot, pifa.coeff @ pifa.w_pivot))
    wanted = torch.autograd.grad((rows[pifa.order] * target).sum(), (pifa.w_pivot, pifa.coeff))
    assert all(map(torch.equal, found, wanted))


def test_it_can_be_scaled_by_a_number_in_place():
    pifa, _ = layer()
    before, held = pifa.weight.detach().clone(), pifa.w_pivot
    with torch.no_grad():
        assert pifa.weight.div_(4) is not None
        pifa.weight.data.mul_(2)
        weight = pifa.weight
        weight *= 8
    assert torch.equal(pifa.weight.detach(), 4 * before)  # powers of 2 are exact
    assert pifa.w_pivot is held
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):  # as of an nn.Linear
        pifa.weight.mul_(2)


WRITES: dict[str, Callable[[PifaLinear], object]] = {
    "copy_": lambda layer: layer.weight.data.copy_(torch.zeros(24, 16)),
    "add_": lambda layer: layer.weight.detach().add_(1),
    "+=": lambda layer: layer.weight.data.__iadd__(torch.ones(24, 16)),
    "[...] =": lambda layer: layer.weight.data.__setitem__(..., 0),
    "[0, 1] =": lambda layer: layer.weight.__setitem__((0, 1), 0.0),
    "nn.init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "nn.init of others": lambda layer: nn.init.orthogonal_(layer.weight.data),
    "out=": lambda layer: torch.add(torch.ones(24, 16), 1, out=layer.weight.data),
    "inplace=True": lambda layer: F.relu(layer.weight.data, inplace=True),
    "function": lambda layer: torch.relu_(layer.weight.data),
    "foreach": lambda layer: torch._foreach_add_([layer.weight.data], 1),
    "mul_ by rows": lambda layer: layer.weight.data.mul_(torch.ones(24, 1)),
    "div_ of a row": lambda layer: layer.weight.data[0].div_(2),
    "div_, rounded": lambda layer: layer.weight.data.div_(2, rounding_mode="floor"),
    "row": lambda layer: layer.weight.data[0].zero_(),
    "transpose": lambda layer: layer.weight.T.detach().zero_(),
    "view of a view": lambda layer: layer.weight.data.view(-1)[3:5].add_(1),
    "chunk": lambda layer: layer.weight.data.chunk(2)[1].add_(1),
    "resize_": lambda layer: layer.weight.data.resize_(3),
    "set_": lambda layer: layer.weight.data.set_(torch.zeros(24, 16)),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "register_hook": lambda layer: layer.weight.register_hook(print),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 16)),
    "grad =": lambda layer: setattr(layer.weight, "grad", torch.zeros(24, 16)),
    "weight = tensor": lambda layer: setattr(layer, "weight", torch.zeros(24, 16)),
    "weight = parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(24, 16))),
    "weight = None": lambda layer: setattr(layer, "weight", None),
    "register_parameter": lambda layer: layer.register_parameter("weight", None),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_every_write_is_refused_and_says_what_to_change_instead(write, grad: bool):
    pifa, _ = layer()
    before = {name: value.clone() for name, value in pifa.state_dict().items()}
    with torch.set_grad_enabled(grad), pytest.raises(WeightError, match=r"change w_pivot.* and coeff"):
        write(pifa)
    after = pifa.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_merge_of_an_adapter_in_place_is_refused():
    """What PEFT does with `base_layer.weight.data += delta`: before, it vanished."""
    pifa, _ = layer()
    with pytest.raises(WeightError):
        pifa.weight.data += torch.ones(24, 16)


class ReadsItsWeight(nn.Module):
    """As T5's MLP: what it computes in depends on a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.wo, _ = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(x.to(self.wo.weight.dtype)) + self.wo.weight.sum(dim=1)


def test_compiled_exported_and_transformed_programs_may_read_it():
    model, x = ReadsItsWeight(), torch.randn(3, 16)
    wanted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), wanted)
    for strict in (True, False):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), wanted)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-4)  # float32, another order


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    for block in (*model.encoder.block, *model.decoder.block):
        mlp = block.layer[-1].DenseReluDense
        mlp.wo = PifaLinear.from_factors(factorize(low_rank(32, 64, 9)), requires_grad=False)
    ids = torch.randint(1, 50, (2, 9))
    return model, {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}


def test_a_t5_that_asks_for_its_weights_dtype_never_puts_a_weight_together(put_together):
    model, call = t5()
    with torch.no_grad():
        model(**call)
    assert put_together == []


def test_a_t5_compiles_to_one_graph_and_exports():
    model, call = t5()
    with torch.no_grad():
        wanted = model(**call).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**call).logits, wanted)
        exported = torch.export.export(model, (), call, strict=False).module()
        assert torch.equal(exported(**call).logits, wanted)

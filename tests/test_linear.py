import copy
import io

import pytest
import torch
from graphs import low_rank
from torch import nn

from pifa_compiler import PifaLinear, factorize
from pifa_compiler.errors import ConfigError, RankError


def layer(d_out: int = 24, d_in: int = 16, rank: int = 5, bias: bool = True) -> tuple[PifaLinear, nn.Linear]:
    dense = nn.Linear(d_in, d_out, bias=bias)
    dense.weight.data = low_rank(d_out, d_in, rank)
    return PifaLinear.from_factors(factorize(dense.weight.data), dense.bias), dense


def test_pifa_linear_computes_what_the_dense_layer_does():
    pifa, dense = layer()
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(pifa(x), dense(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    torch.testing.assert_close(pifa.weight, dense.weight.detach(), rtol=1e-4, atol=1e-6)
    assert pifa.bias is dense.bias


def test_state_dict_holds_the_pivots_and_not_the_order():
    pifa, _ = layer()
    assert {name: tuple(value.shape) for name, value in pifa.state_dict().items()} == {
        "w_pivot": (5, 16),
        "coeff": (19, 5),
        "bias": (24,),
        "pivots": (5,),
    }


def test_load_state_dict_restores_the_row_order():
    pifa, _ = layer()
    empty = PifaLinear(16, 24, 5)
    empty.load_state_dict(pifa.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(empty(x), pifa(x))


def test_pifa_linear_can_be_cast_copied_and_trained():
    pifa, _ = layer()
    half = copy.deepcopy(pifa).to(torch.bfloat16)
    assert half.pivots.dtype == torch.int32
    assert half(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x, target = torch.randn(64, 16), torch.randn(64, 24)
    optimizer = torch.optim.SGD(pifa.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (pifa(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_factors_of_a_frozen_layer_stay_frozen():
    pifa = PifaLinear.from_factors(factorize(low_rank(24, 16, 5)), requires_grad=False)
    assert not any(parameter.requires_grad for parameter in pifa.parameters())


def test_a_new_layer_starts_with_numbers_of_the_size_of_nn_linear_s():
    pifa, dense = PifaLinear(300, 400, 100), nn.Linear(300, 400)
    for ours, theirs in ((pifa.weight[:100], dense.weight), (pifa.weight[100:], dense.weight), (pifa.bias, dense.bias)):
        spread = ours.detach().std() / theirs.detach().std()
        assert 0.9 < spread < 1.1  # of 30,000 numbers, and of 400 biases five standard deviations
    assert pifa.order is None  # the pivots are the first rows
    x = torch.randn(500, 300)
    assert 0.9 < pifa(x).detach().std() / dense(x).detach().std() < 1.1


def test_a_layer_made_on_the_meta_device_can_be_initialised_later():
    later = PifaLinear(8, 12, 3, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    later.reset_parameters()
    torch.manual_seed(0)
    assert all(map(torch.equal, later.state_dict().values(), PifaLinear(8, 12, 3).state_dict().values()))
    assert later.order is None


def test_a_new_layer_does_not_depend_on_the_memory_it_gets():
    layers = []
    for junk in (0.0, 1e30):
        torch.full((64, 64), junk)
        torch.manual_seed(0)
        layers.append(PifaLinear(4, 4, 2).state_dict())
    assert all(torch.equal(value, layers[1][name]) for name, value in layers[0].items())


@pytest.mark.parametrize(
    ("shape", "options", "kind", "words"),
    [
        ((4, 4, 0), {}, RankError, "rank of a PifaLinear must be an integer of 1 or more, got 0"),
        ((4, 4, -1), {}, RankError, "got -1"),
        ((4, 4, 2.0), {}, RankError, r"got 2\.0"),
        ((4, 8, 5), {}, RankError, r"a weight \[8, 4\] has at most rank 4, got rank 5"),
        ((0, 4, 1), {}, ConfigError, "in_features of a PifaLinear"),
        ((4, True, 1), {}, ConfigError, "out_features of a PifaLinear"),
        ((4, 4, 2), {"dtype": torch.int8}, ConfigError, r"floating-point parameters, got dtype torch\.int8"),
    ],
)
def test_shapes_that_no_layer_has_are_refused(shape, options, kind, words):
    with pytest.raises(kind, match=words):
        PifaLinear(*shape, **options)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_torch_jit_script_compiles_the_layer_and_saves_it(bias: bool):
    x = torch.randn(3, 16)
    for pifa in (layer(bias=bias)[0], PifaLinear(16, 24, 5, bias)):  # with a row order, and without
        scripted = torch.jit.script(nn.Sequential(pifa, nn.ReLU()))
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        for program in (scripted, torch.jit.load(file), torch.jit.trace(pifa, x)):
            assert torch.equal(program(x).relu(), pifa(x).relu())


def test_the_module_can_be_saved_whole():
    pifa, _ = layer()
    file = io.BytesIO()
    torch.save(pifa, file)
    file.seek(0)
    x = torch.randn(3, 16)
    assert torch.equal(torch.load(file, weights_only=False)(x), pifa(x))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer, pivots: layer.pivots.copy_(pivots),
        lambda layer, pivots: setattr(layer, "pivots", pivots.to(torch.int32)),
        lambda layer, pivots: vars(layer)["_buffers"].update(pivots=pivots.to(torch.int32)),
    ],
    ids=["copy", "set", "buffers"],
)
def test_pivots_that_are_written_to_count(write):
    pifa, _ = layer(bias=False)
    rows = torch.cat((pifa.w_pivot, pifa.coeff @ pifa.w_pivot)).detach()
    x = torch.randn(3, 16)
    pifa(x)
    for pivots in (torch.arange(5), torch.tensor([1, 7, 8, 20, 23])):
        for again in (pifa, copy.deepcopy(pifa)):
            write(again, pivots)
            weight = torch.empty(24, 16)
            others = [row for row in range(24) if row not in pivots.tolist()]
            weight[[*pivots.tolist(), *others]] = rows
            for changed in (copy.deepcopy(again), again):
                torch.testing.assert_close(changed.weight.detach(), weight)
                torch.testing.assert_close(changed(x), x @ weight.T, rtol=1e-4, atol=1e-5)  # in another order


def test_an_order_is_derived_once(monkeypatch: pytest.MonkeyPatch):
    pifa, _ = layer()
    derived: list[PifaLinear] = []
    restore = PifaLinear.restore_order
    monkeypatch.setattr(PifaLinear, "restore_order", lambda self: derived.append(self) or restore(self))
    for _ in range(3):
        pifa(torch.randn(3, 16))
        pifa.weight.sum()
    assert derived == []
    copy.deepcopy(pifa)(torch.randn(3, 16))
    assert len(derived) == 1

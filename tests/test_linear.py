import copy

import torch
from graphs import low_rank
from torch import nn

from pifa_compiler import PifaLinear, factorize


def layer(d_out: int = 24, d_in: int = 16, rank: int = 5, bias: bool = True) -> tuple[PifaLinear, nn.Linear]:
    dense = nn.Linear(d_in, d_out, bias=bias)
    dense.weight.data = low_rank(d_out, d_in, rank)
    return PifaLinear.from_factors(factorize(dense.weight.data), dense.bias), dense


def test_pifa_linear_computes_what_the_dense_layer_does():
    pifa, dense = layer()
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(pifa(x), dense(x), rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding
    torch.testing.assert_close(pifa.weight, dense.weight, rtol=1e-4, atol=1e-6)
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

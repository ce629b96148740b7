from dataclasses import dataclass

import pytest
import torch

from pifa_compiler.errors import ConfigError, RankError
from pifa_compiler.factors import rank_for_density, stored_numbers
from pifa_compiler.reconstruction.allocators import ALLOCATORS, Budget, Layer, squared_singular_values

SHAPES = {"q": (48, 48), "k": (16, 48), "o": (48, 48), "gate": (96, 48), "up": (96, 48), "down": (48, 96)}


def gram(size: int, decay: float) -> torch.Tensor:
    x = torch.randn(4 * size, size) * torch.logspace(0, -decay, size)
    return x.T @ x


@dataclass
class Linear:
    """What an allocator is shown of a layer."""

    name: str
    weight: torch.Tensor
    attention: bool = False
    gram: torch.Tensor | None = None
    gradient_gram: torch.Tensor | None = None


def model(blocks: int = 3, *, gradients: bool = True) -> list[list[Linear]]:
    """Sets as of a small Llama; gate and up share their rank."""
    sets = []
    for block in range(blocks):
        for names in (("q",), ("k",), ("o",), ("gate", "up"), ("down",)):
            sets.append(
                [
                    Linear(
                        f"layers.{block}.{name}",
                        torch.randn(SHAPES[name]),
                        attention=name in "qko",
                        gram=gram(SHAPES[name][1], 1 + block),
                        gradient_gram=gram(SHAPES[name][0], 1) if gradients else None,
                    )
                    for name in names
                ]
            )
    return sets


def shown(allocator: str, sets: list[list[Linear]]) -> list[list[Layer]]:
    look_at = ALLOCATORS[allocator].look_at
    return [
        [
            Layer(
                each.name,
                tuple(each.weight.shape),
                each.attention,
                look_at(each.name, each.weight, each.gram, each.gradient_gram),
            )
            for each in linears
        ]
        for linears in sets
    ]


def ranks_of(allocator: str, sets: list[list[Linear]], budget: Budget) -> list[int | None]:
    return ALLOCATORS[allocator].ranks(shown(allocator, sets), budget)


def stored(sets: list[list[Linear]], ranks: list[int | None]) -> int:
    return sum(
        layer.weight.numel() if rank is None else stored_numbers(*layer.weight.shape, rank)
        for layers, rank in zip(sets, ranks, strict=True)
        for layer in layers
    )


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("density", [0.9, 0.65, 0.5, 0.3])
@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_the_budget_is_kept_and_spent(name, density, multiple):
    sets = model()
    ranks = ranks_of(name, sets, Budget(density, multiple))
    total = sum(layer.weight.numel() for layers in sets for layer in layers)
    assert stored(sets, ranks) <= density * total
    if name in ("global", "d-rank", "welore") and multiple == 1:
        assert stored(sets, ranks) > (density - 0.01) * total
    for layers, rank in zip(sets, ranks, strict=True):
        assert rank is None or rank % multiple == 0 or rank < multiple
        assert rank is None or 1 <= rank < min(layers[0].weight.shape)


def test_uniform_is_the_rank_of_the_density():
    sets = model()
    assert ranks_of("uniform", sets, Budget(0.6, 1)) == [
        rank_for_density(*layers[0].weight.shape, 0.6) for layers in sets
    ]


@pytest.mark.parametrize("gradients", [True, False])
def test_squared_singular_values_are_those_of_the_weighted_weight(gradients):
    (layer,) = model(1, gradients=gradients)[1]
    values, vectors = torch.linalg.eigh(layer.gram.double())
    weighted = layer.weight.double() @ vectors * values.sqrt()
    if gradients:
        values, vectors = torch.linalg.eigh(layer.gradient_gram.double())
        weighted = values.sqrt()[:, None] * vectors.T @ weighted
    found = squared_singular_values(layer.weight, layer.gram, layer.gradient_gram)
    torch.testing.assert_close(found, torch.linalg.svdvals(weighted).square())


def test_global_gives_more_to_what_the_loss_feels_more():
    sets = [
        [Linear(name, torch.randn(40, 40), gram=torch.eye(40), gradient_gram=size * torch.eye(40))]
        for name, size in (("0", 1.0), ("1", 9.0))
    ]
    first, second = ranks_of("global", sets, Budget(0.5, 1))
    assert first is not None
    assert second is None or first < second


def test_d_rank_gives_more_to_flat_spectra():
    flat, steep = torch.eye(40), torch.diag(torch.logspace(0, -3, 40))
    sets = [[Linear(name, weight, gram=torch.eye(40))] for name, weight in (("0", steep), ("1", flat))]
    first, second = ranks_of("d-rank", sets, Budget(0.5, 1))
    assert first < second


def test_welore_cuts_all_spectra_at_one_share_of_their_largest_value():
    values = torch.linspace(1, 0.1, 40)
    sets = [
        [Linear(name, size * torch.diag(values**power), gram=torch.eye(40))]
        for name, size, power in (("0", 1.0, 1), ("1", 100.0, 3))
    ]
    first, second = ranks_of("welore", sets, Budget(0.5, 1))
    threshold = float(values[first - 1])
    assert second in (int((values**3 > threshold).sum()), int((values**3 >= 0.999 * threshold).sum()) + 1)
    assert second < first


def test_owl_keeps_more_of_blocks_with_outliers_within_its_spread():
    sets = model(2)
    sets[5][0].weight[0, :8] = 1e3
    ranks = ranks_of("owl", sets, Budget(0.6, 1))
    plain, outlying = stored(sets[:5], ranks[:5]), stored(sets[5:], ranks[5:])
    size = sum(layer.weight.numel() for layers in sets[:5] for layer in layers)
    assert plain < outlying
    # 0.08 above and below the density, less what a row of each layer stores.
    assert outlying / size == pytest.approx(0.68, abs=0.02)
    assert plain / size == pytest.approx(0.52, abs=0.02)


def test_attention_mlp_has_one_density_for_each_type():
    sets = model()
    for layers in sets:
        for layer in layers:
            layer.weight.mul_(1e-3 if layer.attention else 1)
            if layer.attention:
                layer.weight.copy_(layer.weight[:, :1] @ layer.weight[:1])  # of rank 1: attention can do with less
    ranks = ranks_of("attn-mlp", sets, Budget(0.6, 1))
    inside = [pair for pair in zip(sets, ranks, strict=True) if pair[0][0].attention]
    assert [rank for _, rank in inside] == [rank_for_density(*layers[0].weight.shape, 0.5) for layers, _ in inside]


def test_attention_mlp_needs_both_types():
    with pytest.raises(ConfigError, match="attn-mlp needs layers in and outside of attention"):
        ranks_of("attn-mlp", [[Linear("0", torch.randn(8, 8), gram=torch.eye(8))]], Budget(0.5, 1))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_no_room_for_rank_1_names_the_layer(name):
    with pytest.raises(RankError, match=r"layers\.0\.q: .* no room for rank 1"):
        ranks_of(name, model(1), Budget(0.01, 1))


def test_layers_without_gradients_are_given_the_rank_of_the_density_beside_layers_with_them():
    known, unknown = model(1), [[Linear("head", torch.randn(48, 48), gram=gram(48, 1))]]
    ranks = ranks_of("global", [*known, *unknown], Budget(0.6, 1))
    assert ranks[:-1] == ranks_of("global", known, Budget(0.6, 1))
    assert ranks[-1] == rank_for_density(48, 48, 0.6)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_compiler.factors import stored_numbers
from pifa_compiler.reconstruction.knapsack import Choices, choices, minimise


def falling(full: int, rate: float, size: float = 1.0) -> torch.Tensor:
    """A loss that falls geometrically with the rank, 0 at full rank."""
    curve = size * torch.logspace(0, -rate, full + 1, dtype=torch.float64)
    curve[-1] = 0
    return curve


def test_choices_cost_what_pifa_stores_and_end_in_dense():
    found = choices([(12, 8), (12, 8)], falling(8, 2), multiple=2, least=3)
    assert found.ranks.tolist() == [3, 4, 6, 8]
    assert found.costs.tolist() == [2 * stored_numbers(12, 8, rank) for rank in (3, 4, 6)] + [2 * 96]
    assert found.losses.tolist() == falling(8, 2)[[3, 4, 6, 8]].tolist()


def test_ranks_that_would_store_more_than_dense_are_no_choice():
    found = choices([(4, 4)], falling(4, 1))
    assert found.ranks.tolist() == [1, 2, 4]  # rank 3 stores 3 * 5 + 3 numbers, two more than the weight
    assert int(found.costs.max()) == 16


@given(
    st.lists(
        st.tuples(st.integers(4, 9), st.integers(4, 9), st.floats(0.1, 4), st.floats(0.01, 100)), min_size=2, max_size=4
    ),
    st.floats(0.2, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_minimise_keeps_the_budget_and_no_affordable_step_is_left(layers, share):
    sets = [choices([(m, n)], falling(min(m, n), rate, size)) for m, n, rate, size in layers]
    cheapest, dense = (sum(int(pick(each.costs)) for each in sets) for pick in (torch.min, torch.max))
    budget = cheapest + int(share * (dense - cheapest))
    chosen = minimise(sets, budget)
    cost = sum(int(each.costs[i]) for each, i in zip(sets, chosen, strict=True))
    assert cost <= budget
    for each, i in zip(sets, chosen, strict=True):
        better = each.losses < each.losses[i]
        assert not bool((better & (each.costs - each.costs[i] <= budget - cost)).any())


def test_minimise_is_exact_where_curves_are_convex_and_the_budget_is_met():
    sets = [Choices(torch.arange(5), torch.arange(5) * 10, size * torch.tensor([16.0, 8, 4, 2, 0])) for size in (1, 3)]
    for budget in range(0, 81, 10):
        chosen = minimise(sets, budget)
        loss = sum(float(each.losses[i]) for each, i in zip(sets, chosen, strict=True))
        rivals = [(a, b) for a in range(5) for b in range(5) if 10 * (a + b) <= budget]
        assert loss == min(float(sets[0].losses[a] + sets[1].losses[b]) for a, b in rivals)


def test_a_layer_that_loses_much_stays_dense_and_one_that_loses_nothing_gets_the_least():
    sets = [choices([(20, 20)], falling(20, 0.1, size)) for size in (1000, 1e-6)]
    dense, least = minimise(sets, 400 + stored_numbers(20, 20, 1))
    assert dense == len(sets[0].ranks) - 1
    assert sets[1].ranks[least] == 1


def test_a_budget_below_the_cheapest_choices_is_refused():
    with pytest.raises(ValueError, match="budget is 5"):
        minimise([choices([(8, 8)], falling(8, 1))], 5)

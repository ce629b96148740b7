"""Statistics of experts with few tokens are completed by average ones."""

import pytest
import torch
from torch.fx import Graph, Node
from torch.testing import assert_close

from pifa_compiler.errors import CalibrationError
from pifa_compiler.exchange.expert_layers import Projection
from pifa_compiler.reconstruction.expert_means import TOKENS_A_CHANNEL, ExpertMeans
from pifa_compiler.reconstruction.results import ResultsInMemory
from pifa_compiler.reconstruction.selection import FoundLinear
from pifa_compiler.reconstruction.statistics import DenseSums, Statistics

D_OUT, D_IN = 6, 4
ENOUGH = TOKENS_A_CHANNEL * D_IN


def linears(count: int, name: str = "up_proj") -> tuple[ExpertMeans, list[Node]]:
    """The same projection of several experts, and a linear of none."""
    graph, found, nodes = Graph(), dict[Node, FoundLinear](), list[Node]()
    x = graph.placeholder("x")
    for expert in range(count + 1):
        weight = graph.get_attr(f"experts.{name}.{expert}.weight")
        nodes.append(graph.call_function(torch.ops.aten.linear.default, (x, weight)))
        projection = Projection(f"experts.{name}", count, (f"experts.{name}",)) if expert < count else None
        found[nodes[-1]] = FoundLinear(f"experts.{name}.{expert}", (D_OUT, D_IN), projection)
    return ExpertMeans(found, ResultsInMemory()), nodes


def sums(rows: torch.Tensor, gradients: torch.Tensor | None = None) -> DenseSums:
    gradient_gram = None if gradients is None else gradients.T @ gradients
    return DenseSums(rows.T @ rows, gradient_gram, rows.abs().sum(dim=0), len(rows))


def statistics(rows: torch.Tensor) -> Statistics:
    return sums(rows).statistics()


def test_an_expert_gets_the_average_tokens_that_it_lacks():
    torch.manual_seed(0)
    means, nodes = linears(3)
    rows = [torch.randn(n, D_IN, dtype=torch.float64) for n in (2 * ENOUGH, 6, 0)]
    means.add({node: sums(each) for node, each in zip(nodes, rows, strict=False)})
    every = torch.cat(rows)
    average = every.T @ every / len(every)
    for node, own in zip(nodes, rows, strict=False):
        found = means.completed(node, statistics(own))
        lacking = max(ENOUGH - len(own), 0)
        assert found.tokens == len(own) + lacking
        assert_close(found.gram, own.T @ own + lacking * average)
        assert_close(found.cross, found.gram)
        assert_close(found.dense_gram, found.gram)
        assert_close(found.mean_abs * found.tokens, own.abs().sum(0) + lacking * every.abs().mean(0))


def test_who_has_enough_and_who_is_no_expert_is_left_as_it_is():
    means, nodes = linears(2)
    means.add({node: sums(torch.randn(3, D_IN)) for node in nodes})
    enough, few = statistics(torch.randn(ENOUGH, D_IN)), statistics(torch.randn(3, D_IN))
    assert means.completed(nodes[0], enough) is enough
    assert means.completed(nodes[2], few) is few
    assert not ExpertMeans({}, ResultsInMemory())


def test_gradients_are_completed_likewise():
    torch.manual_seed(0)
    means, nodes = linears(2)
    gradients = [torch.randn(n, D_OUT) for n in (TOKENS_A_CHANNEL * D_OUT, 5)]
    means.add({node: sums(torch.randn(len(g), D_IN), g) for node, g in zip(nodes, gradients, strict=False)})
    names = [f"experts.up_proj.{expert}.weight" for expert in range(2)]
    grams = {name: g.T @ g for name, g in zip(names, gradients, strict=True)} | {"another": torch.ones(2, 2)}
    found = means.gradients(grams)
    assert list(found) == list(grams)
    every = torch.cat(gradients)
    lacking = TOKENS_A_CHANNEL * D_OUT - 5
    assert found[names[0]] is grams[names[0]]
    assert found["another"] is grams["another"]
    assert_close(found[names[1]], grams[names[1]] + lacking * every.T @ every / len(every))
    assert len(means.gradients({})) == 0
    assert means.own_gradients(nodes[0], every) is every


def test_in_front_of_the_residual_stream_all_have_the_mean_of_gradients():
    torch.manual_seed(0)
    means, nodes = linears(2, "down_proj")
    gradients = [torch.randn(n, D_OUT) for n in (TOKENS_A_CHANNEL * D_OUT, 0)]
    means.add({node: sums(torch.randn(len(g), D_IN), g) for node, g in zip(nodes, gradients, strict=False)})
    found = means.gradients({})
    assert list(found) == [f"experts.down_proj.{expert}.weight" for expert in range(2)]
    for gram in found.values():
        assert_close(gram, gradients[0].T @ gradients[0] / len(gradients[0]))
    assert means.own_gradients(nodes[0], gradients[0]) is None
    assert means.own_gradients(nodes[2], gradients[0]) is gradients[0]


def test_a_walk_that_begins_again_counts_no_token_twice():
    means, nodes = linears(2)
    rows = [torch.randn(n, D_IN) for n in (8, 0)]
    for scale in (100.0, 1.0):
        means.add({node: sums(scale * each) for node, each in zip(nodes, rows, strict=False)})
    found = means.completed(nodes[1], statistics(rows[1]))
    assert_close(found.gram, (rows[0].T @ rows[0]).double() * (ENOUGH / 8))


def test_sums_are_kept_once_all_experts_were_added_and_the_order_leaves_no_trace():
    torch.manual_seed(0)
    rows = [torch.randn(n, D_IN) for n in (8, 3, 5)]
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        means, nodes = linears(3)
        for place in order:
            assert not means.knows(nodes[0])
            means.add({nodes[place]: sums(rows[place])})
            assert means.are_whole == (place == order[-1])
        assert means.knows(nodes[0])
        assert means.knows(nodes[3])  # a linear of no experts
        found.append(means.completed(nodes[1], statistics(rows[1])).gram)
    assert torch.equal(*found)
    means.add({nodes[0]: sums(rows[0])})
    means.begin()
    assert means.are_whole


def test_experts_that_no_token_reaches_are_refused():
    means, nodes = linears(2)
    means.add({node: sums(torch.randn(0, D_IN)) for node in nodes})
    with pytest.raises(CalibrationError, match=r"no token reaches the experts around experts\.up_proj\.1\.weight"):
        means.completed(nodes[1], statistics(torch.randn(0, D_IN)))

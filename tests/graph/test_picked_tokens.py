"""Tokens that a model picks: which they are, which of them count, and what both flows of a sweep say of them."""

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pifa_compiler.graph.capture import Captured, capture
from pifa_compiler.graph.linears import weight_name
from pifa_compiler.graph.picked_tokens import choices
from pifa_compiler.reconstruction.sweep import Sweep


class Picking(nn.Module):
    """The second linear computes the tokens whose first feature is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.first(x).reshape(-1, 6)
        tokens = (hidden[:, 0] > 0).nonzero().squeeze(1)
        made = self.third(self.second(hidden.index_select(0, tokens)).relu())
        return hidden.index_add(0, tokens, made)


def linears(captured: Captured) -> dict[str, torch.fx.Node]:
    nodes = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return {weight_name(node).removesuffix(".weight"): node for node in nodes}


def test_how_many_experts_a_token_goes_to_is_read_off_what_chooses_them():
    class Choosing(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            tokens = (index == 1).any(dim=1).nonzero().squeeze(1)
            return x.index_add(0, tokens, x.index_select(0, tokens).tanh())

    captured = capture(Choosing(), [(torch.randn(4, 6), torch.tensor([[0, 1, 2]] * 4))])
    assert {choices(pick.tokens) for pick in captured.masks.picks.values()} == {3}
    other = capture(Picking(), [torch.randn(2, 4, 6)])
    assert {choices(pick.tokens) for pick in other.masks.picks.values()} == {None}


def test_what_is_computed_from_picked_tokens_row_by_row_are_rows_of_theirs():
    captured = capture(Picking(), [torch.randn(2, 4, 6)])
    found, picks = linears(captured), captured.masks.picks
    sources = {name: node.all_input_nodes[0] for name, node in found.items()}
    assert sources["first"] not in picks
    assert picks[sources["second"]] == picks[sources["third"]] == picks[found["third"]]
    (output,) = captured.graph.graph.find_nodes(op="output")
    assert output.all_input_nodes[0] not in picks


def test_of_picked_tokens_those_count_that_the_mask_does_not_hide():
    torch.manual_seed(0)
    mask = torch.ones(2, 4, dtype=torch.int64)
    mask[1, 2:] = 0
    captured = capture(Picking(), [{"x": torch.randn(2, 4, 6), "attention_mask": mask}])
    source = linears(captured)["third"].all_input_nodes[0]
    picked = torch.tensor([0, 3, 5, 6])
    assert captured.masks.rows(source, 0, (4,), ["third"], picked).tolist() == [True, True, True, False]
    assert captured.masks.notes() == []


def test_a_mask_that_does_not_fit_the_tokens_is_noted():
    mask = torch.ones(2, 3, dtype=torch.int64)
    mask[1, 2:] = 0
    captured = capture(Picking(), [{"x": torch.randn(2, 4, 6), "attention_mask": mask}])
    source = linears(captured)["third"].all_input_nodes[0]
    assert captured.masks.rows(source, 0, (4,), ["third"], torch.tensor([0, 3, 5, 6])) is None
    assert any("third" in note for note in captured.masks.notes())


def test_statistics_are_of_the_tokens_that_both_models_pick():
    torch.manual_seed(0)
    model, batches = Picking(), [torch.randn(2, 16, 6) for _ in range(3)]
    captured = capture(model, batches)
    other = model.first.weight.detach() + 0.3 * torch.randn(6, 6)
    seen = {}

    def solve(group, statistics):
        (node,) = group.members
        seen[weight_name(node)] = statistics
        return {node: other} if weight_name(node) == "first.weight" else {}

    Sweep(captured, list(linears(captured).values()), dense_gram=True).run(solve)
    dense = [model.first(x).reshape(-1, 6) for x in batches]
    compressed = [nn.functional.linear(x, other, model.first.bias).reshape(-1, 6) for x in batches]
    both = [(x[:, 0] > 0) & (y[:, 0] > 0) for x, y in zip(dense, compressed, strict=True)]
    assert 0 < sum(int(each.sum()) for each in both) < sum(int((x[:, 0] > 0).sum()) for x in dense)
    x_o, x_u = (
        torch.cat([rows[each] for rows, each in zip(flow, both, strict=True)]).double() for flow in (dense, compressed)
    )
    found = seen["second.weight"]
    assert found.tokens == len(x_o)
    # Products in float32 within a batch.
    assert_close(found.gram, x_u.T @ x_u, rtol=1e-5, atol=1e-5)
    assert_close(found.cross, x_o.T @ x_u, rtol=1e-5, atol=1e-5)
    assert_close(found.dense_gram, x_o.T @ x_o, rtol=1e-5, atol=1e-5)
    h_o, h_u = (model.second(x.float()).relu().double() for x in (x_o, x_u))
    assert_close(seen["third.weight"].cross, h_o.T @ h_u, rtol=1e-5, atol=1e-5)


def test_no_token_need_be_picked():
    model = Picking()
    nn.init.constant_(model.first.bias, -100.0)
    captured = capture(model, [torch.randn(2, 4, 6)])
    seen = {}
    Sweep(captured, list(linears(captured).values())).run(
        lambda group, statistics: seen.update({weight_name(group.members[0]): statistics}) or {}
    )
    assert seen["second.weight"].tokens == 0
    assert not seen["second.weight"].gram.any()
    assert seen["second.weight"].gram.shape == (6, 6)

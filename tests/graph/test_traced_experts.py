"""Of experts one is traced, and its nodes are copied for the others."""

import pytest
import torch
from expert_models import EXPERTS, dense_experts, routed
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

from pifa_compiler.errors import CaptureError
from pifa_compiler.exchange.allowed import caller_of
from pifa_compiler.exchange.expert_layers import ExpertLayers
from pifa_compiler.experts import expert_weights
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.linears import linears_in_order
from pifa_compiler.graph.picked_tokens import find_picks
from pifa_compiler.graph.same_values import check_same_values


def layers_of(kind: type[nn.Module]) -> ExpertLayers:
    torch.manual_seed(0)
    experts = dense_experts(kind)
    weights = expert_weights(experts)
    assert not isinstance(weights, str)
    return ExpertLayers(experts, weights)


class Twice(nn.Module):
    """Experts that are called two times, in a module of another."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": experts})

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.mlp["experts"](self.mlp["experts"](x, index, weights).tanh(), index, weights)


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts, MuseSparkExperts])
def test_the_graph_computes_what_all_experts_do(kind):
    """With biases, and a norm that all experts share, among them."""
    model, given = Twice(layers_of(kind)), routed()
    captured = capture(model, [given])
    check_same_values(model, captured, given)
    got = captured.graph(*given)
    torch.testing.assert_close(got, model(*given), rtol=1e-6, atol=1e-6)
    place, experts = "mlp.experts", model.mlp["experts"]
    wanted = [f"{place}.{name}.{expert}" for expert in range(EXPERTS) for name in experts.projections]
    assert linears_in_order(captured.graph) == wanted
    parameters = dict(captured.graph.named_parameters())
    assert all(parameters[name] is own for name, own in model.named_parameters())
    linears = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [caller_of(node)[0] for node in linears] == 2 * wanted
    picks = find_picks(captured.graph)
    assert {picks[node].tokens for node in linears} == {pick.tokens for pick in picks.values()}
    assert len({pick.tokens for pick in picks.values()}) == 2 * EXPERTS


def test_experts_are_all_there_again_once_a_model_is_captured():
    experts = layers_of(MixtralExperts)
    before, given = dict(experts.named_parameters()), routed()
    wanted = experts(*given)
    with pytest.raises(CaptureError):
        capture(experts, [given[:2]])
    capture(experts, [given])
    assert dict(experts.named_parameters()).keys() == before.keys()
    assert torch.equal(experts(*given), wanted)


def test_experts_that_compute_something_else_are_refused():
    class Doubled(ExpertLayers):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return torch.index_add(x * 2, 0, index[:, 0], x)

    experts = layers_of(MixtralExperts)
    experts.__class__ = Doubled
    with pytest.raises(CaptureError, match="wanted the choice of the first"):
        capture(Twice(experts), [routed()])

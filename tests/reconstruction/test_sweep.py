import pytest
import torch
from graphs import low_rank
from torch import nn

from pifa_compiler import factorize
from pifa_compiler.errors import CalibrationError
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.linears import weight_name
from pifa_compiler.reconstruction.sweep import Sweep, gram_matrix, plan


class Gated(nn.Module):
    """Two linears on one input, a product, a third linear, a residual, and a head that no sweep needs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, x, attention_mask=None):
        h = nn.functional.silu(self.gate(x)) * self.up(x)
        return self.head(x + self.down(h))


def targets_of(captured, names):
    nodes = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [node for node in nodes if weight_name(node).removesuffix(".weight") in names]


def test_plan_groups_linears_on_one_input_and_stops_at_the_last():
    captured = capture(Gated(), [torch.randn(4, 8)])
    segments = plan(captured.graph.graph, targets_of(captured, {"gate", "up", "down"}))
    assert [[weight_name(node) for node in s.group.members] for s in segments] == [
        ["gate.weight", "up.weight"],
        ["down.weight"],
    ]
    computed = [node for segment in segments for node in segment.nodes]
    assert len(computed) == len(set(computed)) == 4  # gate, up, silu, mul; neither down nor the head runs
    assert not any(node.op == "call_function" and "add" in str(node.target) for node in computed)


@pytest.mark.parametrize("n", [3, 384, 385, 900])
def test_the_gram_matrix_is_whole(n: int):
    rows = torch.randn(50, n)
    gram = gram_matrix(rows)
    # 50 terms in float32: 50 * 2^-24 of the sum of their sizes
    torch.testing.assert_close(gram.double(), rows.double().T @ rows.double(), rtol=0, atol=50 * 2**-24 * 200)


def test_statistics_are_those_of_the_dense_and_of_the_compressed_model():
    """Against the textbook: both models run whole, with the input of `down` recorded."""
    model, batches = Gated(), [torch.randn(4, 8) for _ in range(3)]
    captured = capture(model, batches)
    replaced = {name: factorize(getattr(model, name).weight.detach(), rank=3) for name in ("gate", "up")}
    seen = {}

    def solve(group, statistics):
        names = [weight_name(node).removesuffix(".weight") for node in group.members]
        seen[names[0]] = statistics
        return {node: replaced[name] for node, name in zip(group.members, names, strict=True) if name in replaced}

    Sweep(captured, targets_of(captured, {"gate", "up", "down"}), dense_gram=True).run(solve)
    x = torch.cat(batches).double()
    dense = nn.functional.silu(model.gate.double()(x)) * model.up.double()(x)
    low = {name: x @ f.dense().double().T + getattr(model, name).bias for name, f in replaced.items()}
    compressed = nn.functional.silu(low["gate"]) * low["up"]
    # float32 activations: 1e-5 relative, summed over 12 tokens.
    for got, wanted in (
        (seen["gate"].gram, x.T @ x),
        (seen["gate"].cross, x.T @ x),
        (seen["down"].gram, compressed.T @ compressed),
        (seen["down"].cross, dense.T @ compressed),
        (seen["down"].dense_gram, dense.T @ dense),
        (seen["down"].mean_abs, dense.abs().mean(dim=0)),
    ):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert seen["down"].tokens == 12


class Residual(nn.Module):
    """h1 = x + a(x), h2 = h1 + (b(tanh h1) + c(sin h1)); nothing reads h2, but the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = x + self.a(x)
        return (self.b(torch.tanh(h)) + self.c(torch.sin(h))) + h


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_outputs_are_summed_with_what_the_compressed_model_lacks_in_what_outputs_are_added_to(names: str):
    """Against the textbook; the last of the values is needed only for that."""
    model, batches = Residual(), [torch.randn(2, 4, 8) for _ in range(3)]
    captured = capture(model, batches)
    replaced = {name: factorize(getattr(model, name).weight.detach(), rank=3) for name in ("a", "b")}
    sums = {}

    def solve(group, statistics):
        sums.update(statistics.output_cross)
        assert (statistics.cross is None) == all(weight_name(node) in sums for node in group.members)
        names = {node: weight_name(node).removesuffix(".weight") for node in group.members}
        return {node: replaced[name] for node, name in names.items() if name in replaced}

    Sweep(captured, targets_of(captured, names), drift=True).run(solve)
    x, model = torch.cat(batches).reshape(-1, 8).double(), model.double()

    def low_rank(name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ replaced[name].dense().double().T + getattr(model, name).bias

    # Nothing of what a is added to differs. Of b and c the last makes up for all, the other's output included.
    dense, compressed = x + model.a(x), x + low_rank("a", x)
    lack = dense - compressed
    if names == "ab":
        lack += model.c(torch.sin(dense)) - model.c(torch.sin(compressed))
        name, inputs = "b", torch.tanh
    else:
        lack += model.b(torch.tanh(dense)) - low_rank("b", torch.tanh(compressed))
        name, inputs = "c", torch.sin
    wanted = (inputs(dense) @ getattr(model, name).weight.T + lack).T @ inputs(compressed)
    assert sums.keys() == {f"{name}.weight"}
    torch.testing.assert_close(sums[f"{name}.weight"], wanted.detach(), rtol=1e-4, atol=1e-4)


def test_padding_is_left_out_of_the_statistics():
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x[0, 3:] = 1e6
    captured = capture(Gated(), [{"x": x, "attention_mask": mask}])
    seen = []
    Sweep(captured, targets_of(captured, {"gate"})).run(lambda group, s: seen.append(s) or {})
    kept = x[mask.bool()].double()
    assert seen[0].tokens == 8
    torch.testing.assert_close(seen[0].gram, kept.T @ kept, rtol=1e-5, atol=1e-5)


def test_every_node_runs_once_a_flow_and_values_are_freed():
    depth, width, batches = 6, 16, [torch.randn(64, 16) for _ in range(4)]
    model = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])
    captured = capture(model, batches)
    calls = 0
    names = {str(2 * i) for i in range(depth)}
    sweep = Sweep(captured, targets_of(captured, names))
    evaluate = sweep._evaluate

    def counting(node, values, *, compressed):
        nonlocal calls
        calls += 1
        return evaluate(node, values, compressed=compressed)

    sweep._evaluate = counting
    factors = factorize(low_rank(width, width, 3))
    sweep.run(lambda group, statistics: dict.fromkeys(group.members, factors))
    assert calls == 2 * len(batches) * 2 * (depth - 1)  # linear and tanh, two flows, the last linear never
    value = 64 * width * 4
    # one value a flow and batch, however deep the model, and the new one of the batch at hand beside the old one
    assert sweep.peak_bytes <= (2 * len(batches) + 1) * value


def test_an_activation_that_is_not_finite_names_the_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.data[2] = torch.inf
    captured = capture(model, [torch.randn(3, 4)])
    sweep = Sweep(captured, targets_of(captured, {"0", "1"}))
    with pytest.raises(CalibrationError, match=r"input of 1\.weight is not finite"):
        sweep.run(lambda group, statistics: {})

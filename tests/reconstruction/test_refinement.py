import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from torch.fx import Node

import pifa_compiler as pc
from pifa_compiler import factorize
from pifa_compiler.errors import CalibrationError
from pifa_compiler.factors import PifaFactors
from pifa_compiler.graph.capture import Captured, capture
from pifa_compiler.graph.linears import weight_name
from pifa_compiler.processes import Processes
from pifa_compiler.reconstruction import refinement
from pifa_compiler.reconstruction.refinement import Trained, train_block
from pifa_compiler.reconstruction.sweep import BlockValues, ResidualBlock, Sweep, plan


class Serial(nn.Module):
    """x + b(tanh a(x)), then h + d(sin c(h)), then a head; with a residual stream of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.c, self.d = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, x):
        h = x + self.b(torch.tanh(self.a(x)))
        return self.head(h + self.d(torch.sin(self.c(h))))


class Parallel(nn.Module):
    """Two branches on one value whose outputs are added to each other and to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = torch.tanh(x)
        return (self.b(torch.sin(self.a(h))) + self.c(h)) + x


class Across(nn.Module):
    """a and c read one value; what c computes goes by the first sum, and into the second."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.d = nn.Linear(8, 8) if deep else nn.Identity()

    def forward(self, x):
        first = torch.tanh(x)
        h = x + self.d(self.a(first))
        return h + self.b(torch.tanh(h) * self.c(first))


class NoDerivative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.b(torch.igamma(self.a(x).exp(), x.exp()))


def linears_of(captured: Captured, names: str = "abcd") -> list[Node]:
    nodes = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [node for node in nodes if name_of(node) in names]


def name_of(node: Node) -> str:
    return weight_name(node).removesuffix(".weight")


def blocks_of(model: nn.Module, names: str = "abcd") -> list[tuple[str, str, tuple[str, ...]]]:
    """Of every block its linears, the last of them, and the names of its inputs."""
    captured = capture(model, [torch.randn(4, 8)])
    found = [segment.block for segment in plan(captured.graph.graph, linears_of(captured, names), blocks=True)]
    return [
        ("".join(map(name_of, block.linears)), name_of(block.last), tuple(node.name for node in block.inputs))
        for block in found
        if block is not None
    ]


def test_a_block_goes_from_one_sum_to_the_next():
    assert blocks_of(Serial()) == [("ab", "b", ("x",)), ("cd", "d", ("add",))]


def test_a_sum_that_a_linear_is_not_to_be_replaced_at_ends_no_block():
    assert blocks_of(Serial(), "acd") == [("acd", "d", ("x",))]


def test_branches_that_are_added_up_are_one_block():
    assert blocks_of(Parallel()) == [("acb", "b", ("tanh", "x"))]


def test_a_sum_that_a_group_goes_by_in_part_ends_no_block():
    assert blocks_of(Across(deep=False)) == [("acb", "b", ("tanh", "x"))]


def test_a_group_that_a_block_depends_on_in_part_is_in_none():
    assert blocks_of(Across(deep=True)) == [("d", "d", ("linear", "x")), ("b", "b", ("mul", "add"))]


def low_rank(model: nn.Module, rank: int) -> dict[str, PifaFactors]:
    """Factors that are far from the weights."""
    return {name: factorize(getattr(model, name).weight.detach(), rank=rank) for name in "abcd"}


def serial_with(model: Serial, factors: dict[str, PifaFactors]) -> Serial:
    """The model with dense weights that the factors stand for, in float64."""
    replaced = copy.deepcopy(model).double()
    for name, each in factors.items():
        getattr(replaced, name).weight.data = each.dense().double()
    return replaced


def stream(model: Serial, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after each block, tokens as rows."""
    h = x + model.b(torch.tanh(model.a(x)))
    return h.reshape(-1, 8).detach(), (h + model.d(torch.sin(model.c(h)))).reshape(-1, 8).detach()


def test_blocks_are_seen_on_both_flows_and_the_walk_goes_on_with_what_they_became():
    """Against the textbook: the models run whole."""
    torch.manual_seed(0)
    model, batches = Serial(), [torch.randn(2, 5, 8) for _ in range(3)]
    captured = capture(model, batches)
    solved, refined = low_rank(model, 4), low_rank(model, 6)
    seen, sums = [], {}

    def solve(group, statistics):
        sums[name_of(group.members[0])] = statistics
        return {node: solved[name_of(node)] for node in group.members}

    def refine(block: ResidualBlock, values: BlockValues):
        own = {node: solved[name_of(node)] for node in block.linears}
        new = {node: refined[name_of(node)] for node in block.linears}
        seen.append([(values.output(i, own), values.output(i, new), values.wanted(i)) for i in values.own])
        return new

    Sweep(captured, linears_of(captured), blocks=True).run(solve, refine=refine)
    dense, first = model.double(), serial_with(model, {name: solved[name] for name in "ab"})
    second = serial_with(model, {name: refined[name] for name in "ab"} | {name: solved[name] for name in "cd"})
    both = serial_with(model, refined)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # float32 beside float64
    for batch, x in enumerate(x.double() for x in batches):
        torch.testing.assert_close(seen[0][batch][0], stream(first, x)[0], **close)
        torch.testing.assert_close(seen[0][batch][1], stream(both, x)[0], **close)
        torch.testing.assert_close(seen[0][batch][2], stream(dense, x)[0], **close)
        torch.testing.assert_close(seen[1][batch][0], stream(second, x)[1], **close)
        torch.testing.assert_close(seen[1][batch][1], stream(both, x)[1], **close)
        torch.testing.assert_close(seen[1][batch][2], stream(dense, x)[1], **close)
    inputs = torch.cat([stream(both, x.double())[0] for x in batches])
    torch.testing.assert_close(sums["c"].gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_values_of_a_block_are_freed_after_it():
    model = nn.Sequential(*(Residual() for _ in range(6)))
    captured = capture(model, [torch.randn(64, 8) for _ in range(4)])
    names = [node for node in captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)]
    sweep = Sweep(captured, names, blocks=True)
    sweep.run(lambda group, statistics: {node: factorize(torch.eye(8), rank=8) for node in group.members})
    value = 64 * 8 * 4
    # of four batches and two flows the stream and one value inside of a block, and new ones of the batch at hand
    assert sweep.peak_bytes <= (2 * 2 * 4 + 3) * value


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x):
        return self.block(self.block(x))


def train(steps: int, gram: torch.Tensor | None = None) -> tuple[Trained, list[tuple[float, float]]]:
    """The first block of a model trained on 16 batches, and its error on the last two, before and after, in float64."""
    torch.manual_seed(0)
    model = Serial()
    batches = [torch.randn(1, 24, 8) for _ in range(16)]
    captured = capture(model, batches)
    solved, found = low_rank(model, 4), []

    def refine(block: ResidualBlock, values: BlockValues):
        if block.last is not next(node for node in linears_of(captured) if name_of(node) == "b"):
            return {}
        factors = {node: solved[name_of(node)] for node in block.linears}
        found.append(train_block(values, factors, gram, steps=steps, damping=1e-2, processes=Processes()))
        return found[0].factors

    Sweep(captured, linears_of(captured), blocks=True).run(
        lambda group, statistics: {node: solved[name_of(node)] for node in group.members}, refine=refine
    )
    (trained,) = found
    new = {name_of(node): each for node, each in trained.factors.items()}
    weighting = torch.eye(8).double() if gram is None else gram.double() / gram.diagonal().mean()
    weighting = weighting if gram is None else weighting + 1e-2 * torch.eye(8)
    errors = []
    for x in (x.double() for x in batches[-2:]):
        wanted = stream(copy.deepcopy(model).double(), x)[0]
        off = [stream(serial_with(model, own), x)[0] - wanted for own in ({n: solved[n] for n in "ab"}, new)]
        errors.append(tuple(float((each @ weighting * each).sum()) for each in off))
    return trained, errors


@pytest.mark.parametrize("weighted", [False, True])
def test_training_lowers_the_weighted_error_on_held_out_batches(weighted: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "_RATE", 1e-2)  # these weights are larger than those of models
    torch.manual_seed(1)
    root = torch.randn(8, 3)
    trained, errors = train(40, root @ root.T if weighted else None)
    before, after = (sum(each) for each in zip(*errors, strict=True))
    assert trained.step > 0
    assert after / before == pytest.approx(trained.error, rel=1e-3)
    assert trained.error < 0.8


def test_no_step_makes_it_worse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "_RATE", 30.0)
    trained, errors = train(10)
    assert (trained.step, trained.error) == (0, 1.0)
    assert all(before == after for before, after in errors)
    assert "no step made its block better" in str(trained)


def test_a_gradient_that_is_not_finite_ends_the_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "_RATE", 1e25)
    trained, errors = train(10)
    assert trained.step == 0
    assert "is not finite" in str(trained)
    assert all(before == after for before, after in errors)


def test_each_step_takes_an_eighth_of_the_batches_and_all_in_turn():
    steps = list(refinement._batches_of_steps(14, 16))
    assert [len(batches) for batches in steps] == [2] * 16
    for turn in (steps[:7], steps[7:14]):
        assert sorted(batch for batches in turn for batch in batches) == list(range(14))
    assert steps[:7] != steps[7:14]


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (2, 48), generator=generator) for _ in range(16)]


@pytest.mark.parametrize("method", ["two-sided", "svd-llm"])
def test_compress_refines_every_block_and_says_so(method, batches, monkeypatch):
    """Methods that look at one flow take their statistics of the dense model as before."""
    monkeypatch.setattr(refinement, "_RATE", 1e-3)
    plain, refined = tiny_llama(), tiny_llama()
    config = pc.CompressConfig(density=0.5, rank_multiple=1, method=method)
    pc.compress(plain, batches, config)
    report = pc.compress(refined, batches, replace(config, refine=16))
    assert [plain.get_submodule(each.name).rank for each in report.factorized] == [e.rank for e in report.factorized]
    first = [each for each in report.factorized if "layers.0.self_attn" in each.name]  # solved alike in both
    for layer in first:
        own, before = refined.get_submodule(layer.name), plain.get_submodule(layer.name)
        told = any(note.startswith("refined") for note in layer.notes)
        assert told != torch.equal(own.w_pivot, before.w_pivot)
        assert torch.equal(own.pivots, before.pivots)
    assert all(any("its block" in note for note in each.notes) for each in report.factorized)
    assert any(note.startswith("refined: error of its block") for each in first for note in each.notes)


def test_bfloat16_factors_are_trained_in_float32_and_stored_as_they_were(batches, monkeypatch):
    monkeypatch.setattr(refinement, "_RATE", 1e-3)
    model = tiny_llama().to(torch.bfloat16)
    report = pc.compress(model, batches, pc.CompressConfig(density=0.5, rank_multiple=1, refine=16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any(note.startswith("refined") for each in report.factorized for note in each.notes)


def test_what_cannot_be_refined_says_why():
    def notes_of(model: nn.Module, width: int) -> set[str]:
        batches = [torch.randn(8, width) for _ in range(3)]
        report = pc.compress(
            model, batches, pc.CompressConfig(density=0.8, rank_multiple=1, refine=2, allocator="uniform")
        )
        return {note for each in report.factorized for note in each.notes if "not refined" in note}

    (alone,) = notes_of(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), 16)
    assert alone == "not refined: in no residual block"
    (no_derivative,) = notes_of(NoDerivative(), 16)
    assert "not refined: a block has no gradients: the derivative for 'igamma: input' is not" in no_derivative
    (shared,) = notes_of(Twice(), 8)
    assert "used elsewhere too" in shared


def test_one_batch_is_too_few():
    with pytest.raises(CalibrationError, match="needs 2 or more, got 1"):
        pc.compress(tiny_llama(), [torch.zeros(1, 8, dtype=torch.int64)], pc.CompressConfig(refine=1))

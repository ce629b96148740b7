"""Models that `torch.export` cannot capture whole: their parts are, for what the model calls them with."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import pifa_compiler as pc
from pifa_compiler.errors import CalibrationError, CaptureError
from pifa_compiler.graph.parts import capture_whole_or_in_parts
from pifa_compiler.graph.run import call_node


class Block(nn.Module):
    """Writes into what it is given, after its layers have read it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.register_buffer("scale", torch.full((12,), 0.5), persistent=False)

    def forward(self, x: Tensor, *, scaled: bool = False, shift: Tensor | None = None) -> Tensor:
        y = self.down(F.relu(self.up(x)))
        y = y * self.scale if scaled else y
        x += y if shift is None else y + shift
        return x


class Branches(nn.Module):
    """How many rows go on depends on the values, so that no graph can be made of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embed, self.head, self.never = nn.Linear(5, 12), nn.Linear(12, 5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x, scaled=index == 1, shift=torch.ones(12))
            if float(x.detach().sum()) > 1e9:
                return self.never(x)
        return self.head(x)


def branches() -> tuple[Branches, list[Tensor]]:
    torch.manual_seed(0)
    return Branches().eval(), [torch.randn(4, count, 5) for count in (6, 9)]


def test_the_largest_parts_that_can_be_captured_are_and_compute_what_the_model_does_there():
    model, batches = branches()
    seen: dict[str, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object], output: Tensor) -> None:
        seen.setdefault(names[module], []).append(output.clone())

    names = {model.get_submodule(name): name for name in ("embed", "blocks.0", "blocks.1", "head")}
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    captured = capture_whole_or_in_parts(model, batches)
    assert captured.parts == ("blocks.0", "blocks.1", "embed", "head")
    assert "captured in parts" in captured.notes[0]
    assert "Branches" in captured.notes[0]
    graph = captured.graph.graph
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    assert {name for name, _ in model.named_parameters()} - read == {"never.weight", "never.bias"}
    (output,) = graph.find_nodes(op="output")
    for batch in range(2):
        values = dict(zip(graph.find_nodes(op="placeholder"), captured.inputs[batch], strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                values[node] = call_node(captured.weights, node, values)
        for name, node in zip(captured.parts, output.all_input_nodes, strict=True):
            assert_close(values[node], seen[name][batch], rtol=0, atol=0)


def test_a_model_in_parts_is_compressed_within_its_budget_and_the_report_tells():
    model, batches = branches()
    wanted = model(batches[0]).detach()
    report = pc.compress(model, batches, pc.CompressConfig(density=0.8, rank_multiple=1, method="svd"))
    assert {layer.name for layer in report.factorized} >= {"blocks.0.up", "blocks.1.down"}
    assert [layer.name for layer in report.skipped if "not reached" in str(layer.skipped)] == ["never"]
    assert report.density <= 0.8
    assert [note for note in report.notes if "captured in parts" in note and "blocks.0, blocks.1" in note]
    # Small where the parts were given what belongs to them: weights of random numbers have no low rank.
    assert 0 < (model(batches[0]).detach() - wanted).norm() < 0.6 * wanted.norm()


class Twice(Branches):
    """Calls the second block in some batches only, and the first one twice."""

    def forward(self, x: Tensor) -> Tensor:
        few, x = x.shape[1] < 7, self.embed(x)
        x = self.blocks[0](self.blocks[0](x), scaled=True)
        x = self.blocks[1](x) if few else x
        return self.head(x) if float(x.detach().sum()) < 1e9 else x


def test_parts_that_are_not_called_alike_in_every_batch_are_left_and_of_two_calls_the_first_is_taken():
    torch.manual_seed(0)
    model, batches = Twice().eval(), [torch.randn(4, count, 5) for count in (6, 9)]
    captured = capture_whole_or_in_parts(model, batches)
    assert captured.parts == ("blocks.0", "embed", "head")
    first = next(values for node, values in zip(captured.graph.graph.nodes, captured.inputs[1], strict=False))
    assert_close(first, model.embed(batches[1]))


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else x @ self.weight


def test_a_model_without_such_parts_is_refused_for_what_hinders_the_whole():
    with pytest.raises(CaptureError, match="could not capture Nothing as one graph"):
        capture_whole_or_in_parts(Nothing(), [torch.ones(2, 4)])


class Fails(Nothing):
    def forward(self, x: Tensor) -> Tensor:
        raise LookupError("nowhere")


def test_a_model_that_fails_when_it_is_called_is_refused_likewise():
    model = nn.Sequential(nn.Linear(4, 4), Fails())
    with pytest.raises(CaptureError, match="could not capture Sequential as one graph: nowhere"):
        capture_whole_or_in_parts(model, [torch.ones(2, 4)])


def test_numbers_and_flags_that_differ_between_batches_are_refused():
    model = Block()
    batches = [{"x": torch.randn(2, 12), "scaled": flag} for flag in (True, False)]
    with pytest.raises(CalibrationError, match="True and False came"):
        capture_whole_or_in_parts(model, batches)

"""A graph that computes something else than its model is found, and nothing is calibrated on it."""

import pytest
import torch
from torch import Tensor, nn

import pifa_compiler as pc
from pifa_compiler.errors import CaptureError
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.parts import capture_whole_or_in_parts
from pifa_compiler.graph.same_values import check_same_values


class OtherWhenExported(nn.Module):
    """Two layers with a step between that is left out where `torch.export` follows it, as masks of some models are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y if torch.compiler.is_exporting() else y.flip(0))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(()).item()


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x += self.layer(x)
        return x.masked_fill(x < -1, -torch.inf)


def test_a_graph_that_computes_something_else_is_refused():
    model, x = OtherWhenExported(), torch.randn(6, 12)
    with pytest.raises(CaptureError, match=r"something else than the model: outputs differ by \d\.\d+ of their norm"):
        check_same_values(model, capture(model, [x]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_calibrates_on_what_the_model_computes(dtype):
    torch.manual_seed(0)
    model, batches = OtherWhenExported().to(dtype), [torch.randn(64, 12, dtype=dtype) for _ in range(2)]
    captured = capture_whole_or_in_parts(model, batches)
    assert captured.parts == ("up", "down")
    assert torch.equal(captured.inputs[1][1], model.up(batches[1]).flip(0))
    report = pc.compress(model, batches, pc.CompressConfig(density=0.8, rank_multiple=1))
    assert any("computes something else" in note for note in report.notes)


@pytest.mark.parametrize("make", [Noisy, WritesIntoItsInput, lambda: nn.Linear(12, 12).bfloat16().train()])
def test_what_cannot_be_told_apart_is_let_through_and_batches_stay_as_they_are(make):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(6, 12, dtype=next(model.parameters()).dtype)
    before, training, numbers = x.clone(), model.training, torch.random.get_rng_state()
    check_same_values(model, capture(model, [x]), x)
    assert torch.equal(x, before)
    assert model.training == training
    assert torch.equal(torch.random.get_rng_state(), numbers)


def test_a_model_that_cannot_be_called_is_refused_with_what_it_says():
    model, x = nn.Linear(12, 12), torch.randn(6, 12)
    captured = capture(model, [x])
    with pytest.raises(CaptureError, match=r"Linear cannot be called with a batch: .*12"):
        check_same_values(model, captured, torch.randn(6, 13))

import pytest
import torch
from graphs import op_counts
from torch import nn

from pifa_compiler.capture import capture
from pifa_compiler.errors import CalibrationError, CaptureError


def test_capture_is_functional_and_shares_the_weights():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 4)).train()
    x = torch.randn(3, 8)
    captured = capture(model, [x])
    counts = op_counts(captured.graph)
    assert counts[torch.ops.aten.linear.default] == 2
    assert not any(str(op).rstrip(".default").endswith("_") for op in counts)
    assert captured.graph.get_parameter("0.weight").data_ptr() == model[0].weight.data_ptr()
    assert model.training
    assert model[2].training
    torch.testing.assert_close(captured.graph(x), model.eval()(x))


def test_capture_takes_tensors_tuples_and_mappings():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y=None, attention_mask=None):
            return self.fc(x if y is None else x + y)

    model, x, mask = TwoInputs(), torch.randn(2, 4), torch.ones(2, 1)
    assert [v is x for v in capture(model, [x]).inputs[0]] == [True]
    assert len(capture(model, [(x, x)]).inputs[0]) == 2
    assert len(capture(model, [{"x": x, "attention_mask": mask}]).inputs[0]) == 2


def test_batches_of_several_lengths_are_captured_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    batches = [torch.randn(n, 8) for n in (3, 5, 3)]
    graph = capture(model, batches).graph
    for x in batches:
        torch.testing.assert_close(graph(x), model(x))


def test_capture_names_what_cannot_be_captured():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="Branches"):
        capture(Branches(), [torch.randn(3)])


def test_capture_refuses_batches_that_differ_in_structure():
    model = nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match="structure"):
        capture(model, [torch.randn(2, 4), {"input": torch.randn(2, 4)}])
    with pytest.raises(CalibrationError, match="number of dimensions"):
        capture(model, [torch.randn(2, 4), torch.randn(1, 2, 4)])
    with pytest.raises(CalibrationError, match="at least one"):
        capture(model, [])

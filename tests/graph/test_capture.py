import pytest
import torch
from graphs import op_counts
from torch import nn

from pifa_compiler.errors import CalibrationError, CaptureError
from pifa_compiler.graph.capture import capture


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


@pytest.mark.parametrize("shapes", [[(1, 6), (3, 6)], [(1, 6), (3, 4)], [(1, 6), (2, 1)]], ids=str)
def test_batches_of_one_sample_beside_larger_ones_are_captured_once(shapes: list[tuple[int, int]]):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    batches = [torch.randint(0, 20, shape) for shape in shapes]
    captured = capture(model, batches)
    assert [values[0] is batch for values, batch in zip(captured.inputs, batches, strict=True)] == [True, True]
    for batch in batches:
        torch.testing.assert_close(captured.graph(batch), model(batch))


def test_sizes_that_the_graph_does_not_hold_for_are_refused_before_any_work():
    class Fixed(nn.Module):
        """Its graph holds for one number of rows, since Python looks at it."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) * len([row for row in range(x.shape[0])])

    with pytest.raises(
        CalibrationError, match=r"in batch 1 dimension 0 of x is 5, and would have to be 3; give batches"
    ):
        capture(Fixed(), [torch.randn(3, 4), torch.randn(5, 4)])


def test_inputs_that_go_together_must_do_so_in_every_batch():
    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.fc(x) + y

    batches = [(torch.randn(3, 4), torch.randn(3, 4)), (torch.randn(5, 4), torch.randn(6, 4))]
    with pytest.raises(CalibrationError, match=r"in batch 1 dimension 0 of y is 6, and would have to be 5"):
        capture(Together(), batches)


def test_a_model_made_in_inference_mode_is_refused_with_the_way_out():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=r"0\.weight was made under .*inference_mode.*load the model outside"):
        capture(model, [torch.randn(2, 4)])

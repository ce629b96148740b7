import pytest
import torch
from tiny_models import tiny_llama

from pifa_compiler.graph import causal_attention
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.causal_attention import without_causal_mask

attention = torch.ops.aten.scaled_dot_product_attention.default


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("named", [True, False], ids=["by-name", "by-place"])
def test_a_causal_mask_becomes_is_causal_and_the_values_stay(named):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = causal(9).expand(2, 1, 9, 9)
    args, kwargs = ((q, k, v), {"attn_mask": mask, "scale": 0.3}) if named else ((q, k, v, mask, 0.0), {"scale": 0.3})
    new_args, new_kwargs = without_causal_mask(args, kwargs)
    assert new_kwargs["attn_mask"] is None
    assert new_kwargs["is_causal"] is True
    assert new_kwargs["scale"] == 0.3
    # float32 rounding: the same sums of at most nine terms, in another order
    torch.testing.assert_close(attention(*new_args, **new_kwargs), attention(*args, **kwargs), rtol=1e-5, atol=1e-6)


def padded() -> torch.Tensor:
    mask = causal(9)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False
    return mask


@pytest.mark.parametrize(
    "mask",
    [padded(), causal(9).triu(-3), torch.ones(9, 9, dtype=torch.bool), torch.zeros(9, 9), None],
    ids=["padding", "sliding-window", "all", "floats", "none"],
)
def test_other_masks_stay(mask):
    q = torch.randn(2, 4, 9, 8)
    _, kwargs = without_causal_mask((q, q, q, mask), {})
    assert kwargs["attn_mask"] is mask
    assert not kwargs.get("is_causal", False)


def test_a_mask_is_compared_once(monkeypatch):
    compared = []
    whole = causal_attention._looks_causal
    monkeypatch.setattr(causal_attention, "_looks_causal", lambda mask: compared.append(mask) or whole(mask))
    q = torch.randn(2, 4, 9, 8)
    for mask in (causal(9), padded()):
        answers = [without_causal_mask((q, q, q, mask), {})[1].get("is_causal") for _ in range(3)]
        assert answers == [answers[0]] * 3
    assert len(compared) == 2


def test_fewer_queries_than_keys_stay():
    # is_causal counts from the first key, such a mask from the last
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 9, 8)
    mask = causal(9)[-4:]
    assert without_causal_mask((q, k, k, mask), {})[1]["attn_mask"] is mask


def test_the_mask_of_a_captured_model_is_found():
    captured = capture(tiny_llama(), [torch.randint(0, 64, (1, 12))])
    masks = [node.args[3] for node in captured.graph.graph.find_nodes(op="call_function", target=attention)]
    assert masks
    values = torch.fx.Interpreter(captured.graph)
    values.garbage_collect_values = False
    values.run(*captured.inputs[0])
    for mask in masks:
        q = torch.randn(1, 2, 12, 8)
        assert without_causal_mask((q, q, q, values.env[mask]), {})[1]["is_causal"] is True

"""BasisAttention on graphs of all captures, and the bases that it takes."""

import pytest
import torch
from graphs import CAPTURES, call, op_counts
from pifa_compiler.passes import BasisAttention, Canonicalize, Skip, run_passes
from pifa_compiler.passes.attention_heads import find_heads
from torch import Tensor, nn
from torch.nn import functional as F

from pifa_compiler.errors import RankError
from pifa_compiler.head_basis import find_bases, find_basis

aten = torch.ops.aten


def written_out_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Six query heads on three key and value heads of 8, written out or by one function; with a norm on keys or not."""

    def __init__(self, written_out: bool = False, norm: bool = False, gate: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*shape, bias) for shape in ((32, 48), (32, 24), (32, 24), (48, 32)))
        self.written_out, self.norm, self.gate = written_out, norm, gate

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 6, 8).transpose(1, 2) * 0.5
        k, v = (layer(x).view(batch, tokens, 3, 8).transpose(1, 2) for layer in (self.k, self.v))
        if self.norm:
            k = k / k.norm(dim=-1, keepdim=True)
        k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 6, tokens, 8) for each in (k, v))
        attend = written_out_attention if self.written_out else F.scaled_dot_product_attention
        mixed = attend(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, 48)
        return self.o(mixed * x.repeat(1, 1, 2)[..., :48] if self.gate else mixed)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_heads_are_put_in_a_basis_whatever_the_capture(capture: str, written_out: bool):
    torch.manual_seed(0)
    model, x = Attention(written_out), torch.randn(2, 5, 32)
    with torch.no_grad():
        gm = CAPTURES[capture](model, (x,))
        run_passes(gm, [Canonicalize()])
        wanted = call(gm, x)
        records = run_passes(gm, [BasisAttention()])
        assert [type(record.outcome) for record in records] == [str, str]
        assert op_counts(gm)[torch.ops.pifa.basis_linear.default] == 2
        assert op_counts(gm)[aten.linear.default] == 2
        torch.testing.assert_close(call(gm, x), wanted, rtol=1e-5, atol=1e-5)  # lossless up to float32 rounding
        other = torch.randn(2, 5, 32)
        torch.testing.assert_close(call(gm, other), model(other), rtol=1e-5, atol=1e-5)
        assert run_passes(gm, [BasisAttention()]) == []  # a second run finds nothing
    stored = sum(buffer.numel() for name, buffer in gm.named_buffers() if "rest" in name)
    assert stored == 2 * 24 * (32 - 8)


@pytest.mark.parametrize(
    ("changes", "made", "reason"),
    [
        ({"gate": True}, "k_weight", "values: mul_1 stands between attention and a linear"),
        ({"gate": True, "written_out": True, "bias": False}, "k_weight", "values: mul_1 stands between"),
        ({"norm": True}, "v_weight", None),  # no keys come to a product as a linear made them
    ],
    ids=str,
)
def test_what_stands_between_is_a_reason(changes: dict[str, bool], made: str, reason: str | None):
    model, x = Attention(**changes), torch.randn(2, 5, 32)
    with torch.no_grad():
        gm = CAPTURES["export"](model, (x,))
        run_passes(gm, [Canonicalize()])
        found, wanted = find_heads(gm), call(gm, x)
        free = [node.args[1].name for node, heads in found.items() if heads.free]
        left = [f"{role}: {skip.reason}" for heads in found.values() for role, skip in heads.left.items()]
        records = run_passes(gm, [BasisAttention()])
        torch.testing.assert_close(call(gm, x), wanted, rtol=1e-5, atol=1e-5)
    assert free == [made]
    assert len(left) == (reason is not None)
    assert all(str(reason) in each for each in left)
    skips = [record.outcome.reason for record in records if isinstance(record.outcome, Skip)]
    assert [f"values: {skip}" for skip in skips] == left
    assert len(records) - len(skips) == 1


def test_a_square_of_heads_is_no_scaling():
    class Squared(Attention):
        def forward(self, x: Tensor) -> Tensor:
            v = self.v(x).view(2, 5, 3, 8).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(v, v, v * v)
            return F.pad(mixed.transpose(1, 2).reshape(2, 5, 24), (0, 24)) @ self.o.weight.T

    gm = CAPTURES["export"](Squared(), (torch.randn(2, 5, 32),))
    run_passes(gm, [Canonicalize()])
    assert all(not heads.free for heads in find_heads(gm).values())


def test_a_basis_is_better_than_the_first_inputs_and_follows_their_sizes():
    torch.manual_seed(0)
    weights = torch.randn(3, 8, 32)
    weights[:, :, :4] *= 1e-3
    basis = find_basis(weights)
    for head, change, rest in zip(weights.double(), basis.change, basis.rest, strict=True):
        torch.testing.assert_close(change @ rest, head[:, basis.others])
        assert torch.equal(change, head[:, basis.inputs])
    assert not set(basis.inputs.tolist()) & {0, 1, 2, 3}
    assert basis.growth < 5
    sizes = torch.ones(32)
    sizes[16:] = 1e-2
    assert set(find_basis(weights, sizes).inputs.tolist()) <= set(range(4, 16))


def test_heads_share_a_basis_where_their_precision_allows_it():
    torch.manual_seed(0)
    weights = torch.randn(32, 8, 32)
    assert len(find_bases(weights.double())) <= len(find_bases(weights.half())) < len(find_bases(weights.bfloat16()))
    weights[5, 0] = weights[5, 1]
    with pytest.raises(RankError, match="basis"):
        find_bases(weights)
    with pytest.raises(RankError, match="NaN"):
        find_basis(weights / 0)

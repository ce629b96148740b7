import pytest
import torch
from pifa_compiler.kernels.side_by_side import as_one, lay_side_by_side, may_be_laid
from torch import Tensor, nn


def weights(*shapes: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False) for shape in shapes]


def bytes_held(tensors: list[Tensor]) -> int:
    """Of the pieces of memory that tensors lie in, adjacent ones together."""
    spans = sorted({(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors})
    return sum(end - start for start, end in spans)


def test_weights_stay_themselves_and_are_read_as_one():
    found = weights((8, 16), (24, 16), (0, 16), (2, 4))
    before = [t.clone() for t in found]
    assert as_one(found) is None
    assert may_be_laid(found)
    lay_side_by_side(found)
    assert all(torch.equal(t, b) and isinstance(t, nn.Parameter) for t, b in zip(found, before, strict=True))
    assert [t.storage_offset() for t in found] == [0] * 4  # as compilers have noted
    assert bytes_held(found) == sum(t.numel() for t in found) * 2
    joint = as_one(found)
    assert torch.equal(joint, torch.cat([t.flatten() for t in before]))
    found[1].fill_(3)
    assert torch.equal(joint, torch.cat([t.flatten() for t in found]))  # changes are seen
    places = [t.data_ptr() for t in found]
    lay_side_by_side(found)
    assert places == [t.data_ptr() for t in found]


def test_whoever_moves_one_is_seen():
    for move in (
        lambda t: setattr(t, "data", t.clone()),
        lambda t: setattr(t, "data", t.double()),
        lambda t: setattr(t, "data", t.T.contiguous().T),
    ):
        found = weights((8, 16), (24, 16))
        lay_side_by_side(found)
        assert as_one(found) is not None
        move(found[1])
        assert as_one(found) is None
    assert as_one(found[::-1]) is None


def test_the_memory_outlives_the_first_of_them():
    found = weights((512, 512), (512, 512))
    wanted = found[1].clone()
    lay_side_by_side(found)
    del found[0]
    torch.randn(1024, 1024)
    assert torch.equal(found[0], wanted)


@pytest.mark.parametrize(
    "others",
    [
        lambda w: [*w, w[0]],
        lambda w: [*w, torch.randn(4, 32).bfloat16()[:, ::2]],
        lambda w: [*w, torch.randn(8, 16).bfloat16()[4:]],
        lambda w: [*w, torch.randn(4, 16)],
        lambda w: [*w, torch.empty(4, 16, device="meta")],
        lambda w: [torch.randn(1, 3).bfloat16(), *w],
        lambda w: [torch.randn(4, 16).bfloat16().share_memory_(), *w],
    ],
    ids=["twice", "strided", "view", "dtype", "meta", "unaligned", "shared"],
)
def test_tensors_that_others_may_rely_on_are_not_moved(others):
    assert not may_be_laid(others(weights((8, 16), (24, 16))))


def test_tensors_with_another_name_are_not_moved():
    found = weights((8, 16), (24, 16))
    other = found[0].detach()
    assert not may_be_laid(found)
    del other
    assert may_be_laid(found)
    with torch.inference_mode():
        assert not may_be_laid([torch.ones(4, 4), torch.ones(4, 4)])

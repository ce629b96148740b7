"""Weights that lie one behind the other in memory: one GEMM reads them as one, and nothing is held twice.

`lay_side_by_side` moves weights into one piece of memory; each stays the tensor that it was, with a storage of its own.
`as_one` sees whether they lie so, at every call: whoever moves or exchanges one of them (`.to`, `.data = ...`) makes
calls slower, not wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

ALIGNMENT = 16
"""Bytes: the widest load of a thread, which libraries and Inductor count on."""


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """All numbers of the tensors, flat, without a copy; None unless they lie one behind the other.

    The result may be used for as long as the tensors are there.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return None
    first, end = filled[0], filled[0].data_ptr()
    for tensor in filled:
        alike = tensor.dtype is first.dtype and tensor.device == first.device and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != end:
            return None
        end += tensor.numel() * tensor.element_size()
    start = first.data_ptr()
    storage = torch._C._construct_storage_from_data_pointer(start, first.device, end - start)
    return first.new_empty(0).set_(storage, 0, ((end - start) // first.element_size(),), (1,))


def may_be_laid(tensors: Sequence[Tensor]) -> bool:
    """Whether `lay_side_by_side` can move the tensors unseen, or need not.

    Not those with anything else in their storage or in its use: a larger tensor that they are views of, another name
    for the same numbers, a state dict, another process. Nor tensors of several dtypes or devices, and of sizes that
    would put one at an address that is no multiple of `ALIGNMENT`.
    """
    if any(tensor.is_meta for tensor in tensors):
        return False
    if as_one(tensors) is not None:
        return True
    first = tensors[0]
    return len({id(tensor) for tensor in tensors}) == len(tensors) and all(
        tensor.dtype is first.dtype
        and tensor.device == first.device
        and tensor.is_contiguous()
        and tensor.numel() * tensor.element_size() % ALIGNMENT == 0
        and not tensor.is_inference()
        and not (tensor.device.type == "cpu" and tensor.is_shared())
        and _is_alone_in_storage(tensor)
        for tensor in tensors
    )


def _is_alone_in_storage(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    return storage.nbytes() == tensor.numel() * tensor.element_size() and users == 2  # the tensor, and `storage`


@torch.no_grad()
def lay_side_by_side(tensors: Sequence[Tensor]) -> None:
    """Moves tensors that `may_be_laid` to one piece of memory, one behind the other, unless they lie so.

    They stay the same objects, with the same numbers.
    """
    if as_one(tensors) is not None:
        return
    first, sizes = tensors[0], [tensor.numel() for tensor in tensors]
    joint = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
    for tensor, part in zip(tensors, joint.split(sizes), strict=True):
        # By DLPack a part has a storage that begins with it: compilers have noted that weights begin theirs.
        tensor.data = from_dlpack(part.view(tensor.shape).copy_(tensor))

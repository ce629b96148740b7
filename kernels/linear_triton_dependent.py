"""Decode by launches that overlap: programmatic dependent launch, on NVIDIA's chips from compute capability 9.0 on.

    the first launch    lets the next one begin at once (griddepcontrol.launch_dependents)
    every further one   asks for its weights to come into the L2 cache, and waits for the one in front of it to end
                        (griddepcontrol.wait) before it reads what that wrote, or writes anything

The kernels are those of `linear_triton_decode` and `linear_triton_siblings_decode`. Inductor drops the attribute of a
launch (`launch_pdl`) from kernels that it traces, as of torch 2.13; so these are opaque operators. Each of their
launches costs Python's time, unless a CUDA graph replays it: a capture keeps the attribute.

Taken where `linear_triton_tiles.DEPENDENT_LAUNCH` is set. Not timed on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from . import linear_triton_tiles as tiles
from .linear_triton_decode import decode
from .linear_triton_siblings_decode import decode_siblings


def launches_depend(x: Tensor) -> bool:
    """Whether decode on the device of `x` goes by these operators."""
    if not tiles.DEPENDENT_LAUNCH or not x.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def _decode(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, precision: str, tune: bool
) -> Tensor:
    return decode(x, w_pivot, coeff, order, bias, precision=precision, tune=tune, dependent=True)


def _decode_siblings(
    x: Tensor,
    w_pivots: list[Tensor],
    coeffs: list[Tensor],
    orders: list[Tensor | None],
    biases: list[Tensor | None],
    precision: str,
    tune: bool,
) -> list[Tensor]:
    return decode_siblings(x, w_pivots, coeffs, orders, biases, precision=precision, tune=tune, dependent=True)


def _shape(x: Tensor, w_pivot: Tensor, coeff: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_pivot.shape[0] + coeff.shape[0])


def _shapes(x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[0] + c.shape[0]) for w, c in zip(w_pivots, coeffs, strict=True)]


decode_dependently: Any = torch.library.custom_op("pifa::linear_triton_dependent", _decode, mutates_args=())
decode_siblings_dependently: Any = torch.library.custom_op(
    "pifa::linear_siblings_triton_dependent", _decode_siblings, mutates_args=()
)
decode_dependently.register_fake(_shape)
decode_siblings_dependently.register_fake(_shapes)

"""The operator `pifa::grouped_linear_triton`: `pifa::grouped_linear` by a Triton kernel, on NVIDIA and AMD GPUs.

    x [rows, in] --- w_pivot[e] ---> y[:, :r] --- coeff[e] ---> y[:, r:] --- order, bias ---> result

The two GEMMs of `linear_triton_prefill`, over tiles that belong to one expert each. Every program finds its expert from
`ends`, so the host need not know them: there are as many programs as the tiles may be at most, and those left over end
at once. As there, order and bias are operations of ATen behind the kernels, which Inductor fuses. No gradients.

The tiles are those of linears with as many rows as an expert has on average.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .form import check_dtypes
from .grouped_linear import add_bias, undo_order
from .linear_triton import DTYPES
from .linear_triton_operator import MAX_STRIDE, define_operator, precision_of_float32
from .linear_triton_prefill import GROUP_M, store_tile
from .linear_triton_tiles import Tile, fixed_decode_tile, fixed_prefill_tile, tokens_bucket


@triton.jit
def grouped_kernel(
    a,
    w,
    y,
    ends,
    stride_a,
    stride_y,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, FIRST + n] = sum_k a[m, k] w[e, n, k] for the rows m of every expert e: a [rows, K] (y itself if None)."""
    e = tl.arange(0, BLOCK_E)
    known = e < EXPERTS
    stops = tl.load(ends + e, mask=known, other=0).to(tl.int64)
    starts = tl.load(ends + e - 1, mask=known & (e > 0), other=0).to(tl.int64)
    tiles = tl.cdiv(stops - starts, BLOCK_M).to(tl.int32) * tl.cdiv(N, BLOCK_N)
    until = tl.cumsum(tiles, 0)
    pid = tl.program_id(0)
    expert = tl.sum((until <= pid).to(tl.int32))
    if expert < EXPERTS:
        its = e == expert
        start = tl.sum(tl.where(its, starts, 0))
        rows = tl.sum(tl.where(its, stops - starts, 0)).to(tl.int32)
        before = tl.sum(tl.where(its, until - tiles, 0))
        left = y if a is None else a
        store_tile(
            pid - before, left + start * stride_a, w + expert.to(tl.int64) * N * K, y + start * stride_y + FIRST,
            rows, stride_a, stride_y, N, K, K % BLOCK_K == 0, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def launch(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    """`pifa::grouped_linear` by the kernel.

    Args:
        x: [rows, in], float16, bfloat16 or float32, sorted by expert; copied unless its last stride is 1.
        w_pivot: [experts, r, in], dtype of `x`; copied unless contiguous, as `coeff` is.
        coeff: [experts, out - r, r], dtype of `x`.
        order: gather indices, [experts, out], int64, or None.
        bias: [experts, out], dtype of `x`, or None.
        ends: [experts], int32 or int64: expert e has the rows ends[e - 1] to ends[e].

    Returns:
        [rows, out], dtype of `x`; 0 in the rows from ends[-1] on.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x, w_pivot, coeff, bias, ends)
    (rows, _), (experts, rank, _), others = x.shape, w_pivot.shape, coeff.shape[1]
    out = rank + others
    y = x.new_zeros(rows, out)  # rows of no expert are in no tile
    if rows == 0:
        return y
    if x.stride(1) != 1 or x.stride(0) >= MAX_STRIDE:
        x = x.contiguous()
    ends = ends.contiguous()

    def multiply(a: Tensor | None, w: Tensor, first: int) -> None:
        tile = fixed_tile(rows, experts, w.shape[1], x.element_size(), torch.version.hip is not None)
        most = rows // tile.block_m + min(rows, experts)  # tiles of rows
        wrap_triton(grouped_kernel)[(most * triton.cdiv(w.shape[1], tile.block_n),)](
            a, w, y, ends, out if a is None else a.stride(0), out,
            EXPERTS=experts, N=w.shape[1], K=w.shape[2], FIRST=first, PRECISION=precision_of_float32(), GROUP=GROUP_M,
            BLOCK_E=max(16, triton.next_power_of_2(experts)), **tile.launch_options(),
        )  # fmt: skip

    multiply(x, w_pivot.contiguous(), 0)
    if others:
        multiply(None, coeff.contiguous(), rank)
    if order is not None:
        y = undo_order(y, order, ends)
    return y if bias is None else add_bias(y, bias, ends)


def fixed_tile(rows: int, experts: int, weight_rows: int, itemsize: int, hip: bool) -> Tile:
    """The tile for so many rows of x in all, and matrices with `weight_rows` rows."""
    bucket = tokens_bucket(-(-rows // experts))
    if bucket <= 16:
        return fixed_decode_tile(weight_rows, itemsize, 16, hip)
    return fixed_prefill_tile(bucket, itemsize, hip)


def _check(x: Tensor, w_pivot: Tensor, coeff: Tensor, bias: Tensor | None, ends: Tensor) -> None:
    operands = [x, w_pivot, coeff, *(() if bias is None else (bias,))]
    check_dtypes("grouped_linear_triton", "pifa::grouped_linear", DTYPES, operands)
    fits = [operand.dim() for operand in operands] == [2, 3, 3, 2][: len(operands)] and w_pivot.shape[1] > 0
    fits = fits and (x.shape[1], len(w_pivot), w_pivot.shape[1]) == (w_pivot.shape[2], len(coeff), coeff.shape[2])
    if not fits or ends.shape != (len(w_pivot),):
        shapes = [list(operand.shape) for operand in (*operands, ends)]
        raise ValueError(
            "grouped_linear_triton takes x [rows, in], w_pivot [experts, r, in], coeff [experts, out - r, r], r > 0, "
            f"bias [experts, out] and ends [experts], got {shapes}"
        )


grouped_linear_triton = define_operator("pifa::grouped_linear_triton", launch)


def _shape(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    _check(x, w_pivot, coeff, bias, ends)
    return x.new_empty(x.shape[0], w_pivot.shape[1] + coeff.shape[1])


grouped_linear_triton.register_fake(_shape)

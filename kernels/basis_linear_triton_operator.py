"""The operator `pifa::basis_linear_triton`: the heads of `pifa::basis_linear` by a Triton kernel, on GPUs.

    x [tokens, in] --- order[g] ---> [basis, others] --- w_rest ---> sums that start from the basis

The inputs are put into every group's order first, by one gather, so that the kernel reads them as rows: group by group
the tiles of `linear_triton_prefill`, but that their sums start from inputs. For NVIDIA's and AMD's chips, not timed on
one; the tiles are those of one linear. No gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .form import check_dtypes
from .linear_triton import DTYPES
from .linear_triton_operator import define_operator, precision_of_float32
from .linear_triton_tiles import Tile, fixed_decode_tile, fixed_prefill_tile, tokens_bucket


@triton.jit
def basis_kernel(
    x,
    w,
    bias,
    y,
    M,
    stride_y,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, i] = x[m, g, i % D] + sum_k x[m, g, D + k] w[i, k] + bias[i], for rows i of the group g.

    x is [M, groups, D + K], w [groups * SIZE, K]; programs are [tiles of tokens, tiles of a group's rows, groups].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    first = tl.program_id(1) * BLOCK_N
    group = tl.program_id(2).to(tl.int64)
    m, n, k = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = m < M - row, n < SIZE
    stride_x = tl.num_programs(2) * (D + K)
    inputs = x + row * stride_x + group * (D + K) + m[:, None] * stride_x
    rows = w + group * SIZE * K + n[:, None].to(tl.int64) * K
    whole = in_m[:, None] & in_n[None, :]
    total = tl.load(inputs + (n % D)[None, :], mask=whole, other=0.0).to(tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_mask, w_mask = in_m[:, None], in_n[:, None]
        if K % BLOCK_K != 0:
            in_k = (k < K - k0)[None, :]
            a_mask, w_mask = a_mask & in_k, w_mask & in_k
        a_block = tl.load(inputs + D + k0 + k[None, :], mask=a_mask, other=0.0)
        w_block = tl.load(rows + k0 + k[None, :], mask=w_mask, other=0.0)
        total = tl.dot(a_block, w_block.T, total, input_precision=PRECISION)
    place = group * SIZE + n
    if bias is not None:
        total += tl.load(bias + place, mask=in_n, other=0.0).to(tl.float32)[None, :]
    target = y + (row + m[:, None]) * stride_y + place[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=whole)


def launch(x: Tensor, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    """The heads of `pifa::basis_linear` by the kernel.

    Args:
        x, w_rest, order: as of `pifa::basis_linear`, in float16, bfloat16 or float32.
        bias: of the heads, [heads * d], or None.

    Returns:
        [..., heads * d], dtype of `x`, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x, w_rest, order, bias)
    (groups, d_in), (count, width) = order.shape, w_rest.shape
    size, tokens = count // groups, x.shape[:-1].numel()
    y = x.new_empty(tokens, count)
    if tokens:
        inputs = x.reshape(tokens, d_in).index_select(1, order.flatten())
        tile = fixed_tile(tokens, size, x.element_size(), torch.version.hip is not None)
        wrap_triton(basis_kernel)[(triton.cdiv(tokens, tile.block_m), triton.cdiv(size, tile.block_n), groups)](
            inputs, w_rest.contiguous(), None if bias is None else bias.contiguous(), y, tokens, count,
            SIZE=size, D=d_in - width, K=width, PRECISION=precision_of_float32(), **tile.launch_options(),
        )  # fmt: skip
    return y.view(*x.shape[:-1], count)


def fixed_tile(tokens: int, weight_rows: int, itemsize: int, hip: bool) -> Tile:
    """The tile for so many tokens and rows of a group."""
    bucket = min(tokens_bucket(tokens), 1024)  # sm_80's registers do not hold the tile for more tokens and its start
    if bucket <= 16:
        return fixed_decode_tile(weight_rows, itemsize, 16, hip)
    return fixed_prefill_tile(bucket, itemsize, hip)


def _check(x: Tensor, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> None:
    check_dtypes("basis_linear_triton", "pifa::basis_linear", DTYPES, (x, w_rest, bias))
    fits = x.dim() > 0 and w_rest.dim() == order.dim() == 2 and 0 < w_rest.shape[1] < order.shape[1] == x.shape[-1]
    fits = fits and w_rest.shape[0] % (order.shape[0] * (order.shape[1] - w_rest.shape[1])) == 0
    if not fits or (bias is not None and bias.shape != w_rest.shape[:1]):
        shapes = [None if each is None else list(each.shape) for each in (x, w_rest, order, bias)]
        raise ValueError(
            "basis_linear_triton takes x [..., in], w_rest [heads * d, in - d], d < in, order [groups, in] and bias "
            f"[heads * d], got {shapes}"
        )


basis_linear_triton = define_operator("pifa::basis_linear_triton", launch)


def _shape(x: Tensor, w_rest: Tensor, order: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, w_rest, order, bias)
    return x.new_empty(*x.shape[:-1], w_rest.shape[0])


basis_linear_triton.register_fake(_shape)

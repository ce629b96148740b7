"""Prefill: `pifa::linear` over more than 16 tokens, as two GEMMs on tensor cores whose epilogues put rows in order.

    x [tokens, in] --- w_pivot ---> y_p [tokens, r] --- coeff ---> y_n [tokens, out - r]
                                     |                              |
                                     + bias, column scatter[i]      + bias, column scatter[r + i]
                                     v                              v
                                    y [tokens, out] <---------------+

With neither order nor bias the second GEMM reads y_p back out of y itself, whose first r columns it is. Otherwise the
first GEMM writes y_p twice: into y, finished, and as it is into a buffer. The buffer is of the dtype of x, because
tensor cores multiply only what agrees in dtype with `coeff`; sums are float32. Stored rows ascend by output row within
either part (`factorize` sorts them), so that the columns one tile writes lie close together.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .linear_triton_tiles import prefill_tiles, tokens_bucket

GROUP_M = 8
"""Tiles of tokens that run side by side over all weight rows, so that they share weights in the L2 cache."""


@triton.jit
def store_rows(values, y, row, m, n, in_m, in_n, stride_y, FIRST: tl.constexpr, scatter, bias):
    """y[row + m, column(FIRST + n)] = values [m, n] + bias, where column(i) is scatter[i], or i without a scatter."""
    column = FIRST + n
    if scatter is not None:
        column = tl.load(scatter + column, mask=in_n, other=0)
    if bias is not None:
        values += tl.load(bias + column, mask=in_n, other=0.0).to(tl.float32)[None, :]
    place = y + row * stride_y + (m[:, None] * stride_y + column[None, :])
    tl.store(place, values.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def prefill_kernel(
    a,
    w,
    y,
    kept,
    scatter,
    bias,
    M,
    stride_a,
    stride_y,
    N: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    BUCKET: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, column(FIRST + n)] = sum_k a[m, k] w[n, k] + bias, and the bare sum into kept [M, N].

    a [M, K] (y itself if None), w [N, K], scatter and bias [out], each of the last three None if there is none.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    # A tile's first row and column are int64: tokens * out may exceed 2**31. Offsets within a tile are not.
    row = (group * GROUP + within % height).to(tl.int64) * BLOCK_M
    col = (within // height).to(tl.int64) * BLOCK_N

    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = m < M - row, n < N - col
    if a is None:
        a_tile = y + row * stride_y + (m[:, None] * stride_y + k[None, :])
    else:
        a_tile = a + row * stride_a + (m[:, None] * stride_a + k[None, :])
    w_tile = w + col * K + (n[:, None] * K + k[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_mask, w_mask = in_m[:, None], in_n[:, None]
        if K % BLOCK_K:
            in_k = (k < K - k0)[None, :]
            a_mask, w_mask = a_mask & in_k, w_mask & in_k
        a_block = tl.load(a_tile + k0, mask=a_mask, other=0.0)
        w_block = tl.load(w_tile + k0, mask=w_mask, other=0.0)
        total = tl.dot(a_block, w_block.T, total, input_precision=PRECISION)

    n += col.to(tl.int32)
    if kept is not None:
        bare = kept + row * N + (m[:, None] * N + n[None, :])
        tl.store(bare, total.to(kept.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
    store_rows(total, y, row, m, n, in_m, in_n, stride_y, FIRST, scatter, bias)


@cache
def _tuned(itemsize: int, hip: bool) -> triton.runtime.Autotuner:
    configs = [tile.config() for tile in prefill_tiles(itemsize, hip)]
    return triton.autotune(configs, key=["BUCKET", "N", "K"])(prefill_kernel)


def prefill(
    x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None, *, precision: str, tune: bool
) -> Tensor:
    """`pifa::linear` by two GEMMs, for x [tokens, in] with unit stride along `in`, all else contiguous.

    Args:
        x, w_pivot, coeff, order, bias: as in `linear`, at least one token; x with any stride between tokens < 2**22.
        precision: of float32 products, "tf32" or "ieee".
        tune: try all tiles on the first call of a shape; otherwise the first tile is taken.
    """
    (tokens, _), (rank, _), others = x.shape, w_pivot.shape, coeff.shape[0]
    out, hip = rank + others, torch.version.hip is not None
    y = x.new_empty(tokens, out)
    scatter = None if order is None else _inverse(order)
    bucket = tokens_bucket(tokens)
    tile = prefill_tiles(x.element_size(), hip)[0]
    kernel = wrap_triton(_tuned(x.element_size(), hip) if tune else prefill_kernel)
    options = {} if tune else tile.launch_options()

    def multiply(a: Tensor | None, w: Tensor, kept: Tensor | None, first: int) -> None:
        rows, terms = w.shape
        stride_a = out if a is None else a.stride(0)
        kernel[lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]) * triton.cdiv(rows, meta["BLOCK_N"]),)](
            a, w, y, kept, scatter, bias, tokens, stride_a, out,
            N=rows, K=terms, FIRST=first, BUCKET=bucket, PRECISION=precision, GROUP=GROUP_M, **options,
        )  # fmt: skip

    kept = None if order is None and bias is None else x.new_empty(tokens, rank)
    multiply(x, w_pivot, kept if others else None, 0)
    if others:
        multiply(kept, coeff, None, rank)
    return y


def _inverse(order: Tensor) -> Tensor:
    """The scatter index, int32: where every stored row goes. One small kernel, no sort."""
    rows = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    return torch.empty_like(rows).scatter_(0, order, rows)

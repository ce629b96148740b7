"""Prefill: `pifa::linear` over more than 16 tokens, as two GEMMs on tensor cores into one buffer.

    x [tokens, in] --- w_pivot ---> y[:, :r] --- coeff ---> y[:, r:] --- order, bias ---> result

The second GEMM reads y_p back out of y, whose first r columns it is: in the dtype of x, because tensor cores multiply
only what agrees in dtype with `coeff`; sums are float32. Order and bias are operations of ATen behind the kernels:
Inductor fuses them into whatever takes the result. Kernels that stored their columns in order took far longer than
their products (`docs/speed.md`).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .linear_triton_tiles import fixed_prefill_tile, prefill_tiles, tokens_bucket

GROUP_M = 8
"""Tiles of tokens that run side by side over all weight rows, so that they share weights in the L2 cache."""


@triton.jit
def store_tile(
    pid,
    a,
    w,
    y,
    M,
    stride_a,
    stride_y,
    N,
    K,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile number `pid` of y[m, n] = sum_k a[m, k] w[n, k], for a [M, K], w [N, K], y [M, ...].

    WHOLE says that K is a multiple of BLOCK_K.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    # A tile's first row and column are int64: tokens * out may exceed 2**31. Offsets within a tile are not.
    row = (group * GROUP + within % height).to(tl.int64) * BLOCK_M
    col = (within // height).to(tl.int64) * BLOCK_N

    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = m < M - row, n < N - col
    a_tile = a + row * stride_a + (m[:, None] * stride_a + k[None, :])
    w_tile = w + col * K + (n[:, None] * K + k[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_mask, w_mask = in_m[:, None], in_n[:, None]
        if not WHOLE:
            in_k = (k < K - k0)[None, :]
            a_mask, w_mask = a_mask & in_k, w_mask & in_k
        a_block = tl.load(a_tile + k0, mask=a_mask, other=0.0)
        w_block = tl.load(w_tile + k0, mask=w_mask, other=0.0)
        total = tl.dot(a_block, w_block.T, total, input_precision=PRECISION)

    place = y + row * stride_y + (m[:, None] * stride_y + (col.to(tl.int32) + n)[None, :])
    tl.store(place, total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def prefill_kernel(
    a,
    w,
    y,
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
    """y[m, FIRST + n] = sum_k a[m, k] w[n, k], for a [M, K] (y itself if None), w [N, K], y [M, ...]."""
    left = y if a is None else a
    store_tile(
        tl.program_id(0), left, w, y + FIRST, M, stride_a, stride_y, N, K, K % BLOCK_K == 0, PRECISION, GROUP,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


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
        tune: try all tiles on the first call of a shape; otherwise there is one for every bucket of tokens.
    """
    (tokens, _), (rank, _), others = x.shape, w_pivot.shape, coeff.shape[0]
    out, hip = rank + others, torch.version.hip is not None
    y = x.new_empty(tokens, out)
    bucket = tokens_bucket(tokens)
    kernel = wrap_triton(_tuned(x.element_size(), hip) if tune else prefill_kernel)
    options = {} if tune else fixed_prefill_tile(bucket, x.element_size(), hip).launch_options()

    def multiply(a: Tensor | None, w: Tensor, first: int) -> None:
        rows, terms = w.shape
        stride_a = out if a is None else a.stride(0)
        kernel[lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]) * triton.cdiv(rows, meta["BLOCK_N"]),)](
            a, w, y, tokens, stride_a, out,
            N=rows, K=terms, FIRST=first, BUCKET=bucket, PRECISION=precision, GROUP=GROUP_M, **options,
        )  # fmt: skip

    multiply(x, w_pivot, 0)
    if others:
        multiply(None, coeff, rank)
    if order is not None:
        y = y.index_select(1, order)
    return y if bias is None else y + bias

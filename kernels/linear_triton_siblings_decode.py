"""Decode of siblings: `pifa::linear` for several weights on one x of 1 to 16 tokens, in two launches.

    x ------------- w_pivot of each ---> z_i [tokens, r_i], float32 ------- coeff of each ---> y_i [tokens, out_i]
    order of each --- inverted --> scatter_i [out_i]                 \\__ copied into __/

Programs are shared out over the tiles of one sibling after the other, so that ranks and shapes may differ, and weights
may lie anywhere. Within a tile the code is that of one linear in `linear_triton_decode`, but without sums that programs
share; the first programs invert the orders and put the z_i in place. Every y_i is there in the order of its outputs:
attention reads it as it is, with no gather in between.

Not timed on a GPU.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .linear_triton_decode import ASIDE, invert, overlap, place_pivots, prefetch, product, store_rows
from .linear_triton_tiles import fixed_siblings_tile, siblings_tiles, tokens_bucket

AT_ONCE = 3
"""Siblings of one launch: query, key and value. More take several."""


@triton.jit
def choose(is0, is1, p0, p1, p2):
    """The pointer of the first sibling, the second, or the third; those that are not there are None."""
    chosen = p0
    if p1 is not None:
        chosen = tl.where(is0, p0, p1)
    if p2 is not None:
        chosen = tl.where(is0, p0, tl.where(is1, p1, p2))
    return chosen


@triton.jit
def siblings_decode_kernel(
    a0,
    a1,
    a2,
    w0,
    w1,
    w2,
    y0,
    y1,
    y2,
    order0,
    order1,
    order2,
    scatter0,
    scatter1,
    scatter2,
    bias0,
    bias1,
    bias2,
    M,
    stride_a,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    PIVOTS: tl.constexpr,
    ASIDES: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    BUCKET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One of the two products of siblings i, w_i [Ni, Ki]; where there are fewer than three, the rest is None and 0.

    The first, PIVOTS: y_i[m, n] = sum_k a_i[m, k] w_i[n, k], the a_i one x [M, K] of `stride_a`, y_i [M, Ni]. The first
    ASIDES programs invert order_i [OUTi] into scatter_i, if there are any.
    The second: y_i[m, column(Ki + n)] = sum_k a_i[m, k] w_i[n, k] + bias, a_i [M, Ki] float32, y_i [M, OUTi]. The first
    ASIDES programs put a_i into the first Ki stored rows of y_i.

    A program chooses its sibling by its number; there is one loop for all, for each of several would get shared memory
    of its own.
    """
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m = m < M
    aside = tl.program_id(0)
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    if aside < ASIDES:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        if PIVOTS:
            if scatter0 is not None:
                invert(order0, scatter0, aside, ASIDES, OUT0, ASIDE)
            if scatter1 is not None:
                invert(order1, scatter1, aside, ASIDES, OUT1, ASIDE)
            if scatter2 is not None:
                invert(order2, scatter2, aside, ASIDES, OUT2, ASIDE)
        else:
            wide: tl.constexpr = ASIDE // BLOCK_M
            place_pivots(a0, y0, m, in_m, OUT0, aside, ASIDES, K0, scatter0, bias0, wide)
            if a1 is not None:
                place_pivots(a1, y1, m, in_m, OUT1, aside, ASIDES, K1, scatter1, bias1, wide)
            if a2 is not None:
                place_pivots(a2, y2, m, in_m, OUT2, aside, ASIDES, K2, scatter2, bias2, wide)
    else:
        pid = aside - ASIDES
        end0 = tl.cdiv(N0, BLOCK_N)
        end1 = end0 + tl.cdiv(N1, BLOCK_N)
        is0, is1 = pid < end0, pid < end1
        pid -= tl.where(is0, 0, tl.where(is1, end0, end1))
        w, y = choose(is0, is1, w0, w1, w2), choose(is0, is1, y0, y1, y2)
        N = tl.where(is0, N0, tl.where(is1, N1, N2))
        K = K0 if K0 == K1 and K1 == K2 else tl.where(is0, K0, tl.where(is1, K1, K2))
        a = choose(is0, is1, a0, a1, a2)
        col = pid.to(tl.int64) * BLOCK_N
        if WAIT:
            prefetch(w + col * K, 0, K, n < N - col, K, BLOCK_N, BLOCK_K)
            tl.extra.cuda.gdc_wait()
        w_tile = w + col * K + (n[:, None] * K + k[None, :])
        stride = stride_a if PIVOTS else K
        total = product(a, w_tile, 0, K, in_m, n < N - col, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        # Computed again, not kept over the loop, where ptxas would spill them on sm_80.
        n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        if PIVOTS:
            store_rows(total, y, m, n, in_m, n < N, N, 0, None, None)
        else:
            scatter = None if scatter0 is None else choose(is0, is1, scatter0, scatter1, scatter2)
            bias = None if bias0 is None else choose(is0, is1, bias0, bias1, bias2)
            store_rows(total, y, m, n, in_m, n < N, N + K, K, scatter, bias)


@cache
def _tuned(itemsize: int, block_m: int, hip: bool) -> triton.runtime.Autotuner:
    configs = [tile.config() for tile in siblings_tiles(itemsize, block_m, hip)]
    return triton.autotune(configs, key=["BUCKET", "N0", "N1", "N2", "K0", "K1", "K2"])(siblings_decode_kernel)


def decode_siblings(
    x: Tensor,
    w_pivots: Sequence[Tensor],
    coeffs: Sequence[Tensor],
    orders: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    *,
    precision: str,
    tune: bool,
    dependent: bool = False,
) -> list[Tensor]:
    """`pifa::linear` of all siblings over 1 to 16 tokens, in two launches for every `AT_ONCE` of them.

    Args:
        x: [tokens, in] with unit stride along `in` and less than 2**22 between tokens.
        w_pivots, coeffs, orders, biases: of each sibling as in `pifa::linear`, contiguous; biases of all or of none.
        precision, tune, dependent: as in `decode`.
    """
    found: list[Tensor] = []
    for start in range(0, len(w_pivots), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        found += _decode(x, w_pivots[some], coeffs[some], orders[some], biases[some], precision, tune, dependent)
    return found


def _decode(
    x: Tensor,
    w_pivots: Sequence[Tensor],
    coeffs: Sequence[Tensor],
    orders: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    precision: str,
    tune: bool,
    dependent: bool,
) -> list[Tensor]:
    tokens, hip, itemsize = x.shape[0], torch.version.hip is not None, x.element_size()
    bucket = tokens_bucket(tokens)
    kernel: Any = _tuned(itemsize, bucket, hip) if tune else siblings_decode_kernel
    kernel = kernel if dependent else wrap_triton(kernel)
    ranks = [w.shape[0] for w in w_pivots]
    outs = [rank + coeff.shape[0] for rank, coeff in zip(ranks, coeffs, strict=True)]
    scatters: list[Tensor | None] = [None for _ in outs]
    if any(order is not None for order in orders):
        scatters = [torch.empty(out, dtype=torch.int32, device=x.device) for out in outs]

    def multiply(a: Sequence[Tensor], weights: Sequence[Tensor], y: Sequence[Tensor], *, pivots: bool) -> None:
        missing = AT_ONCE - len(y)
        n0, n1, n2 = [w.shape[0] for w in weights] + [0] * missing
        k0, k1, k2 = [w.shape[1] for w in weights] + [weights[0].shape[1]] * missing
        out0, out1, out2 = outs + [0] * missing
        tile = fixed_siblings_tile(max(n0, n1, n2), bucket, itemsize, hip)
        asides = triton.cdiv(max(outs), ASIDE.value) if pivots else triton.cdiv(max(ranks), ASIDE.value // bucket)
        if pivots and scatters[0] is None:
            asides = 0
        kernel[
            lambda meta: (asides + sum(triton.cdiv(rows, meta["BLOCK_N"]) for rows in (n0, n1, n2)),)
        ](
            *_three(a), *_three(weights), *_three(y),
            *_three(orders if pivots else [None]), *_three(scatters), *_three([None] if pivots else biases),
            tokens, a[0].stride(0),
            N0=n0, N1=n1, N2=n2, K0=k0, K1=k1, K2=k2, OUT0=out0, OUT1=out1, OUT2=out2,
            PIVOTS=pivots, ASIDES=asides, BUCKET=bucket, PRECISION=precision,
            **({} if tune else tile.launch_options()), **overlap(dependent, first=pivots, last=not pivots),
        )  # fmt: skip

    # The pivots stay float32 between the products, as in `decode`.
    z = [torch.empty(tokens, rank, dtype=torch.float32, device=x.device) for rank in ranks]
    y = [x.new_empty(tokens, out) for out in outs]
    multiply([x], w_pivots, z, pivots=True)
    multiply(z, coeffs, y, pivots=False)
    return y


def _three(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [*values, *[None] * (AT_ONCE - len(values))]

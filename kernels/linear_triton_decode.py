"""Decode: `pifa::linear` over 1 to 16 tokens, whose time is that of reading the weights.

    x ------- w_pivot ---> y_p [tokens, r], float32 ------- coeff ---> y [tokens, out]
    order --- inverted --> scatter [out]            \\__ copied into __/

There are two launches, each of which streams one weight once. Further programs of the same launches do the rest
meanwhile: in the first they invert `order`, in the second they put y_p in place.

One token is a GEMV without tensor cores: a program keeps a tile of products in registers and adds them up along the
threads at the end. Two to 16 tokens are padded to the 16 rows of a tensor-core instruction. y_p stays float32; where
`coeff` is narrower, tensor cores take y_p as the sum of two numbers of that dtype, which have twice its digits.

Where a weight has too few rows to occupy the chip, several programs share a sum (split K). Their parts, float32, are
added up in a fixed order, by a launch of their own or (`LAST_ADDS`, second product alone) by the program that is the
last to be done with its part: the result is the same in every run. These programs are counted, from zeros that the
first product leaves; for itself there is nobody to leave any.

Kernels that SIGNAL let the next launch begin, those that WAIT began before the last one had ended: see
`linear_triton_dependent`.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import linear_triton_tiles as tiles
from .linear_triton_tiles import chunk_of_sum, decode_tiles, fixed_decode_tile, tokens_bucket

MAX_TOKENS = 16
"""From here on a GEMM's tiles are filled; the rows of the smallest tensor-core instruction."""

ASIDE = tl.constexpr(1024)
"""Elements that a program inverts or puts in place at a time."""


@triton.jit
def invert(order, inverse, pid, programs, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """inverse[order[j]] = j, this program's share of j; an order that is None changes nothing."""
    for start in range(pid * BLOCK, OUT, programs * BLOCK):
        j = start + tl.arange(0, BLOCK)
        stored = j if order is None else tl.load(order + j, mask=j < OUT, other=0)
        tl.store(inverse + stored, j, mask=j < OUT)


@triton.jit
def store_rows(values, y, m, n, in_m, in_n, stride_y, first, scatter, bias):
    """y[m, column(first + n)] = values [m, n] + bias, where column(i) is scatter[i], or i without a scatter."""
    column = first + n
    if scatter is not None:
        column = tl.load(scatter + column, mask=in_n, other=0)
    if bias is not None:
        values += tl.load(bias + column, mask=in_n, other=0.0).to(tl.float32)[None, :]
    place = y + (m[:, None] * stride_y + column[None, :])
    tl.store(place, values.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def place_pivots(pivots, y, m, in_m, stride_y, pid, programs, R: tl.constexpr, scatter, bias, BLOCK: tl.constexpr):
    """The first R stored rows of y from pivots [M, R], this program's share of them."""
    for start in range(pid * BLOCK, R, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        values = tl.load(pivots + m[:, None] * R + i[None, :], mask=in_m[:, None] & (i < R)[None, :], other=0.0)
        store_rows(values, y, m, i, in_m, i < R, stride_y, 0, scatter, bias)


@triton.jit
def sum_of_parts(parts, m, n, in_m, in_n, M, N, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of parts[:, m, n], float32 [BLOCK_M, BLOCK_N], for parts [PARTS, M, N]."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(PARTS):
        place = parts + part * M * N + (m[:, None] * N + n[None, :])
        # Not from the L1 cache, which does not see what other programs write.
        total += tl.load(place, mask=in_m[:, None] & in_n[None, :], other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def prefetch(w_rows, begin, end, in_n, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Asks for w[n, k], begin <= k < end, to come into the L2 cache, for the rows n that are `in_n` of w [..., K]."""
    LINE: tl.constexpr = 1024 // w_rows.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K // LINE) * LINE
    for k0 in range(begin, end, BLOCK_K):
        there = in_n[:, None] & (k < end - k0)[None, :]
        places = tl.where(there, w_rows + (n[:, None] * K + (k0 + k)[None, :]), w_rows).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def product(
    a,
    w_tile,
    begin,
    end,
    in_m,
    in_n,
    stride_a,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k a[m, k] w[n, k] for begin <= k < end, float32 [BLOCK_M, BLOCK_N]."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    if BLOCK_M == 1:
        terms = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for k0 in range(begin, end, BLOCK_K):
            in_k = k < end - k0
            a_block = tl.load(a + k0 + k, mask=in_k, other=0.0).to(tl.float32)
            w_block = tl.load(w_tile + k0, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            terms += a_block[None, :] * w_block
        total = tl.sum(terms, axis=1)[None, :]
    else:
        a_tile = a + m[:, None] * stride_a + k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(begin, end, BLOCK_K):
            in_k = (k < end - k0)[None, :]
            a_block = tl.load(a_tile + k0, mask=in_m[:, None] & in_k, other=0.0)
            w_block = tl.load(w_tile + k0, mask=in_n[:, None] & in_k, other=0.0).T
            if a_block.dtype == w_block.dtype:
                total = tl.dot(a_block, w_block, total, input_precision=PRECISION)
            else:
                high = a_block.to(w_block.dtype)
                low = (a_block - high.to(tl.float32)).to(w_block.dtype)
                total = tl.dot(high, w_block, total)
                total = tl.dot(low, w_block, total)
    return total


@triton.jit
def decode_kernel(
    a,
    w,
    y,
    parts,
    order,
    inverse,
    pivots,
    scatter,
    bias,
    arrived,
    M,
    stride_a,
    stride_y,
    N: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    BUCKET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, column(FIRST + n)] = sum_k a[m, k] w[n, k] + bias; sums of CHUNK terms into parts.

    a [M, K], w [N, K], y [M, ...], parts [cdiv(K, CHUNK), M, N] float32. The first row of the grid, there if needed,
    inverts `order` [OUT] into `inverse`, and puts `pivots` [M, FIRST] float32 into the first stored rows of y.
    `arrived` [OUT - the first product's N] int32 is filled with zeros by the first product; the second, which has
    `pivots`, counts there the programs that are done with their part of a tile, and the last one adds up the parts.
    """
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m = m < M
    aside: tl.constexpr = 1 if order is not None or pivots is not None or arrived is not None else 0
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    if pid_k < aside:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        if order is not None:
            invert(order, inverse, pid_n, tl.num_programs(0), OUT, ASIDE)
        if pivots is None and arrived is not None:
            for start in range(pid_n * ASIDE, OUT - N, tl.num_programs(0) * ASIDE):
                i = start + tl.arange(0, ASIDE)
                tl.store(arrived + i, tl.zeros_like(i), mask=i < OUT - N)
        if pivots is not None:
            place_pivots(
                pivots, y, m, in_m, stride_y, pid_n, tl.num_programs(0), FIRST, scatter, bias, ASIDE // BLOCK_M
            )
    else:
        col = pid_n.to(tl.int64) * BLOCK_N
        in_n = n < N - col
        part = pid_k - aside
        end = tl.minimum((part + 1) * CHUNK, K)
        if WAIT:
            prefetch(w + col * K, part * CHUNK, end, in_n, K, BLOCK_N, BLOCK_K)
            tl.extra.cuda.gdc_wait()
        w_tile = w + col * K + (n[:, None] * K + k[None, :])
        total = product(a, w_tile, part * CHUNK, end, in_m, in_n, stride_a, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        # Computed again, not kept over the loop, where ptxas would spill them on sm_80.
        n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        if parts is not None:
            place = parts + part * M * N + (m[:, None] * N + n[None, :])
            tl.store(place, total, mask=in_m[:, None] & in_n[None, :])
            if pivots is not None and arrived is not None:
                PARTS: tl.constexpr = (K + CHUNK - 1) // CHUNK
                tl.debug_barrier()  # all threads have stored before one says so
                # The remainder: tuning launches the kernel many times with one `arrived`.
                if tl.atomic_add(arrived + pid_n, 1, sem="acq_rel", scope="gpu") % PARTS == PARTS - 1:
                    total = sum_of_parts(parts, m, n, in_m, in_n, M, N, PARTS, BLOCK_M, BLOCK_N)
                    store_rows(total, y, m, n, in_m, in_n, stride_y, FIRST, scatter, bias)
        else:
            store_rows(total, y, m, n, in_m, in_n, stride_y, FIRST, scatter, bias)


@triton.jit
def add_parts_kernel(
    parts,
    y,
    scatter,
    bias,
    M,
    stride_y,
    N: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[m, column(FIRST + n)] = sum of parts[:, m, n] + bias, for parts [PARTS, M, N] float32."""
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    if WAIT:
        tl.extra.cuda.gdc_wait()
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N
    total = sum_of_parts(parts, m, n, in_m, in_n, M, N, PARTS, BLOCK_M, BLOCK_N)
    store_rows(total, y, m, n, in_m, in_n, stride_y, FIRST, scatter, bias)


@cache
def _tuned(itemsize: int, block_m: int, hip: bool) -> triton.runtime.Autotuner:
    configs = [tile.config() for tile in decode_tiles(itemsize, block_m, hip)]
    return triton.autotune(configs, key=["BUCKET", "N", "K", "CHUNK"])(decode_kernel)


def overlap(dependent: bool, *, first: bool, last: bool) -> dict[str, Any]:
    """Of a launch in a row of them: how it overlaps with its neighbours if they are `dependent`."""
    attribute = {"launch_pdl": True} if dependent and not first else {}
    return {"SIGNAL": dependent and not last, "WAIT": dependent and not first, **attribute}


def decode(
    x: Tensor,
    w_pivot: Tensor,
    coeff: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    *,
    precision: str,
    tune: bool,
    dependent: bool = False,
) -> Tensor:
    """`pifa::linear` over 1 to 16 tokens, for x [tokens, in] with unit stride along `in`, all else contiguous.

    Arguments as in `prefill`; `dependent` launches overlap, and cannot be traced (`linear_triton_dependent`).
    """
    (tokens, _), (rank, _) = x.shape, w_pivot.shape
    out, hip = rank + coeff.shape[0], torch.version.hip is not None
    block_m = 1 if tokens == 1 else MAX_TOKENS
    bucket = tokens_bucket(tokens)
    kernel: Any = _tuned(x.element_size(), block_m, hip) if tune else decode_kernel
    adding: Any = add_parts_kernel
    if not dependent:
        kernel, adding = wrap_triton(kernel), wrap_triton(adding)

    def shares(w: Tensor) -> tuple[int, int]:
        """How many terms of a sum are one program's, and how many programs share it."""
        rows, terms = w.shape
        chunk = chunk_of_sum(rows, terms, fixed_decode_tile(rows, x.element_size(), block_m, hip))
        return chunk, max(1, triton.cdiv(terms, chunk))

    inverse = None if order is None else torch.empty(out, dtype=torch.int32, device=x.device)
    counted = tiles.LAST_ADDS and not hip and coeff.shape[0] > 0 and shares(coeff)[1] > 1
    arrived = torch.empty(coeff.shape[0], dtype=torch.int32, device=x.device) if counted else None

    def multiply(a: Tensor, w: Tensor, y: Tensor, *, pivots: Tensor | None) -> None:
        rows, terms = w.shape
        tile = fixed_decode_tile(rows, x.element_size(), block_m, hip)
        options = {} if tune else tile.launch_options()
        first = 0 if pivots is None else rank
        invert = order if pivots is None else None
        todo = (order, inverse, None, None, None) if pivots is None else (None, None, pivots, inverse, bias)
        chunk, splits = shares(w)
        shared = splits > 1 and rows > 0
        parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device) if shared else None
        aside = int(invert is not None or pivots is not None or arrived is not None)
        added = shared and (pivots is None or arrived is None)
        # Even with no row of its own the second product has y_p to put in place.
        kernel[lambda meta: (max(1, triton.cdiv(rows, meta["BLOCK_N"])), splits + aside)](
            a, w, y, parts, *todo, arrived, tokens, a.stride(0), y.shape[1],
            N=rows, K=terms, FIRST=first, OUT=out, CHUNK=chunk, BUCKET=bucket, PRECISION=precision, **options,
            **overlap(dependent, first=pivots is None, last=pivots is not None and not added),
        )  # fmt: skip
        if added:
            adding[(triton.cdiv(rows, 128),)](
                parts, y, *todo[3:], tokens, y.shape[1],
                N=rows, FIRST=first, PARTS=splits, BLOCK_M=block_m, BLOCK_N=128,
                **overlap(dependent, first=False, last=pivots is not None),
            )  # fmt: skip

    y_pivot = torch.empty(tokens, rank, dtype=torch.float32, device=x.device)
    y = x.new_empty(tokens, out)
    multiply(x, w_pivot, y_pivot, pivots=None)
    multiply(y_pivot, coeff, y, pivots=y_pivot)
    return y

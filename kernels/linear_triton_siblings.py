"""Products of siblings, linears in PIFA form on one input, in one launch; and the operator for all of their work.

    tokens <= 16   `linear_triton_siblings_decode`: rows in order as it stores them
    tokens > 16    x [tokens, in] --- w_pivot of each ---> z [tokens, all ranks]
                   z --- coeff of each ---> rest [tokens, all others], then orders and biases as operations of ATen

Programs are shared out over the tiles of one sibling after the other, so that ranks and shapes may differ, and weights
may lie anywhere. Within a tile the code is that of one linear: for 1 to 16 tokens as in `linear_triton_decode`, but
without sums that programs share, for more as in `linear_triton_prefill`.

z and the rest stay two buffers, in stored order: Inductor reads both where it undoes the order, with what follows.
Not timed on a GPU.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .linear_siblings_gemm import check_siblings
from .linear_triton_decode import MAX_TOKENS, product
from .linear_triton_dependent import decode_siblings_dependently, launches_depend
from .linear_triton_operator import MAX_STRIDE, define_operator, precision_of_float32, tunes
from .linear_triton_prefill import GROUP_M, store_tile
from .linear_triton_siblings_decode import AT_ONCE, decode_siblings
from .linear_triton_tiles import fixed_siblings_tile, siblings_tiles, tokens_bucket


@triton.jit
def siblings_kernel(
    a,
    w0,
    w1,
    w2,
    y,
    M,
    stride_a,
    stride_y,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    A: tl.constexpr,
    Y: tl.constexpr,
    SHARED: tl.constexpr,
    BUCKET: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_i[m, n] = sum_k a_i[m, k] w_i[n, k] for siblings i, w_i [Ni, Ki]; the y_i lie side by side in y from column Y.

    The a_i are a [M, K] itself if SHARED, or lie side by side in a from column A. A program chooses its sibling by its
    number; there is one loop for all, for each of several would get shared memory of its own.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    end0 = tiles_m * tl.cdiv(N0, BLOCK_N)
    end1 = end0 + tiles_m * tl.cdiv(N1, BLOCK_N)
    is0, is1 = pid < end0, pid < end1
    pid -= tl.where(is0, 0, tl.where(is1, end0, end1))
    w = tl.where(is0, w0, tl.where(is1, w1, w2))
    N = tl.where(is0, N0, tl.where(is1, N1, N2))
    y += Y + tl.where(is0, 0, tl.where(is1, N0, N0 + N1))
    if not SHARED:
        a += A + tl.where(is0, 0, tl.where(is1, K0, K0 + K1))
    K = K0 if K0 == K1 and K1 == K2 else tl.where(is0, K0, tl.where(is1, K1, K2))
    if BLOCK_M > 16:
        whole: tl.constexpr = K0 % BLOCK_K == 0 and K1 % BLOCK_K == 0 and K2 % BLOCK_K == 0
        store_tile(pid, a, w, y, M, stride_a, stride_y, N, K, whole, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        in_m = m < M
        col = pid.to(tl.int64) * BLOCK_N
        w_tile = w + col * K + (n[:, None] * K + k[None, :])
        total = product(a, w_tile, 0, K, in_m, n < N - col, stride_a, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        # Computed again, not kept over the loop, where ptxas would spill them on sm_80.
        n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        place = y + (m[:, None] * stride_y + n[None, :])
        tl.store(place, total.to(y.dtype.element_ty), mask=in_m[:, None] & (n < N)[None, :])


@cache
def _tuned(itemsize: int, block_m: int, hip: bool) -> triton.runtime.Autotuner:
    configs = [tile.config() for tile in siblings_tiles(itemsize, block_m, hip)]
    return triton.autotune(configs, key=["BUCKET", "N0", "N1", "N2", "K0", "K1", "K2"])(siblings_kernel)


def multiply_siblings(
    a: Tensor, weights: Sequence[Tensor], y: Tensor, *, shared: bool, precision: str, tune: bool
) -> None:
    """y_i = a_i w_i^T for all siblings, in one launch for every `AT_ONCE` of them.

    Args:
        a: [tokens, k] for all of them if `shared`, or the a_i [tokens, k_i] side by side; unit stride along k, less
            than 2**22 between tokens. float32 where the weights are narrower for up to 16 tokens alone.
        weights: w_i [n_i, k_i], contiguous.
        y: receives the y_i [tokens, n_i] side by side, contiguous.
        precision, tune: as in `prefill`.
    """
    tokens, hip, itemsize = a.shape[0], torch.version.hip is not None, weights[0].element_size()
    bucket = tokens_bucket(tokens)
    block_m = min(bucket, MAX_TOKENS + 1)
    kernel = wrap_triton(_tuned(itemsize, block_m, hip) if tune else siblings_kernel)
    from_a, from_y = 0, 0
    for start in range(0, len(weights), AT_ONCE):
        some = list(weights[start : start + AT_ONCE])
        missing = AT_ONCE - len(some)
        rows, terms = [w.shape[0] for w in some] + [0] * missing, [w.shape[1] for w in (*some, *some[:1] * missing)]
        tile = fixed_siblings_tile(max(rows), bucket, itemsize, hip)
        kernel[lambda meta, rows=rows: (_programs(tokens, rows, meta),)](
            a, *some, *some[:1] * missing, y, tokens, a.stride(0), y.shape[1],
            N0=rows[0], N1=rows[1], N2=rows[2], K0=terms[0], K1=terms[1], K2=terms[2],
            A=0 if shared else from_a, Y=from_y, SHARED=shared, BUCKET=bucket, PRECISION=precision, GROUP=GROUP_M,
            **({} if tune else tile.launch_options()),
        )  # fmt: skip
        from_a, from_y = from_a + sum(w.shape[1] for w in some), from_y + sum(rows)


def _programs(tokens: int, rows: Sequence[int], meta: dict[str, int]) -> int:
    programs: int = triton.cdiv(tokens, meta["BLOCK_M"]) * sum(triton.cdiv(each, meta["BLOCK_N"]) for each in rows)
    return programs


def launch(
    x: Tensor,
    w_pivots: Sequence[Tensor],
    coeffs: Sequence[Tensor],
    orders: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """`pifa::linear` for several weights on one x, by our kernels (arXiv 2501.19090, section 3).

    Args:
        x: [..., in], float16, bfloat16 or float32.
        w_pivots: [r_i, in], dtype of `x`, r_i > 0.
        coeffs: [out_i - r_i, r_i], dtype of `x`.
        orders: gather indices, [out_i], int64, permutations; None where stored order is output order.
        biases: [out_i], dtype of `x`, or None.

    Returns:
        [..., out_i] of each, dtype of `x`, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x, w_pivots, coeffs, orders, biases)
    outs = [w.shape[0] + c.shape[0] for w, c in zip(w_pivots, coeffs, strict=True)]
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return [x.new_empty(*x.shape[:-1], out) for out in outs]
    if rows.stride(1) != 1 or rows.stride(0) >= MAX_STRIDE:
        rows = rows.contiguous()
    w_pivots, coeffs = [w.contiguous() for w in w_pivots], [c.contiguous() for c in coeffs]
    options: dict[str, Any] = {"precision": precision_of_float32(), "tune": tunes()}
    if rows.shape[0] <= MAX_TOKENS:
        ordered = [None if order is None else order.contiguous() for order in orders]
        together = all(bias is not None for bias in biases)
        inside = [None if bias is None or not together else bias.contiguous() for bias in biases]
        values = rows, w_pivots, coeffs, ordered, inside
        if launches_depend(x):
            found = decode_siblings_dependently(*values, options["precision"], options["tune"])
        else:
            found = decode_siblings(*values, **options)
        behind = [None if together else bias for bias in biases]
    else:
        found = [
            y if order is None else y.index_select(1, order)
            for y, order in zip(_in_stored_order(rows, w_pivots, coeffs, options), orders, strict=True)
        ]
        behind = list(biases)
    results = [y if bias is None else y + bias for y, bias in zip(found, behind, strict=True)]
    return [y.view(*x.shape[:-1], out) for y, out in zip(results, outs, strict=True)]


def _in_stored_order(
    x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor], options: dict[str, Any]
) -> Iterator[Tensor]:
    ranks, others = ([weight.shape[0] for weight in weights] for weights in (w_pivots, coeffs))
    z, rest = x.new_empty(x.shape[0], sum(ranks)), x.new_empty(x.shape[0], sum(others))
    multiply_siblings(x, w_pivots, z, shared=True, **options)
    if sum(others):
        multiply_siblings(z, coeffs, rest, shared=False, **options)
    return (torch.cat(parts, 1) for parts in zip(z.split(ranks, 1), rest.split(others, 1), strict=True))


def _check(
    x: Tensor,
    w_pivots: Sequence[Tensor],
    coeffs: Sequence[Tensor],
    orders: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> None:
    name = "linear_siblings_triton"
    check_siblings(name, x, w_pivots, coeffs)
    outs = [(w.shape[0] + c.shape[0],) for w, c in zip(w_pivots, coeffs, strict=True)]
    for what, values, dtype in (("orders", orders, torch.int64), ("biases", biases, x.dtype)):
        got = [None if value is None else (tuple(value.shape), value.dtype) for value in values]
        if len(got) != len(outs) or any(g not in (None, (out, dtype)) for g, out in zip(got, outs, strict=True)):
            raise ValueError(f"{name} takes {what} of {dtype}, [out] or None of each sibling, out {outs}, got {got}")


# Annotations that torch reads a schema from have to be lists.
def _launch(
    x: Tensor,
    w_pivots: list[Tensor],
    coeffs: list[Tensor],
    orders: list[Tensor | None],
    biases: list[Tensor | None],
) -> list[Tensor]:
    return launch(x, w_pivots, coeffs, orders, biases)


def _shapes(
    x: Tensor,
    w_pivots: list[Tensor],
    coeffs: list[Tensor],
    orders: list[Tensor | None],
    biases: list[Tensor | None],
) -> list[Tensor]:
    _check(x, w_pivots, coeffs, orders, biases)
    return [x.new_empty(*x.shape[:-1], w.shape[0] + c.shape[0]) for w, c in zip(w_pivots, coeffs, strict=True)]


linear_siblings_triton = define_operator("pifa::linear_siblings_triton", _launch)
linear_siblings_triton.register_fake(_shapes)

"""The operator `pifa::linear_triton`: `pifa::linear` by Triton kernels, on NVIDIA and AMD GPUs.

    tokens <= 16   `linear_triton_decode`: streams the weights once, float32 in between, rows in order as it stores them
    tokens > 16    `linear_triton_prefill`: two GEMMs on tensor cores, then the order as operations of ATen

It takes what `pifa::linear` takes; `linear_triton` says when the pass `Lower` emits it. It is a `triton_op`: Inductor
traces through it to the kernels and plans their buffers with everything else. Its gradients are those of the plain
subgraph. Decode inverts the row order in every call, beside the first product, so that no derived index exists
that could go stale.

The tiles were timed on an H200 (`benchmarks/results/gpu_tiles.csv`), and so was an earlier version of the whole
(`gpu.md` beside it). What the compilers make of every tile for chips that were not at hand is in `kernels.md`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from . import linear as _defines_the_library  # noqa: F401
from .form import check_dtypes
from .linear_triton import DTYPES
from .linear_triton_decode import MAX_TOKENS, decode
from .linear_triton_dependent import decode_dependently, launches_depend
from .linear_triton_prefill import prefill

MAX_STRIDE = 2**22
"""Between two tokens of x; offsets within a tile are 32 bits wide."""


def launch(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """`pifa::linear` (arXiv 2501.19090, section 3) by the kernels for the number of tokens at hand.

    With `torch._inductor.config.max_autotune` all tiles are timed for every weight shape and bucket of tokens (1, 16,
    128, 1024, more); without it the tile is fixed, by the rows of the weight in decode and the bucket in prefill.
    float32 runs on tensor cores as TF32 where `torch.backends.cuda.matmul.fp32_precision` says so, never on AMD;
    otherwise it is IEEE.

    Args:
        x: [..., in], float16, bfloat16 or float32; copied unless its last stride is 1 and its tokens are evenly spaced.
        w_pivot: [r, in], r > 0, dtype of `x`; copied unless contiguous, as `coeff` and `bias` are.
        coeff: [out - r, r], dtype of `x`.
        order: gather index, [out], int64, a permutation; None if stored order is output order.
        bias: [out], dtype of `x`, or None.

    Returns:
        [..., out], dtype of `x`, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x, w_pivot, coeff, order, bias)
    out = w_pivot.shape[0] + coeff.shape[0]
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], out)
    if rows.stride(1) != 1 or rows.stride(0) >= MAX_STRIDE:
        rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    order = None if order is None else order.contiguous()
    values = rows, w_pivot.contiguous(), coeff.contiguous(), order, bias
    if tokens <= MAX_TOKENS and launches_depend(x):
        y: Tensor = decode_dependently(*values, precision_of_float32(), tunes())
    else:
        run = decode if tokens <= MAX_TOKENS else prefill
        y = run(*values, precision=precision_of_float32(), tune=tunes())
    return y.view(*x.shape[:-1], out)


def _check(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> None:
    check_dtypes("linear_triton", "pifa::linear", DTYPES, (x, w_pivot, coeff, bias))
    rank, others = w_pivot.shape[0], coeff.shape[0]
    shapes = [None if t is None else tuple(t.shape) for t in (x, w_pivot, coeff, order, bias)]
    fits = x.dim() > 0 and x.shape[-1] == w_pivot.shape[1] and rank > 0 and coeff.shape[1] == rank
    if not fits or any(t is not None and t.shape != (rank + others,) for t in (order, bias)):
        raise ValueError(f"linear_triton takes x [..., in], w_pivot [r, in], coeff [out - r, r], order and bias [out], "
                         f"r > 0, got {shapes}")  # fmt: skip
    if order is not None and order.dtype is not torch.int64:
        raise ValueError(f"linear_triton takes an order of int64, got {order.dtype}")


def precision_of_float32() -> str:
    """Of products of float32: "tf32" where torch is told so, on NVIDIA's chips; otherwise "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None else "ieee"


def tunes() -> bool:
    """Whether tiles are timed: under `max_autotune`, not in the interpreter."""
    from torch._inductor import config

    return bool(config.max_autotune) and not knobs.runtime.interpret


def define_operator(name: str, launch: Callable[..., Tensor | list[Tensor]]) -> Any:
    """The operator `name` that launches kernels, which Inductor traces through to them.

    An interpreted kernel runs on real tensors only, so nothing can trace through its operator.
    """
    define = torch.library.custom_op if knobs.runtime.interpret else torch.library.triton_op
    return define(name, launch, mutates_args=())


linear_triton = define_operator("pifa::linear_triton", launch)


def _shape(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    _check(x, w_pivot, coeff, order, bias)
    return x.new_empty(*x.shape[:-1], w_pivot.shape[0] + coeff.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By the plain subgraph; y_p is computed again."""
    x, w_pivot, coeff, order, bias = ctx.saved_tensors
    rank = w_pivot.shape[0]
    by_token = grad.reshape(-1, grad.shape[-1])
    stored = by_token if order is None else by_token.index_select(-1, order.argsort())
    rows = x.reshape(-1, x.shape[-1])
    grad_others = stored[:, rank:]
    grad_pivot = stored[:, :rank] + grad_others @ coeff
    grad_coeff = grad_others.T @ (rows @ w_pivot.T)
    grad_bias = None if bias is None else by_token.sum(0)
    return (grad_pivot @ w_pivot).reshape(x.shape), grad_pivot.T @ rows, grad_coeff, None, grad_bias


linear_triton.register_fake(_shape)
linear_triton.register_autograd(_gradients, setup_context=_save)

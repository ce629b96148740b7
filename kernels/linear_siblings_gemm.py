"""Operators for several linears on one input: both products of all, by the library's GEMMs.

    linear_siblings_gemm       z = x [w_pivot of each]^T                rest_i = z_i coeff_i^T
    linear_siblings_batched    y[:, i, :r] = x w_pivot_i^T              y[:, i, r:] = y[:, i, :r] coeff_i^T

The first is for few tokens. Where all w_pivot lie one behind the other in memory (`side_by_side`), z is one GEMM.
Neighbours of one shape are one batched GEMM over their coefficients; where shapes differ, a Triton kernel multiplies
all in one launch for up to `GROUPED_TOKENS` tokens, and more are a GEMM for every shape, each of which fills the chip.

The second is for more tokens and one shape: two batched GEMMs into one buffer, from which an order is undone in one
read of every element; from the first's two buffers it would be two.

On an H200 the joint GEMM and the batched one take 0.65 to 0.68 of dense for a Llama block of four times 4096 at density
0.5 and 1 to 256 tokens, where a GEMM for every product takes 0.84 to 0.91 (`docs/speed.md`). Neither the kernel for
unequal shapes nor the second operator has been timed on a GPU.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby

import torch
from torch import Tensor

from . import linear as _defines_the_library  # noqa: F401
from .form import check_dtypes
from .linear_gemm import DTYPES
from .side_by_side import as_one

GROUPED_TOKENS = 256
"""Up to here a launch costs more than a library's better tiles save; chosen from the times of equal shapes."""

_LIBRARY = torch.library.Library("pifa", "FRAGMENT")
_LIBRARY.define("linear_siblings_gemm(Tensor x, Tensor[] w_pivots, Tensor[] coeffs) -> (Tensor, Tensor)")
_LIBRARY.define("linear_siblings_batched(Tensor x, Tensor[] w_pivots, Tensor[] coeffs) -> Tensor")


def _multiply(x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor]) -> tuple[Tensor, Tensor]:
    z, rest = shapes_of_siblings("linear_siblings_gemm", x, w_pivots, coeffs)
    left, first, second = (t.view(-1, t.shape[-1]) for t in (x.contiguous(), z, rest))
    joint = as_one(w_pivots)
    if joint is not None:
        torch.mm(left, joint.view(-1, x.shape[-1]).t(), out=first)
    else:
        for w_pivot, part in zip(w_pivots, first.split([w.shape[0] for w in w_pivots], dim=1), strict=True):
            torch.mm(left, w_pivot.t(), out=part)
    if second.numel():
        _multiply_coefficients(first, coeffs, second)
    return z, rest


def _multiply_coefficients(z: Tensor, coeffs: list[Tensor], rest: Tensor) -> None:
    """rest_i = z_i coeff_i^T, the z_i and rest_i side by side."""
    runs = _runs(coeffs)
    if len(runs) > 1 and z.shape[0] <= GROUPED_TOKENS and _has_kernels(z):
        from .linear_triton_operator import precision_of_float32
        from .linear_triton_siblings import multiply_siblings

        whole = [coeff.contiguous() for coeff in coeffs]
        multiply_siblings(z, whole, rest, shared=False, precision=precision_of_float32(), tune=False)
        return
    from_z = from_rest = 0
    for run in runs:
        others, rank = run[0].shape
        end_z, end_rest = from_z + len(run) * rank, from_rest + len(run) * others
        left, result = z[:, from_z:end_z], rest[:, from_rest:end_rest]
        if len(run) == 1:
            torch.mm(left, run[0].t(), out=result)
        else:
            joint = as_one(run)
            assert joint is not None  # noqa: S101  `_runs` has looked
            by_sibling = (t.unflatten(1, (len(run), -1)).transpose(0, 1) for t in (left, result))
            batch, out = by_sibling
            torch.bmm(batch, joint.view(len(run), others, rank).mT, out=out)
        from_z, from_rest = end_z, end_rest


def _multiply_batched(x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor]) -> Tensor:
    y = _shape_of_batch(x, w_pivots, coeffs)
    rank = w_pivots[0].shape[0]
    left = x.contiguous().view(-1, x.shape[-1])
    by_sibling = y.view(-1, *y.shape[-2:]).transpose(0, 1)
    first, second = by_sibling[..., :rank], by_sibling[..., rank:]
    joint = as_one(w_pivots), as_one(coeffs)
    if joint[0] is not None and joint[1] is not None:
        count = len(w_pivots)
        torch.bmm(left.expand(count, -1, -1), joint[0].view(count, rank, -1).mT, out=first)
        torch.bmm(first, joint[1].view(count, -1, rank).mT, out=second)
    else:
        for w_pivot, coeff, pivots, others in zip(w_pivots, coeffs, first, second, strict=True):
            torch.mm(left, w_pivot.t(), out=pivots)
            torch.mm(pivots, coeff.t(), out=others)
    return y


def _shape_of_batch(x: Tensor, w_pivots: Sequence[Tensor], coeffs: Sequence[Tensor]) -> Tensor:
    check_siblings("linear_siblings_batched", x, w_pivots, coeffs)
    if any(w.shape != w_pivots[0].shape or c.shape != coeffs[0].shape for w, c in zip(w_pivots, coeffs, strict=True)):
        shapes = [tuple(c.shape) for c in coeffs]
        raise ValueError(f"linear_siblings_batched takes siblings of one shape, got coeffs {shapes}")
    return x.new_empty(*x.shape[:-1], len(w_pivots), w_pivots[0].shape[0] + coeffs[0].shape[0])


def _runs(coeffs: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one shape that lie one behind the other in memory, together; all others by themselves."""
    runs: list[list[Tensor]] = []
    for _, same in groupby(coeffs, key=lambda coeff: coeff.shape):
        run = list(same)
        runs += [run] if len(run) > 1 and as_one(run) is not None else [[coeff] for coeff in run]
    return runs


def _has_kernels(z: Tensor) -> bool:
    if find_spec("triton") is None:
        return False
    from triton import knobs

    if not z.is_cuda:
        return bool(knobs.runtime.interpret)
    return torch.version.hip is not None or torch.cuda.get_device_capability(z.device) >= (8, 0)


def shapes_of_siblings(
    operator: str, x: Tensor, w_pivots: Sequence[Tensor], coeffs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Room for the two results, checked.

    Raises:
        ValueError: as `check_siblings`.
    """
    check_siblings(operator, x, w_pivots, coeffs)
    ranks, others = sum(w.shape[0] for w in w_pivots), sum(c.shape[0] for c in coeffs)
    return x.new_empty(*x.shape[:-1], ranks), x.new_empty(*x.shape[:-1], others)


def check_siblings(operator: str, x: Tensor, w_pivots: Sequence[Tensor], coeffs: Sequence[Tensor]) -> None:
    """Refuses what does not fit together.

    Raises:
        ValueError: saying what came.
    """
    check_dtypes(operator, "pifa::linear", DTYPES, (x, *w_pivots, *coeffs))
    shapes = [tuple(x.shape), [tuple(w.shape) for w in w_pivots], [tuple(c.shape) for c in coeffs]]
    fits = x.dim() > 0 and 0 < len(w_pivots) == len(coeffs)
    if not fits or any(
        w.dim() != 2 or c.dim() != 2 or w.shape[0] == 0 or w.shape[1] != x.shape[-1] or c.shape[1] != w.shape[0]
        for w, c in zip(w_pivots, coeffs, strict=True)
    ):
        raise ValueError(
            f"{operator} takes x [..., in] and as many w_pivots [r, in] as coeffs [out - r, r], r > 0, got {shapes}"
        )


# One body for every device, below autograd: `out=` is refused where gradients are recorded.
_LIBRARY.impl("linear_siblings_gemm", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pifa::linear_siblings_gemm",
    lambda x, w_pivots, coeffs: shapes_of_siblings("linear_siblings_gemm", x, w_pivots, coeffs),
    lib=_LIBRARY,
)
_LIBRARY.impl("linear_siblings_batched", _multiply_batched, "CompositeExplicitAutograd")
torch.library.register_fake("pifa::linear_siblings_batched", _shape_of_batch, lib=_LIBRARY)


def linear_siblings_gemm(x: Tensor, w_pivots: Sequence[Tensor], coeffs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both products of `pifa::linear` for several weights on one x (arXiv 2501.19090, section 3).

    Args:
        x: [..., in], float16, bfloat16 or float32; any strides, zero rows allowed.
        w_pivots: [r_i, in], dtype of `x`, r_i > 0.
        coeffs: [out_i - r_i, r_i], dtype of `x`; may have no rows.

    Returns:
        All y_p side by side, [..., sum of r_i], and all y_n, [..., sum of out_i - r_i], dtype of `x`. y_p is rounded to
        that dtype before it is multiplied.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    z, rest = torch.ops.pifa.linear_siblings_gemm.default(x, list(w_pivots), list(coeffs))
    return z, rest


def linear_siblings_batched(x: Tensor, w_pivots: Sequence[Tensor], coeffs: Sequence[Tensor]) -> Tensor:
    """`pifa::linear` without order and bias for several weights of one shape on one x.

    Args:
        x, w_pivots, coeffs: as in `linear_siblings_gemm`, all w_pivots [r, in], all coeffs [out - r, r].

    Returns:
        [..., siblings, out] in stored order, dtype of `x`, contiguous. y_p is rounded before it is multiplied.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    y: Tensor = torch.ops.pifa.linear_siblings_batched.default(x, list(w_pivots), list(coeffs))
    return y

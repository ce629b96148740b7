"""Operands of `pifa::grouped_linear` of ragged shapes, and what every form of it has to do with them."""

from collections.abc import Callable

import torch
from pifa_compiler.kernels import grouped_linear_ref
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (2, 3, 1), (17, 33, 5), (64, 48, 32), (31, 70, 31)]  # out, in, rank
ENDS = {  # rows, and where each expert's end
    "ragged": (11, [3, 4, 11]),
    "experts without rows": (5, [0, 5, 5]),
    "rows of no expert": (9, [2, 4, 6]),
    "one row": (1, [0, 0, 1]),
    "no rows": (0, [0, 0, 0]),
}


def operands(size: tuple[int, int, int], rows: int, ends: list[int], dtype: torch.dtype, ordered: bool = True):
    """x, w_pivot, coeff, order, bias, ends, of unit scale; rows of no expert are NaN."""
    (d_out, d_in, rank), experts = size, len(ends)
    x = torch.randn(rows, d_in, dtype=torch.float64)
    x[ends[-1] :] = torch.nan
    w_pivot = torch.randn(experts, rank, d_in, dtype=torch.float64) / d_in**0.5
    coeff = torch.randn(experts, d_out - rank, rank, dtype=torch.float64) / rank**0.5
    bias = torch.randn(experts, d_out, dtype=torch.float64)
    order = torch.stack([torch.randperm(d_out) for _ in ends]) if ordered else None
    x, w_pivot, coeff, bias = (value.to(dtype) for value in (x, w_pivot, coeff, bias))
    return x, w_pivot, coeff, order, bias, torch.tensor(ends)


def _widen(values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(v.double() if v is not None and v.is_floating_point() else v for v in values)


def check_errors(
    form: Callable[..., Tensor], size: tuple[int, int, int], where: str, dtype: torch.dtype, *, ordered: bool = True
) -> None:
    """Errors are at most twice those of the reference in that dtype; rows of no expert are 0, whatever comes."""
    rows, ends = ENDS[where]
    values = operands(size, rows, ends, dtype, ordered)
    exact = grouped_linear_ref(*_widen(values))
    got = form(*values)
    assert (got.shape, got.dtype) == (exact.shape, dtype)
    assert not got[ends[-1] :].any()
    if rows:
        reference_error = (grouped_linear_ref(*values) - exact).abs().max()
        assert (got - exact).abs().max() <= 2 * reference_error + torch.finfo(dtype).eps * exact.abs().max()

"""Operands of `pifa::basis_linear` of ragged shapes, and what every form of it has to do with them."""

from collections.abc import Callable

import torch
from pifa_compiler.kernels import basis_linear_ref
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [  # plain, heads, d, in, groups
    (0, 4, 16, 64, 1),
    (5, 4, 8, 33, 2),
    (0, 6, 1, 7, 3),
    (3, 2, 13, 31, 2),
    (0, 3, 70, 205, 1),  # more inputs than are chosen at once, more rows than one task or tile
    (0, 8, 24, 31, 8),
]
TOKENS = [1, 2, 15, 16, 17, 32, 33, 70]


def inside_nan(values: Tensor) -> Tensor:
    """The same values, contiguous, with NaN before and behind them in memory."""
    storage = torch.full((values.numel() + 256,), float("nan"), dtype=values.dtype)
    storage[128 : 128 + values.numel()] = values.flatten()
    return storage[128 : 128 + values.numel()].view(values.shape)


def operands(size: tuple[int, ...], tokens: int, dtype: torch.dtype, bias: bool = True):
    """x, w_plain, w_rest, order, bias, of unit scale, with NaN around each."""
    plain, heads, d, d_in, groups = size
    x, front = torch.randn(tokens, d_in), torch.randn(plain, d_in) / d_in**0.5
    rest, added = torch.randn(heads * d, d_in - d) / d_in**0.5, torch.randn(plain + heads * d)
    order = torch.stack([torch.randperm(d_in) for _ in range(groups)]).int()
    x, front, rest, added = (inside_nan(value.to(dtype)) for value in (x, front, rest, added))
    return x, front if plain else None, rest, order, added if bias else None


def widen(values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(v.double() if v is not None and v.is_floating_point() else v for v in values)


def check_errors(form: Callable[..., Tensor], values: tuple[Tensor | None, ...]) -> None:
    """No error is above what rounding may do to a result, in whatever order its terms are summed.

    A sum of n products in float32 is off by at most n u sum |a b|, u = 2^-24 (Higham, section 3.1), and is rounded
    once to the result's dtype.
    """
    x, _, rest, order, _ = values
    exact, dtype = basis_linear_ref(*widen(values)), x.dtype
    absolute = tuple(v.abs() if v is not None and v.is_floating_point() else v for v in widen(values))
    unit = 1.01 * (order.shape[1] + 2) * 2**-24 + (0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2 * 1.01)
    got = form(*values)
    assert (got.shape, got.dtype) == (exact.shape, dtype)
    assert ((got - exact).abs() <= unit * basis_linear_ref(*absolute)).all(), (list(x.shape), list(rest.shape))

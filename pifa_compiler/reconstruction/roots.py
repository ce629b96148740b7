"""Square roots of positive semidefinite matrices, and products and quotients with them; no inverse is ever formed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 512
"""Rows or columns that one product takes where half of a matrix need not be looked at."""


@dataclass(frozen=True)
class Root:
    """S [n, n] with S S^T = A: Cholesky's lower triangle, or V diag(s) of an eigendecomposition.

    Attributes:
        factor: the triangle, or V.
        scale: s, [n]; None for a triangle. A quotient is 0 along the vectors where it is 0.
        notes: say why it is no triangle.
    """

    factor: Tensor
    scale: Tensor | None = None
    notes: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> "Root":
        """The same with numbers of another dtype."""
        scale = None if self.scale is None else self.scale.to(dtype)
        return replace(self, factor=self.factor.to(dtype), scale=scale)

    def matrix(self) -> Tensor:
        """S itself."""
        return self.factor if self.scale is None else self.factor * self.scale

    def times(self, matrix: Tensor) -> Tensor:
        """matrix S, [m, n]; of a triangle's zeros most are left out."""
        if self.scale is not None:
            return (matrix @ self.factor).mul_(self.scale)
        result = torch.empty_like(matrix)
        for start in range(0, len(self.factor), _BLOCK):
            columns = slice(start, start + _BLOCK)
            result[:, columns] = matrix[:, start:] @ self.factor[start:, columns]
        return result

    def times_transposed(self, matrix: Tensor) -> Tensor:
        """matrix S^T, [m, n]."""
        return matrix @ self.factor.T if self.scale is None else (matrix * self.scale) @ self.factor.T

    def divided(self, matrix: Tensor) -> Tensor:
        """matrix S^-1, [m, n]."""
        if self.scale is not None:
            return (matrix * _inverse(self.scale)) @ self.factor.T
        quotient: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=False, left=False)
        return quotient

    def divided_transposed(self, matrix: Tensor) -> Tensor:
        """matrix S^-T, [m, n]."""
        if self.scale is not None:
            return (matrix @ self.factor).mul_(_inverse(self.scale))
        quotient: Tensor = torch.linalg.solve_triangular(self.factor.T, matrix, upper=True, left=False)
        return quotient


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1), 0)


def gram_root(gram: Tensor, tokens: int) -> Root:
    """A square root of a positive semidefinite [n, n] matrix: Cholesky, or an eigendecomposition where that fails.

    A singular Gram matrix (fewer tokens than channels, a dead channel) is no error: on the directions that the
    calibration never saw quotients are 0.

    Raises:
        LinAlgError: neither converges.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not bool(failed) and bool((diagonal > 1e-7 * diagonal.max()).all()):
        return Root(factor)
    del factor
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values[-1].clamp(min=0) * len(gram) * torch.finfo(gram.dtype).eps
    note = f"singular Gram matrix: rank {int(seen.sum())} of {len(gram)} channels from {tokens} tokens"
    return Root(vectors, torch.where(seen, values, 0).sqrt(), (note,))


def damped_root(gram: Tensor, damping: float) -> Root:
    """A square root of gram + damping I, both of it positive semidefinite but for rounding, gram [n, n].

    Sums in float32 have small negative eigenvalues, which a small damping does not make up for: they count as 0.

    Raises:
        LinAlgError: neither Cholesky nor the eigendecomposition converges.
    """
    factor = gram.clone()
    factor.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(factor)
    # A factor that rounding alone kept from failing has columns without meaning.
    if not bool(failed) and bool((factor.diagonal().square() >= damping / 2).all()):
        return Root(factor)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    scale = (values.clamp(min=0) + damping).sqrt()
    note = f"Gram matrix of the output gradients is not positive definite at damping {damping:g}: eigenvalues clamped"
    return Root(vectors, scale, (note,))


def congruence(matrix: Tensor, symmetric: Tensor, *, size: float = 1.0, damping: float = 0.0) -> Tensor:
    """M^T (A / size + damping I) M, [k, k], exactly symmetric, for M [n, k] and a symmetric A [n, n].

    With H the lower triangle of A, its diagonal halved, it is P + P^T with P = M^T H M: half of the products with A.

    Args:
        matrix: M; its dtype is that of the products.
        symmetric: A, of any dtype; divided and cast a block of rows at a time.
        size: what A is divided by.
        damping: added to the diagonal.
    """
    half = torch.empty_like(matrix)
    for start in range(0, len(matrix), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = symmetric[rows, : start + _BLOCK].double().div(size).to(matrix.dtype)
        block[:, start:].mul_(0.5).diagonal().add_(damping / 2)
        half[rows] = block @ matrix[: start + _BLOCK]
    product = matrix.T @ half
    return product + product.T

"""`Regression`: the best weights of a given rank for sums over tokens, output errors weighted by output gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .roots import Root, congruence, damped_root, gram_root
from .spectra import SMALL, eigenpairs, excess_loss, mean_diagonal, scaled
from .statistics import Statistics

EXCESS = 2e-5
"""How much more than the best of its rank a solution in float32 may lose, as a share. The estimate is right to an order
of magnitude, so that the true share stays near 1e-4 at the most, far below what calibration itself leaves open."""


class Regression:
    """Reduced-rank regression of linears on one input; see `methods.optimal` for what it solves.

    All sums are divided by A's mean diagonal. With C = W B, or a sum of outputs, the target as its inputs see it is

        X = T L^-T = (1 - f) W L + f (C + eps W) L^-T

    Args:
        statistics: of the input.
        mix: f.
        damping: eps, as a multiple of the mean diagonal of A.
    """

    def __init__(self, statistics: Statistics, *, mix: float, damping: float) -> None:
        gram = statistics.gram
        self.mix, self._size = mix, mean_diagonal(gram)
        self._cross = statistics.cross
        damped = gram / self._size
        self._damping = damping * float(damped.diagonal().mean())  # 0 of a Gram matrix that is 0
        damped.diagonal().add_(self._damping)
        root = gram_root(damped, statistics.tokens)
        self._roots = {torch.float64: root}
        self._of_identity: dict[torch.dtype, Tensor] = {}
        few = statistics.tokens < len(gram)
        self._notes = (*root.notes, *((f"{statistics.tokens} tokens for {len(gram)} channels",) if few else ()))

    def solve(
        self, weight: Tensor, rank: int, output_cross: Tensor | None, gradient_gram: Tensor | None, damping: float
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Factors u [out, r] and v [r, in] in float64, and what was out of the ordinary.

        Weights of 512 rows and columns or more are solved in float32, and again in float64 if that loses more than
        `EXCESS`.

        Args:
            weight: W [out, in], float64.
            rank: r.
            output_cross: C [out, in], float64; None is W B.
            gradient_gram: G [out, out], any scale and floating dtype; None is the identity.
            damping: multiple of G's mean diagonal that is added to it.

        Raises:
            LinAlgError: a decomposition does not converge.
        """
        weight, size = scaled(weight)
        target = _Target(self, weight, None if output_cross is None else output_cross / size)
        if gradient_gram is not None and not float(gradient_gram.diagonal().max()) > 0:
            gradient_gram = None  # nothing downstream reads this output, so no error matters more than another
        side = _Inputs if weight.shape[0] >= weight.shape[1] else _Outputs
        problem = side(target, gradient_gram, damping)
        for dtype in (torch.float32, torch.float64) if min(weight.shape) >= SMALL else (torch.float64,):
            matrix = target.matrix(dtype)
            values, vectors = eigenpairs(problem.squared(matrix))
            if dtype == torch.float64 or excess_loss(problem.apply_squared, values, vectors, rank) <= EXCESS:
                break
        u, v = problem.factors(matrix, vectors[:, -rank:].to(dtype))
        return u.double() * size, v.double(), (*self._notes, *problem.notes)

    def root(self, dtype: torch.dtype) -> Root:
        """L."""
        if dtype not in self._roots:
            self._roots[dtype] = self._roots[torch.float64].to(dtype)
        return self._roots[dtype]

    def pulled(self, cross: Tensor, weight: Tensor) -> Tensor:
        """f (C + eps W), any rows of both."""
        return cross * (self.mix / self._size) + weight * (self.mix * self._damping)

    def cross(self) -> Tensor:
        """B [in, in]; it is missing only where all linears have sums of outputs."""
        assert self._cross is not None  # noqa: S101
        return self._cross

    def of_identity(self, dtype: torch.dtype) -> Tensor:
        """X for W = I, [in, in], which all linears without a sum of outputs share."""
        if dtype not in self._of_identity:
            root = self.root(dtype)
            pulled = self.cross() * (self.mix / self._size)
            pulled.diagonal().add_(self.mix * self._damping)
            found = root.divided_transposed(pulled.to(dtype)).add_(root.matrix(), alpha=1 - self.mix)
            self._of_identity[dtype] = found
        return self._of_identity[dtype]


@dataclass(frozen=True)
class _Target:
    """X [out, in] of one linear, in several precisions, and as an operator in float64."""

    regression: Regression
    weight: Tensor
    output_cross: Tensor | None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)
        if self.output_cross is None:
            return weight @ self.regression.of_identity(dtype)
        root, mix = self.regression.root(dtype), self.regression.mix
        pulled = self.regression.pulled(self.output_cross, self.weight).to(dtype)
        return root.divided_transposed(pulled).add_(root.times(weight), alpha=1 - mix)

    def apply(self, z: Tensor) -> Tensor:
        """X z for z [in, k]."""
        root, mix = self.regression.root(torch.float64), self.regression.mix
        kept, crossed = (1 - mix) * root.times_transposed(z.T), root.divided(z.T)  # (L z)^T and (L^-T z)^T
        if self.output_cross is None:
            return self.weight @ (kept + self.regression.pulled(crossed @ self.regression.cross().T, crossed)).T
        return self.weight @ kept.T + self.regression.pulled(self.output_cross @ crossed.T, self.weight @ crossed.T)

    def apply_transposed(self, y: Tensor) -> Tensor:
        """X^T y for y [out, k]."""
        root, mix, back = self.regression.root(torch.float64), self.regression.mix, y.T @ self.weight
        crossed = back @ self.regression.cross() if self.output_cross is None else y.T @ self.output_cross
        return ((1 - mix) * root.times(back) + root.divided_transposed(self.regression.pulled(crossed, back))).T


class _Inputs:
    """The truncation by the leading eigenvectors V of X^T G X, [in, in]: X V V^T L^-1, which takes no root of G."""

    notes: tuple[str, ...] = ()

    def __init__(self, target: _Target, gram: Tensor | None, damping: float) -> None:
        self._target, self._gram, self._damping = target, gram, damping
        self._size = 1.0 if gram is None else mean_diagonal(gram)

    def squared(self, matrix: Tensor) -> Tensor:
        if self._gram is None:
            return matrix.T @ matrix
        return congruence(matrix, self._gram, size=self._size, damping=self._damping)

    def apply_squared(self, z: Tensor) -> Tensor:
        image = self._target.apply(z)
        if self._gram is not None:
            weighted = torch.cat([rows.double() @ image for rows in self._gram.split(512)])  # no copy of all of G
            image = weighted / self._size + self._damping * image
        return self._target.apply_transposed(image)

    def factors(self, matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return matrix @ vectors, self._target.regression.root(matrix.dtype).divided(vectors.T)


class _Outputs:
    """The truncation by the leading eigenvectors Q of R X X^T R^T, [out, out]: R^-1 Q Q^T R X L^-1."""

    def __init__(self, target: _Target, gram: Tensor | None, damping: float) -> None:
        self._target = target
        self._root = None if gram is None else damped_root(gram.double() / mean_diagonal(gram), damping)  # R^T
        self.notes = () if self._root is None else self._root.notes

    def squared(self, matrix: Tensor) -> Tensor:
        small = matrix @ matrix.T
        if self._root is None:
            return small
        root = self._root.to(matrix.dtype)
        return root.times(root.times(small).T)

    def apply_squared(self, z: Tensor) -> Tensor:
        image = z if self._root is None else self._root.times_transposed(z.T).T
        image = self._target.apply(self._target.apply_transposed(image))
        return image if self._root is None else self._root.times(image.T).T

    def factors(self, matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        left = right = vectors.T
        if self._root is not None:
            root = self._root.to(matrix.dtype)
            left, right = root.divided(left), root.times_transposed(right)
        return left.T, self._target.regression.root(matrix.dtype).divided(right @ matrix)

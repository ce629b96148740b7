"""Singular values of a weight as its inputs and the gradients at its outputs see it."""

import torch
from torch import Tensor

from .methods import gram_root


def squared_singular_values(weight: Tensor, gram: Tensor | None, gradient_gram: Tensor | None = None) -> Tensor:
    """Of G^1/2 W A^1/2, descending, [min(out, in)], float64.

    With L L^T = A they are the eigenvalues of L^T W^T G W L, so that only the matrix of the smaller side, here that of
    the inputs, needs a root.

    Args:
        weight: W [out, in].
        gram: A = sum x x^T of the inputs, [in, in]; None is the identity.
        gradient_gram: G = sum g g^T of the gradients at the outputs, [out, out]; None is the identity.

    Raises:
        LinAlgError: an eigendecomposition does not converge.
    """
    weight = weight.double()
    grams = [each if each is None else each.double() for each in (gram, gradient_gram)]
    if weight.shape[0] < weight.shape[1]:
        weight, grams = weight.T, grams[::-1]
    smaller, larger = grams
    small = weight.T @ (weight if larger is None else larger @ weight)
    if smaller is not None:
        root = gram_root(smaller, 0).root
        small = root.T @ small @ root
    squared: Tensor = torch.linalg.eigvalsh(small)
    return squared.flip(0).clamp(min=0)

"""Singular values and leading singular vectors of weights as their inputs, and gradients at their outputs, see them.

Large matrices are multiplied in float32, at half the time and memory. That is as precise as the sums over tokens
that they are made of; what it costs a truncation is measured (`excess_loss`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .roots import Root, congruence, gram_root

SMALL = 512
"""Matrices with fewer rows or columns take float64 throughout: there float32 saves nothing."""


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
    smaller, larger = gram, gradient_gram
    if weight.shape[0] < weight.shape[1]:
        weight, smaller, larger = weight.T, larger, smaller
    precision = torch.float64 if min(weight.shape) < SMALL else torch.float32
    weight, size = scaled(weight)
    weight, factor = weight.to(precision), size**2
    if larger is None:
        small = weight.T @ weight
    else:
        size = mean_diagonal(larger)
        small, factor = congruence(weight, larger, size=size), factor * size
    small = small.double()
    if smaller is not None:
        size = mean_diagonal(smaller)
        root = _lenient_root(smaller.double() / size)
        small, factor = root.times(root.times(small).T), factor * size
    squared: Tensor = torch.linalg.eigvalsh(small)
    return squared.flip(0).clamp(min=0) * factor


def scaled(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix of root mean square 1 in float64, and what it is to be multiplied by; a zero matrix stays as it is."""
    matrix = matrix.double()
    largest = float(matrix.abs().max())  # squares of tiny numbers would vanish
    size = largest * float((matrix / largest).square().mean().sqrt()) if largest > 0 else 1.0
    return matrix / size, size


def mean_diagonal(gram: Tensor) -> float:
    """Of a Gram matrix, in float64; 1 if it is zero, so that it can be divided by."""
    mean = float(gram.diagonal().double().mean())
    return mean if mean > 0 else 1.0


def _lenient_root(gram: Tensor) -> Root:
    """A root of a Gram matrix whose sums were rounded to float32: it may be singular, and off by as much as that.

    What is added to a matrix that has no Cholesky factor is the rounding of its largest eigenvalue, at most.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        damped = gram.clone()
        damped.diagonal().add_(torch.finfo(torch.float32).eps * gram.diagonal().sum())
        factor, failed = torch.linalg.cholesky_ex(damped)
    return gram_root(gram, 0) if bool(failed) else Root(factor)


def eigenpairs(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, [n], and eigenvectors, [n, n], of a symmetric matrix; both float64.

    In float32 an eigendecomposition is off by the rounding of the largest eigenvalue, which can be millions of times
    those around a truncation. So the largest are found in float64 and taken out first; that takes a few products with
    n / 32 vectors.

    Raises:
        LinAlgError: it does not converge.
    """
    if symmetric.dtype == torch.float64:
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    exact = symmetric.double()
    values, leading = _leading(exact, max(len(exact) // 32, 1))
    image = exact @ leading
    # The rest of the matrix, with the leading vectors where its smallest eigenvalue lies: below all others.
    taken = image - leading @ (leading.T @ image) / 2 + values[0] / 2 * leading
    exact.addmm_(taken, leading.T, alpha=-1).addmm_(leading, taken.T, alpha=-1)
    try:
        others, vectors = torch.linalg.eigh(exact.float())
    except LinAlgError:  # LAPACK gives up in float32 where little but subnormal numbers is left
        return eigenpairs(symmetric.double())
    rest = vectors[:, len(values) :].double()
    rest.addmm_(leading, leading.T @ rest, alpha=-1)
    return torch.cat((others[len(values) :].double(), values)), torch.cat((rest, leading), dim=1)


def _leading(symmetric: Tensor, count: int, steps: int = 6) -> tuple[Tensor, Tensor]:
    """The largest of the `count` leading eigenvalues, ascending, and their vectors, by subspace iteration.

    Those at least four times the last of them, of which 4^-steps of other vectors is left; at least one.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(len(symmetric), count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(symmetric.device)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(symmetric @ basis).Q
    values, rotation = torch.linalg.eigh(basis.T @ (symmetric @ basis))
    far = values > 4 * values[0]
    far[-1] = True
    return values[far], basis @ rotation[:, far]


def excess_loss(
    apply: Callable[[Tensor], Tensor], values: Tensor, vectors: Tensor, rank: int, probes: int = 8
) -> float:
    """By how much a truncation along computed eigenvectors loses more than the best one, as a share of the best's loss.

    To second order in the noise D = S - V diag(values) V^T the excess is the sum, over vectors i that are kept and j
    that are not, of D_ij^2 / (value_i - value_j), and no more than D_ij where that is less. Random signs z show the
    noise of each row, D z, and D_ij^2 is taken as it would be if the noise of rows were independent. Vectors that are
    far above the last one kept are left out of z: their own noise is large and of no consequence.

    Args:
        apply: z [n, k] -> S z, in float64; S is the exact matrix, [n, n].
        values, vectors: its computed eigenvalues, ascending, [n], and eigenvectors, [n, n]; float64.
        rank: how many vectors, the last ones, are kept.
        probes: number of vectors z, of which a few do for an order of magnitude.

    Returns:
        The share; infinity if the noise may be all that is lost.
    """
    if rank >= len(values):
        return 0.0
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs = torch.randint(0, 2, (len(values), probes), generator=generator).double().mul_(2).sub_(1)
    near = int((values <= 100 * values[-rank].clamp(min=0)).sum())
    near = max(near, len(values) - rank)
    others = vectors[:, :near]
    coordinates = others.T @ signs.to(values.device)
    noise = vectors.T @ apply(others @ coordinates)
    noise[:near] -= values[:near, None] * coordinates
    energy = noise.square().mean(dim=1)
    pairs = energy[-rank:, None] * energy[:-rank] / energy[:near].sum().clamp(min=1e-300)
    gaps = values[-rank:, None] - values[:-rank]
    excess = float((pairs / torch.maximum(gaps, pairs.sqrt()).clamp(min=1e-300)).sum())
    # The trace of the noise is at most its Frobenius norm times the root of its size.
    lost = float(values[:-rank].sum() - (energy[:-rank].sum() * (len(values) - rank)).sqrt())
    return excess / lost if lost > 0 else float("inf")

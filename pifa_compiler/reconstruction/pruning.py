"""2:4 pruning, to compare with: of every four weights along the input two become zero.

Neither is a way to compress with this package. In half precision 2:4 stores half of the values and two bits for each of
them, 9 / 16 = 0.5625 of the dense bytes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import RankError

STORED = 0.5625
"""Bytes over dense bytes in half precision: half the values, and 2 bits for the place of each."""


def wanda(weight: Tensor, gram: Tensor) -> Tensor:
    """Wanda (arXiv 2306.11695, eq. 1): of four weights keeps the two with the largest |W_ij| ||x_j||.

    Args:
        weight: [out, in].
        gram: sum x x^T of the inputs, [in, in].

    Raises:
        RankError: the inputs are not a multiple of four.
    """
    _check(weight)
    score = weight.abs() * gram.diagonal().clamp(min=0).sqrt().to(weight.dtype)
    return weight * _two_of_four(score)


def sparsegpt(weight: Tensor, gram: Tensor, *, damping: float = 0.01, block: int = 128) -> Tensor:
    """SparseGPT (arXiv 2301.00774, algorithm 1): prunes column by column, and the columns behind make up for it.

    With H = A + damping * mean diagonal and U the upper Cholesky factor of H^-1, a pruned weight w_ij adds
    -w_ij / U_jj * U_j,j+1.. to its row; of four columns the two smallest w_ij^2 / U_jj^2 go.

    Args:
        weight, gram: as in `wanda`.
        damping: as in the authors' code.
        block: columns updated at once.

    Raises:
        RankError: the inputs are not a multiple of four.
    """
    _check(weight)
    hessian, result = gram.double().clone(), weight.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    result[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    result = result.float()
    for start in range(0, result.shape[1], block):
        end = min(start + block, result.shape[1])
        errors = torch.zeros_like(result[:, start:end])
        mask = torch.ones_like(errors, dtype=torch.bool)
        for j in range(start, end):
            if (j - start) % 4 == 0:
                score = result[:, j : j + 4].square() / upper.diagonal()[j : j + 4].square()
                mask[:, j - start : j - start + 4] = _two_of_four(score)
            kept = result[:, j] * mask[:, j - start]
            errors[:, j - start] = (result[:, j] - kept) / upper[j, j]
            result[:, j + 1 : end] -= torch.outer(errors[:, j - start], upper[j, j + 1 : end])
            result[:, j] = kept
        result[:, end:] -= errors @ upper[start:end, end:]
    return result.to(weight.dtype)


PRUNERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"wanda-2:4": wanda, "sparsegpt-2:4": sparsegpt}
"""By the name that `pifa compare --methods` takes: (weight, gram) -> pruned weight."""


def _check(weight: Tensor) -> None:
    if weight.shape[1] % 4:
        raise RankError(f"2:4 pruning needs a multiple of 4 inputs, got a weight {list(weight.shape)}")


def _two_of_four(score: Tensor) -> Tensor:
    """True at the two largest of every four scores in a row, [out, in]."""
    fours = score.reshape(score.shape[0], -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
    return kept.reshape(score.shape)

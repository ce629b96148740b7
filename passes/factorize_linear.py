"""FactorizeLinear: linear(x, W, b) -> pifa::linear(x, w_pivot, coeff, order, b)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import RankError
from ..factors import PifaFactors, factorize, numerical_rank, rank_for_density
from ..kernels import linear as _registers_the_operator  # noqa: F401
from .rewrite import Rewrite, Skip
from .weights import Weight, drop_weight, store_factors, weight_of

aten = torch.ops.aten

FULL_RANK = Skip("weight has full rank")
LARGEST_SHARE = 0.95
"""A weight of deficient rank is rewritten if its PIFA form stores at most this share of its numbers."""


class FactorizeLinear(Rewrite):
    """linear(x, W, b) -> pifa::linear(x, w_pivot, coeff, order, b).

    Args:
        factors: for every weight name its factors. None: factorize every weight whose own rank is so deficient that it
            stores at least 5% fewer numbers in PIFA form, without loss.
    """

    targets = (aten.linear.default,)

    def __init__(self, factors: Mapping[str, PifaFactors] | None = None) -> None:
        self.factors = factors
        self._detected: dict[str, PifaFactors | Skip] = {}

    def match(self, gm: GraphModule, node: Node) -> tuple[Weight, PifaFactors] | Skip:
        weight = weight_of(gm, node.args[1])
        if isinstance(weight, Skip):
            return weight
        if self.factors is None:
            # One weight may feed several linears, once as stored and once transposed.
            key = f"{weight.name} {list(weight.tensor.stride())}"
            found = self._detected.get(key) or detect(weight.tensor)
            self._detected[key] = found
        else:
            found = self.factors.get(weight.name) or Skip("no factors for this weight")
        if isinstance(found, Skip):
            return found
        if found.shape != tuple(weight.tensor.shape):
            return Skip(f"factors represent a {list(found.shape)} weight, this one is {list(weight.tensor.shape)}")
        return weight, found

    def rewrite(self, gm: GraphModule, node: Node, found: tuple[Weight, PifaFactors]) -> Node:
        weight, factors = found
        bias = node.args[2] if len(node.args) > 2 else None
        stored = store_factors(gm, weight.name, factors)
        drop_weight(gm, weight, node)
        return gm.graph.call_function(torch.ops.pifa.linear.default, (node.args[0], *stored, bias))


def detect(weight: Tensor) -> PifaFactors | Skip:
    """The factors of a weight [out, in] of clearly deficient rank, or why there are none."""
    try:
        most = rank_for_density(*weight.shape, LARGEST_SHARE)
        if rank_exceeds(weight, most):
            return FULL_RANK
        rank = numerical_rank(weight)
        return factorize(weight, rank=rank) if 0 < rank <= most else FULL_RANK
    except RankError as error:
        return Skip(str(error))


def rank_exceeds(weight: Tensor, rank: int) -> bool:
    """A cheap sufficient test: True only if the numerical rank of `weight` [out, in] is above `rank`.

    A random square part of rank + 1 rows and columns is singular if the weight's rank is at most `rank`: its LU then has
    a pivot no larger than the weight's own rounding noise, or that of the elimination in float32.
    """
    size = rank + 1
    if size > min(weight.shape):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(n, generator=generator)[:size].to(weight.device) for n in weight.shape)
    part = weight[rows][:, columns].float()
    rms = float(part.square().mean().sqrt())
    smallest = float(torch.linalg.lu_factor_ex(part).LU.diagonal().abs().min())
    # A rounded entry is off by eps * rms / (2 sqrt 3) in the mean; the elimination adds up about `size` of those.
    noise = 4 * torch.finfo(weight.dtype).eps * size**0.5 / (2 * 3**0.5) + 8 * size * torch.finfo(torch.float32).eps
    return smallest > noise * rms

"""FactorizeLinear: linear(x, W, b) -> pifa::linear(x, w_pivot, coeff, order, b)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import RankError
from ..factors import PifaFactors, factorize_losslessly, numerical_rank, rank_for_density
from ..kernels import linear as _registers_the_operator  # noqa: F401
from .rewrite import Rewrite, Skip
from .weights import SUBCLASS, Weight, is_subclass, read_weight, release, store_factors

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
        """The weight and its factors."""
        weight = read_weight(gm, node.args[1])
        if isinstance(weight, Skip):
            return weight
        if is_subclass(gm, node.args[0]):
            return SUBCLASS
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
        """Stores the factors and calls `pifa::linear` on them."""
        weight, factors = found
        bias = node.args[2] if len(node.args) > 2 else None
        stored = store_factors(gm, weight.name, factors)
        new = gm.graph.call_function(torch.ops.pifa.linear.default, (node.args[0], *stored, bias))
        release(gm, node)
        return new


def detect(weight: Tensor) -> PifaFactors | Skip:
    """The factors of a weight [out, in] of clearly deficient rank, or why there are none."""
    try:
        d_out, d_in = weight.shape
        most = rank_for_density(d_out, d_in, LARGEST_SHARE)
        if rank_exceeds(weight, most):  # never true of a part that holds NaN
            return FULL_RANK
        if not bool(torch.isfinite(weight).all()):
            return Skip("weight holds NaN or Inf")
        rank = numerical_rank(weight)
        return factorize_losslessly(weight, rank=rank) if 0 < rank <= most else FULL_RANK
    except RankError as error:
        return Skip(str(error))


def rank_exceeds(weight: Tensor, rank: int) -> bool:
    """A cheap test, one LU in float32: True only if the numerical rank of `weight` [out, in] is above `rank`.

    Of a random square part with a few rows more than `rank`, the LU's last pivots are rounding noise if the weight's
    rank is at most `rank`. In multiples of eps * rms * sqrt(size) / (2 sqrt 3), the noise of a rounded entry summed up,
    their median was at most 8 there for bfloat16 and at least 50 for random weights of full rank (64 to 1500 rows); the
    elimination's own noise in float32 was at most size / 2 of such multiples of its eps. Fewer than eight last pivots
    have no median to rely on; weights that leave no more rows are small, and looked at exactly.
    """
    size = min(*weight.shape, rank + max(8, rank // 32))
    if size < rank + 8:
        return False
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(n, generator=generator)[:size].to(weight.device) for n in weight.shape)
    part = weight[rows][:, columns]
    part = (part / part.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)).float()  # squares stay within float32
    last = torch.linalg.lu_factor_ex(part).LU.diagonal()[rank:].abs().median()
    noise = 20 * torch.finfo(weight.dtype).eps + 4 * size * torch.finfo(torch.float32).eps
    return bool(last > noise * part.square().mean().sqrt() * size**0.5 / (2 * 3**0.5))

"""`PifaLinear`: the module that stands where an `nn.Linear` stood."""

from typing import Any

import torch
from torch import Tensor, nn

from .factors import PifaFactors, row_order
from .kernels import linear


class PifaLinear(nn.Module):
    """A linear layer whose weight [out, in] of rank r is stored in PIFA form.

    It can be fine-tuned, moved, cast, copied and saved like any module. The state dict holds `w_pivot` [r, in],
    `coeff` [out - r, r], `pivots` [r] (int32) and, if there is one, `bias` [out]; the row order follows from `pivots`:
    it is None where the pivots are the first r rows, as they are once the next layer absorbed it (`absorb_orders`).

    Args:
        in_features, out_features, rank: the shape; 1 <= rank <= min(in_features, out_features).
        bias: whether there is a bias [out_features].
        device, dtype: of the parameters, as in `nn.Linear`.
    """

    order: Tensor | None
    pivots: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.w_pivot = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.coeff = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("pivots", torch.arange(rank, device=device, dtype=torch.int32))
        self.register_buffer("order", torch.arange(out_features, device=device), persistent=False)

    @classmethod
    def from_factors(cls, factors: PifaFactors, bias: Tensor | None = None, requires_grad: bool = True) -> "PifaLinear":
        """The layer that computes x W^T + bias for the weight in `factors`; it takes the tensors over, without a copy.

        Args:
            factors: the weight [out, in].
            bias: [out], or None. An `nn.Parameter` is kept as the same object.
            requires_grad: whether the factors are trainable.
        """
        out_features, in_features = factors.shape
        layer = cls(in_features, out_features, factors.rank, bias=False, device="meta", dtype=factors.w_pivot.dtype)
        layer.w_pivot = nn.Parameter(factors.w_pivot, requires_grad)
        layer.coeff = nn.Parameter(factors.coeff, requires_grad)
        layer.pivots = factors.pivots.to(torch.int32)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad)
        layer.restore_order()
        return layer

    def restore_order(self) -> None:
        """Recomputes the row order from `pivots`; for loaders that fill the parameters without `load_state_dict`."""
        first = torch.arange(self.rank, dtype=self.pivots.dtype, device=self.pivots.device)
        self.order = None if torch.equal(self.pivots, first) else self.row_order()

    def row_order(self) -> Tensor:
        """The gather index of `pifa::linear`, [out], int64, also where `order` is None."""
        return row_order(self.pivots, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], put together anew at each read, for code that asks for its dtype or values."""
        rows = torch.cat((self.w_pivot, self.coeff @ self.w_pivot))
        return rows if self.order is None else rows[self.order]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.w_pivot, self.coeff, self.order, self.bias)

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.pivots.is_meta:
            self.restore_order()

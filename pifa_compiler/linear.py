"""`PifaLinear`: the module that stands where an `nn.Linear` stood."""

import math
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .dense_weight import DenseWeight, put_together
from .errors import ConfigError, RankError, WeightError
from .factors import PifaFactors, row_order
from .kernels import linear


class WithRowOrder(nn.Module):
    """A module with pivots, and with the row order that follows from them.

    Whoever changes the pivots need not know of the order: it is derived again when the module is called.
    """

    order: Tensor | None
    pivots: Tensor
    out_features: int
    _order_is_of: "tuple[weakref.ref[Tensor], int] | None" = None
    """The pivots that `order` was derived from, not held by this, and their version; None if that is not known."""

    def restore_order(self) -> None:
        """Recomputes the row order from `pivots`; for loaders that fill the parameters without `load_state_dict`."""
        first = torch.arange(self.pivots.shape[-1], dtype=self.pivots.dtype, device=self.pivots.device)
        self._order_is_of = _with_version(self.pivots)
        self.order = None if bool((self.pivots == first).all()) else self.row_order()

    def row_order(self) -> Tensor:
        """The gather index of the operator, [..., out], int64, also where `order` is None."""
        return row_order(self.pivots, self.out_features)

    def _start_order(self) -> None:
        """The pivots become the first rows."""
        *groups, rank = self.pivots.shape
        with torch.no_grad():
            self.pivots.copy_(torch.arange(rank, device=self.pivots.device))
        self._order_is_of = _with_version(self.pivots)
        # Which pivots a layer on the meta device will have is not known: it has a place for an order.
        place = torch.empty(*groups, self.out_features, dtype=torch.int64, device="meta")
        self.order = place if self.pivots.is_meta else None

    def _follow_pivots(self) -> None:
        """Derives the order again if there are other pivots than it was derived from."""
        if torch.compiler.is_compiling():
            return
        pivots, known = self.pivots, self._order_is_of
        if known is not None and known[0]() is pivots and known[1] == pivots._version:
            return
        if not (pivots.is_meta or pivots.is_inference() or _is_transformed(pivots)):
            self.restore_order()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order_is_of": None}  # a copy counts its versions anew

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.pivots.is_meta:
            self.restore_order()


class PifaLinear(WithRowOrder):
    """A linear layer whose weight [out, in] of rank r is stored in PIFA form.

    It can be fine-tuned, moved, cast, copied and saved like any module. The state dict holds `w_pivot` [r, in],
    `coeff` [out - r, r], `pivots` [r] (int32) and, if there is one, `bias` [out]; the row order follows from `pivots`:
    it is None where the pivots are the first r rows, as they are once the next layer absorbed it (`absorb_orders`).
    Pivots may be exchanged or written to: a call that is neither compiled nor captured derives the order again. Code
    that is compiled, and writes through `.data`, `.numpy()`, a storage or DLPack, need `pifa_compiler.refresh(model)`.

    A new layer is initialised for training from scratch, see `reset_parameters`; `from_factors` makes one of a weight.

    Args:
        in_features, out_features, rank: the shape; 1 <= rank <= min(in_features, out_features).
        bias: whether there is a bias [out_features].
        device, dtype: of the parameters, as in `nn.Linear`.

    Raises:
        RankError: no weight of this shape has this rank.
        ConfigError: the shape is not one, or the dtype is not of floating point.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["weight"]  # torch.jit.script compiles properties, used or not

    order: Tensor | None  # torch.jit.script looks here
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
        _check_shape(in_features, out_features, rank, dtype)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.w_pivot = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.coeff = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("pivots", torch.empty(rank, device=device, dtype=torch.int32))
        self.register_buffer("order", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, so that outputs and gradients are of the size that those of `nn.Linear` are.

        Pivot rows and bias are uniform in +-1 / sqrt(in), as there. Every other row is a sum of r pivot rows; with
        coefficients of variance 1 / r, uniform in +-sqrt(3 / r), its numbers have the variance of the pivot rows'.
        The pivots become the first rows.
        """
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.w_pivot, -bound, bound)
        bound_of_coeff = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.coeff, -bound_of_coeff, bound_of_coeff)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._start_order()

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

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], read-only; put together no sooner than its values are read (`DenseWeight`).

        Reading is differentiable with respect to `w_pivot` and `coeff`. Writes raise `WeightError`: change the factors.
        """
        return self._dense_weight()

    @weight.setter
    def weight(self, value: object) -> None:
        raise WeightError(_not_settable(value))

    def _dense_weight(self) -> Tensor:
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if torch.compiler.is_compiling() or tracing or _is_transformed(self.w_pivot):
            return put_together(self.w_pivot, self.coeff, self.order)  # in a graph, what nobody reads costs nothing
        self._follow_pivots()
        return DenseWeight.of_factors(self.w_pivot, self.coeff, self.order)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module, but that there can be no parameter `weight`.

        Raises:
            WeightError: `name` is "weight".
        """
        if name == "weight":  # what `layer.weight = nn.Parameter(...)` calls
            raise WeightError(_not_settable(param))
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # torch.jit.script knows the operator, but none of its overloads by name.
            y: Tensor = torch.ops.pifa.linear(x, self.w_pivot, self.coeff, self.order, self.bias)
            return y
        self._follow_pivots()
        return linear(x, self.w_pivot, self.coeff, self.order, self.bias)

    def extra_repr(self) -> str:
        """The shape, as `nn.Linear` shows it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def _check_shape(in_features: int, out_features: int, rank: int, dtype: torch.dtype | None) -> None:
    sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            kind = RankError if name == "rank" else ConfigError
            raise kind(f"{name} of a PifaLinear must be an integer of 1 or more, got {size!r}")
    if rank > min(in_features, out_features):
        raise RankError(
            f"a weight [{out_features}, {in_features}] has at most rank {min(in_features, out_features)}, got rank "
            f"{rank}; PifaLinear takes in_features, out_features and rank in this order"
        )
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"a PifaLinear holds floating-point parameters, got dtype {dtype}")


def _with_version(pivots: Tensor) -> "tuple[weakref.ref[Tensor], int] | None":
    """None of tensors of inference mode, which count no versions."""
    return None if pivots.is_inference() else (weakref.ref(pivots), pivots._version)


def _not_settable(value: object) -> str:
    what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return (
        f"the weight of a PifaLinear cannot be set, {what} came: change w_pivot and coeff, make a layer of it by "
        "PifaLinear.from_factors(factorize(weight)), or put an nn.Linear in this one's place"
    )


def _is_transformed(tensor: Tensor) -> bool:
    """Whether more is known of a tensor than its values: by torch.func, forward-mode gradients, or a fake mode."""
    return (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch.autograd.forward_ad._current_level >= 0
        or type(tensor) not in (nn.Parameter, Tensor)
    )

"""The dense weight of a layer in PIFA form, for code that asks for `layer.weight` as it does of an `nn.Linear`.

Most of that code only wants to know a dtype, a device or a shape, so the weight is put together no sooner than somebody
reads its values. It is never stored, so that nothing can be written to it: a write is refused, and so is one through a
view of it (`weight[0]`, `weight.T`, `weight.data`). Only to multiply or divide all of it by a number in place, as RWKV
does before its first call, is to do so to the pivot rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import WeightError

_READ_ONLY = (
    "the weight of a PifaLinear is put together from its factors at each read and cannot be changed: change w_pivot "
    "[r, in] and coeff [out - r, r] instead, or put an nn.Linear with layer.weight.detach().clone() in the layer's "
    "place; {call} came"
)

_METADATA = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_mps")),
        *(getattr(Tensor, name).__get__ for name in ("is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_xpu")),
        *(getattr(Tensor, name).__get__ for name in ("is_sparse_csr", "itemsize", "layout", "nbytes", "ndim", "shape")),
        *(Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_conj),
        *(Tensor.is_floating_point, Tensor.is_inference, Tensor.is_neg, Tensor.is_signed, Tensor.ndimension),
        *(Tensor.nelement, Tensor.numel, Tensor.size, Tensor.storage_offset, Tensor.stride, Tensor.__len__),
        *(Tensor.__hash__, Tensor.dim_order, torch.is_complex, torch.is_floating_point, torch.is_conj, torch.is_neg),
        *(torch.is_inference, torch.is_signed, torch.numel, torch.get_device),
    }
)
"""What the stand-in answers by itself."""

_DATA, _GRAD, _IS_LEAF, _REQUIRES_GRAD = (
    getattr(Tensor, name).__get__ for name in ("data", "grad", "is_leaf", "requires_grad")
)

_SHAPED = frozenset(
    {
        *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
        *(Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros),
    }
)
"""What makes another tensor after the shape, dtype and device alone."""

_SCALES = frozenset({Tensor.mul_, Tensor.div_, Tensor.__imul__, Tensor.__itruediv__})
"""Writes that the factors can follow, if it is by a number: (s w_pivot, coeff) is s W."""

_REFUSED = frozenset(
    {
        *(getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")),
        *(Tensor.requires_grad_, Tensor.retain_grad, Tensor.register_hook, Tensor.detach_, Tensor.share_memory_),
        Tensor.register_post_accumulate_grad_hook,
    }
)
"""What changes a tensor without an operation that would say so, or waits for a gradient that never comes."""


class DenseWeight(Tensor):
    """A read-only tensor [out, in] whose values are those of W = [w_pivot; coeff w_pivot][order].

    Reading them is differentiable with respect to `w_pivot` and `coeff`, and gives plain tensors. Like the weight of
    an `nn.Linear` it always shows what the layer computes with: once the factors changed, it is put together anew.
    """

    _factors: tuple[Tensor, Tensor, Tensor | None] | None
    _seen: tuple[Tensor, tuple[int, int] | None] | None
    _needs_gradient: bool

    @staticmethod
    def of_factors(w_pivot: Tensor, coeff: Tensor, order: Tensor | None) -> "DenseWeight":
        """The weight with the factors w_pivot [r, in], coeff [out - r, r] and the gather index `order` [out]."""
        shape = torch.Size((len(w_pivot) + len(coeff), w_pivot.shape[1]))
        weight = DenseWeight._stand_in(shape, (shape[1], 1), w_pivot)
        weight._factors, weight._seen = (w_pivot, coeff, order), None
        weight._needs_gradient = torch.is_grad_enabled() and (w_pivot.requires_grad or coeff.requires_grad)
        return weight

    @staticmethod
    def of_values(view: Tensor) -> "DenseWeight":
        """A plain tensor to be read only: a view of such a weight, or what was put together of several."""
        weight = DenseWeight._stand_in(view.shape, view.stride(), view)
        weight._factors, weight._seen, weight._needs_gradient = None, (view, None), view.requires_grad
        return weight

    @staticmethod
    def _stand_in(shape: torch.Size, stride: Sequence[int], like: Tensor) -> "DenseWeight":
        made: DenseWeight = Tensor._make_wrapper_subclass(
            DenseWeight, shape, strides=stride, dtype=like.dtype, device=like.device, layout=torch.strided
        )
        return made

    def _values(self) -> Tensor:
        """The plain tensor, put together once for as long as neither factor is written to."""
        if self._factors is None:
            assert self._seen is not None  # noqa: S101  a view is made of values
            return self._seen[0]
        w_pivot, coeff, _ = self._factors
        # Tensors of inference mode count no writes, so nothing can be kept of them.
        counted = not (w_pivot.is_inference() or coeff.is_inference())
        versions = (w_pivot._version, coeff._version) if counted else None
        if self._seen is None or versions is None or self._seen[1] != versions:
            with torch.set_grad_enabled(self._needs_gradient):
                self._seen = (put_together(*self._factors), versions)
        return self._seen[0]

    def _scale(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Has the pivot rows multiplied or divided by a number, and with them all; False if it is something else."""
        if self._factors is None or kwargs or len(args) != 1 or type(args[0]) not in (int, float):
            return False
        func(self._factors[0], args[0])
        return True

    def _detached(self) -> "DenseWeight":
        if self._factors is None:
            return DenseWeight.of_values(self._values().detach())
        w_pivot, coeff, order = self._factors
        return DenseWeight.of_factors(w_pivot.detach(), coeff.detach(), order)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, DenseWeight):
            if func == _REQUIRES_GRAD:
                return first._needs_gradient
            if func == _IS_LEAF:
                return not first._needs_gradient
            if func == _GRAD:
                return None
            if func is Tensor.detach or func == _DATA:
                return first._detached()
            if func in _SHAPED:
                with torch._C.DisableTorchFunctionSubclass():
                    like = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=first.device)
                return func(like, *args[1:], **kwargs)
            if func in _SCALES and first._scale(func, args[1:], kwargs):
                return first
            if func in _REFUSED:
                raise WeightError(_READ_ONLY.format(call=_name(func)))
        return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no class to be called on
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Code below Python's functions, or that switched them off, gets here. It can no longer differentiate.
        return _read(func, args, kwargs or {})


def put_together(w_pivot: Tensor, coeff: Tensor, order: Tensor | None) -> Tensor:
    """The dense weight [out, in] of the factors w_pivot [r, in] and coeff [out - r, r], rows gathered by `order`."""
    rows = torch.cat((w_pivot, coeff @ w_pivot))
    return rows if order is None else rows[order]


def _read(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls `func` on values; what it returns is read-only too where it is a view of them."""
    storages: set[int] = set()

    def values(weight: DenseWeight) -> Tensor:
        dense = weight._values()
        storages.add(_storage(dense))
        return dense

    args, kwargs = pytree.tree_map_only(DenseWeight, values, (tuple(args), dict(kwargs)))
    with _RefuseWrites(storages, func):
        result = func(*args, **kwargs)
    return pytree.tree_map_only(
        Tensor, lambda each: DenseWeight.of_values(each) if _storage(each) in storages else each, result
    )


class _RefuseWrites(TorchDispatchMode):
    """Refuses every operation that writes, by its schema, to a tensor in one of `storages`."""

    def __init__(self, storages: set[int], func: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages, self.func = storages, func

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[place] if place < len(args) else kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(written):
                if isinstance(leaf, Tensor) and _storage(leaf) in self.storages:
                    raise WeightError(_READ_ONLY.format(call=_name(self.func)))
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")  # a property: data, grad
    return f"{owner}.{name}" if name in ("__set__", "__delete__") else f"{name}()"

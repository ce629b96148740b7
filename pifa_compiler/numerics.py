"""Numbers that do not depend on what the caller has set: precision of products, autocast, defaults, gradient modes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")

_PRECISIONS: tuple[Any, ...] = tuple(
    settings
    for backend in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn)
    for settings in (getattr(backend, kind, None) for kind in ("matmul", "conv", "rnn"))
    if hasattr(settings, "fp32_precision")
)
"""What may have float32 computed in TF32 or bfloat16."""

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def own_numerics() -> Iterator[None]:
    """Has float32 products be float32, autocast off, no gradients recorded, and tensors made as float32 on the CPU.

    Also a decorator. What the caller had set is set again at the end, whatever happens. All of these but the products'
    precision and the default dtype are set for this thread only.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(_full_precision())
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    each = [settings.fp32_precision for settings in _PRECISIONS]
    products = _older_switch(torch.get_float32_matmul_precision)
    convolutions = _older_switch(lambda: torch.backends.cudnn.allow_tf32)
    try:
        # The older switches first: they write to the newer ones, and torch refuses to work where both disagree.
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            _allow_tf32_in_convolutions(False)
        for settings in _PRECISIONS:
            settings.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            _allow_tf32_in_convolutions(convolutions)
        for settings, precision in zip(_PRECISIONS, each, strict=True):
            settings.fp32_precision = precision


def _allow_tf32_in_convolutions(allow: bool) -> None:
    # An assignment to `torch.backends.cudnn.allow_tf32` is refused after `torch.backends.disable_global_flags`.
    torch._C._set_cudnn_allow_tf32(allow)


def _older_switch(read: Callable[[], _Value]) -> _Value | None:
    """What one of torch's older switches says; None if the newer ones were set to something else, which outdoes it."""
    try:
        return read()
    except RuntimeError:  # what torch raises then, whoever asks
        return None

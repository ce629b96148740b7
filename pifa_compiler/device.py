"""The device that the command line computes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import DeviceError


def find_device(name: str | None = None) -> torch.device:
    """The device called `name`, "cpu", "cuda" or "cuda:N"; None is the first GPU, or the CPU where there is none.

    Others are refused, as the factorization is done in float64, which they lack.

    Raises:
        DeviceError: there is no such device here.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if found else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise DeviceError(f"unknown device {name!r}; give cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= found:
        raise DeviceError(f"there is no device {name!r}: torch finds {found} GPUs here; give cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """As its maker calls it: "NVIDIA H100 80GB HBM3"; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a device."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    """Says what to do where the device's memory does not hold what is computed on it.

    Raises:
        DeviceError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(".")[0]
        raise DeviceError(
            f"{device_name(device)} has too little memory ({reason}); pass --device cpu, or a smaller --seqlen"
        ) from error

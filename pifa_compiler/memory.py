"""How much memory there is, is used, and is meant by "8GiB"."""

import ctypes
import math
import os
import re

from torch import Tensor

from .errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_LARGEST = 2**63  # what an address can tell apart
_WILL_NEED = 3  # MADV_WILLNEED, the same number on Linux and macOS
_READ_AHEAD = 128 << 10  # Linux reads no more at once than a disk's read_ahead_kb, mostly 128
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes from "8GiB", "500 MB", "4G" or a number.

    Raises:
        ConfigError: it is no size.
    """
    found = _SIZE.fullmatch(str(text))
    size = 0.0 if found is None else float(found[1]) * _UNITS[(found[2] or "").lower()]
    if not 1 <= size < _LARGEST:
        raise ConfigError(f"wanted a size such as 8GiB, 500MB or a number of bytes, got {str(text)!r:.80}")
    return int(size)


def format_bytes(count: float, *, up: bool = False) -> str:
    """A size for people: "3.2 GiB"; with `up` not less than `count`."""
    unit, *larger = ("bytes", "KiB", "MiB", "GiB", "TiB")
    while count >= 1024 and larger:
        count, unit = count / 1024, larger.pop(0)
    if unit == "bytes":
        return f"{count:.0f} {unit}"
    return f"{math.ceil(10 * count) / 10 if up else count:.1f} {unit}"


def resident_bytes() -> int:
    """What this process holds of memory now, mapped files included; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def trim_heap() -> None:
    """Has the C library give memory that was freed back to the system; nothing where it is not glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # no such function; no library by no name, as on Windows
        return


def read_ahead(mapped: Tensor) -> None:
    """Asks the system to read a tensor that lies in a mapped file, and does not wait; a hint, not everywhere taken."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = mapped.data_ptr() // page * page
    end = mapped.data_ptr() + mapped.numel() * mapped.element_size()
    try:
        madvise = ctypes.CDLL(None).madvise
        for at in range(start, end, _READ_AHEAD):
            madvise(ctypes.c_void_p(at), ctypes.c_size_t(min(end - at, _READ_AHEAD)), _WILL_NEED)
    except (AttributeError, OSError, TypeError):  # as in `trim_heap`
        return

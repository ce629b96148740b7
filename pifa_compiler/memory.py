"""How much memory there is, is used, and is meant by "8GiB"."""

import os
import re

from .errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes from "8GiB", "500 MB", "4G" or a number.

    Raises:
        ConfigError: it is no size.
    """
    found = _SIZE.fullmatch(str(text))
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"wanted a size such as 8GiB, 500MB or a number of bytes, got {text!r}")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def format_bytes(count: float) -> str:
    """A size for people: "3.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def resident_bytes() -> int:
    """What this process holds of memory now, mapped files included; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

"""Where native code is kept that was built for this machine."""

import hashlib
import os
from pathlib import Path


def folder_for(key: str) -> Path:
    """The folder of what is built from `key`, under ~/.cache/pifa-compiler (or $XDG_CACHE_HOME/pifa-compiler)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pifa-compiler"
    return cache / hashlib.sha256(key.encode()).hexdigest()[:24]

"""Where this package keeps what it has built or fetched."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/pifa-compiler, or $XDG_CACHE_HOME/pifa-compiler."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pifa-compiler"


def folder_for(key: str) -> Path:
    """The folder in it of native code that is built from `key`, for this machine."""
    return cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:24]

"""Where this package keeps what it has built or fetched."""

import hashlib
from pathlib import Path

from platformdirs import user_cache_path

from .errors import CacheError


def cache_folder() -> Path:
    """The user's cache folder for this package: ~/.cache/pifa-compiler on Linux, or $XDG_CACHE_HOME/pifa-compiler.

    Raises:
        CacheError: the user has no home.
    """
    try:
        folder = user_cache_path("pifa-compiler", appauthor=False)
    except RuntimeError:
        folder = Path("~")
    if not folder.is_absolute():  # releases of platformdirs differ: some leave ~ as it is
        raise CacheError("there is no place for a cache: the user has no home; set XDG_CACHE_HOME to a folder")
    return folder


def folder_for(key: str) -> Path:
    """The folder in it of native code that is built from `key`, for this machine."""
    return cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:24]

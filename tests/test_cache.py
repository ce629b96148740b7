"""Where things are kept: where the platform keeps caches, or nowhere with an error that says so."""

import pwd
from pathlib import Path

import pytest

from pifa_compiler import cache
from pifa_compiler.errors import CacheError, PifaError


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/pifa-compiler")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_folder() == Path("/home/someone/.cache/pifa-compiler")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("/home/someone/.cache/pifa-compiler")


def test_without_a_home_it_takes_the_environment_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/pifa-compiler")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(CacheError, match="set XDG_CACHE_HOME") as refused:
        cache.cache_folder()
    assert isinstance(refused.value, PifaError)
    assert isinstance(refused.value, OSError)  # native code that has no place is a reason, not a failure


def test_of_platformdirs_that_leave_the_tilde_no_folder_of_that_name_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "user_cache_path", lambda *_, **__: Path("~/.cache/pifa-compiler"))
    with pytest.raises(CacheError):
        cache.cache_folder()

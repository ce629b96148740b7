import ctypes
import os
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pifa_compiler.errors import ConfigError
from pifa_compiler.memory import format_bytes, parse_bytes, read_ahead, resident_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("4G", 4 * 10**9), (" 1.5kib ", 1536), (4096, 4096), ("7b", 7)],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "8 apples", "-1GiB", "0", "0.4", "1e9", "nan", "9" * 400, "8192 TiB" * 2, "9" * 20]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="wanted a size such as 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text", "up"),
    [
        (0, "0 bytes", "0 bytes"),
        (1023, "1023 bytes", "1023 bytes"),
        (1025, "1.0 KiB", "1.1 KiB"),
        (3.21 * 2**30, "3.2 GiB", "3.3 GiB"),
        (5 * 2**50, "5120.0 TiB", "5120.0 TiB"),
    ],
)
def test_sizes_are_written_and_rounded_up_where_asked(count, text, up):
    assert format_bytes(count) == text
    assert format_bytes(count, up=True) == up
    assert count < 1024 or parse_bytes(up) >= count


def test_a_process_holds_something():
    held = resident_bytes()
    assert held == 0 or held > 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="mincore tells what is in the system's cache")
def test_what_is_read_ahead_comes_into_the_cache(tmp_path):
    size, page = 1 << 25, os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(size // 4)}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with safe_open(path, "pt") as tensors:
        weight = tensors.get_tensor("weight")

        def resident() -> int:
            start = weight.data_ptr() // page * page
            pages = (ctypes.c_ubyte * (size // page))()
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
            return sum(each & 1 for each in pages)

        if resident() == size // page:
            pytest.skip("the system has read all of it by itself")
        read_ahead(weight)
        deadline = time.monotonic() + 30
        while resident() < size // page:
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.01)

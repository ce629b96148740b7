"""Other tests of native code skip where it cannot be built. Where there is a compiler it must be: these fail then."""

import shutil
from pathlib import Path

import pytest
from pifa_compiler.export import native_scatter
from pifa_compiler.kernels import linear_cpu


def none_of(*compilers: str) -> bool:
    return not any(shutil.which(compiler) for compiler in compilers)


@pytest.mark.skipif(none_of("g++", "clang++", "c++"), reason="needs a C++ compiler: g++, clang++ or c++")
def test_the_native_linear_is_built():
    assert linear_cpu.load() is None


@pytest.mark.skipif(none_of("cc", "gcc", "clang"), reason="needs a C compiler: cc, gcc or clang")
def test_the_native_scatter_is_built():
    assert isinstance(native_scatter.build(), Path)

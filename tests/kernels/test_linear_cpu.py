import ctypes
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pifa_compiler.kernels import linear_cpu, linear_ref
from torch import Tensor
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.cpu_vec_isa import pick_vec_isa
from vector_widths import WIDTHS, built_for

from pifa_compiler.errors import CacheError

pytestmark = pytest.mark.skipif(linear_cpu.load() is not None, reason=str(linear_cpu.load()))

native = torch.ops.pifa.linear_cpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w_pivot, coeff = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out - rank, rank) / rank**0.5
    return w_pivot.to(dtype), coeff.to(dtype)


def merge_order(d_out: int, rank: int) -> Tensor:
    """The order of pivots and others that are each ascending, as `PifaFactors` has it."""
    rows = torch.randperm(d_out)
    return torch.argsort(torch.cat((rows[:rank].sort().values, rows[rank:].sort().values)))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def largest_error(x: Tensor, w_pivot: Tensor, coeff: Tensor, order: Tensor | None) -> Tensor:
    """What rounding may do to every result, in whatever order its terms are summed.

    A sum of n products in float32 is off by at most n u sum |a b|, u = 2^-24 (Higham, section 3.1), here one sum within
    another; half precisions round y_p (beyond few tokens) and y once each.
    """
    size = linear_ref(x.double().abs(), w_pivot.double().abs(), coeff.double().abs(), order)
    terms = w_pivot.shape[1] + w_pivot.shape[0] + 2
    half = x.dtype is not torch.float32
    unit = 1.01 * terms * 2**-24 + (2.01 * torch.finfo(x.dtype).eps / 2 if half else 0)
    return unit * size + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # and below it by a step


def inside_nan(values: Tensor) -> Tensor:
    """The same values, contiguous, with NaN before and behind them in memory."""
    storage = torch.full((values.numel() + 256,), float("nan"), dtype=values.dtype)
    storage[128 : 128 + values.numel()] = values.flatten()
    return storage[128 : 128 + values.numel()].view(values.shape)


@pytest.fixture(params=WIDTHS)
def operators(request: pytest.FixtureRequest) -> Any:
    """The namespace of operators that are built for vectors of every width that the machine has."""
    if request.param is None:
        return torch.ops.pifa
    return built_for(request.param, linear_cpu.SOURCE, linear_cpu.SCHEMAS)[1]


@pytest.mark.usefixtures("_one_and_two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_in", "d_out", "rank"), [(64, 128, 32), (33, 65, 17), (100, 70, 70), (31, 96, 1), (5, 7, 3)]
)
def test_values_against_float64(operators: Any, d_in: int, d_out: int, rank: int, dtype: torch.dtype):
    orders = (None, merge_order(d_out, rank), torch.randperm(d_out))
    w_pivot, coeff = operands(d_in, d_out, rank, dtype)
    for order, tokens in itertools.product(orders, (1, 2, 3, 4, 7, 8, 9, 16, 17, 50)):
        x = torch.randn(tokens, d_in).to(dtype)
        y = operators.linear_cpu(inside_nan(x), inside_nan(w_pivot), inside_nan(coeff), order)
        assert y.dtype is dtype
        wanted = linear_ref(x.double(), w_pivot.double(), coeff.double(), order)
        assert ((y - wanted).abs() <= largest_error(x, w_pivot, coeff, order)).all(), tokens


@pytest.mark.usefixtures("_one_and_two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 6, 40, 300], ids=["one", "few", "apart", "joined"])
def test_siblings_against_float64(operators: Any, tokens: int, dtype: torch.dtype):
    x = torch.randn(tokens, 33).to(dtype)
    weights = [operands(33, d_out, rank, dtype) for d_out, rank in ((65, 17), (31, 9), (20, 20))]
    orders = [merge_order(65, 17), None, torch.randperm(20)]
    results = operators.linear_siblings_cpu(
        inside_nan(x), [inside_nan(w) for w, _ in weights], [inside_nan(coeff) for _, coeff in weights], orders
    )
    for y, (w_pivot, coeff), order in zip(results, weights, orders, strict=True):
        wanted = linear_ref(x.double(), w_pivot.double(), coeff.double(), order)
        assert y.dtype is dtype
        assert ((y - wanted).abs() <= largest_error(x, w_pivot, coeff, order)).all()


@pytest.mark.parametrize("tokens", [3, 40])
def test_leading_dimensions_strides_and_empty_inputs(tokens: int):
    w_pivot, coeff = operands(24, 40, 10, torch.float32)
    order = merge_order(40, 10)
    x = torch.randn(24, 2, tokens).permute(1, 2, 0)
    y = native(x, w_pivot.t().contiguous().t(), coeff, order)
    assert y.shape == (2, tokens, 40)
    wanted = linear_ref(x.double(), w_pivot.double(), coeff.double(), order)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert native(x[:, :0], w_pivot, coeff, order).shape == (2, 0, 40)
    assert native(x[0, 0], w_pivot, coeff, order).shape == (40,)


def test_few_tokens_keep_y_p_in_float32():
    torch.manual_seed(0)
    w_pivot, coeff = operands(512, 512, 256, torch.bfloat16)
    x = torch.randn(64, 512).bfloat16()
    wanted = linear_ref(x.double(), w_pivot.double(), coeff.double())
    few = torch.cat([native(part, w_pivot, coeff, None) for part in x.split(8)])
    rounded_once = relative_error(wanted.bfloat16(), wanted)
    assert relative_error(few, wanted) < 1.05 * rounded_once < relative_error(native(x, w_pivot, coeff, None), wanted)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(40, 23)}, "wanted x"),
        ({"coeff": torch.randn(30, 9)}, "wanted coeff"),
        ({"order": torch.arange(40).int()}, "order must be 40 contiguous int64"),
        ({"order": torch.arange(39)}, "order must be 40 contiguous int64"),
        ({"order": torch.arange(40) + 1}, "is no stored row"),
        ({"coeff": torch.randn(30, 10).half()}, "one dtype"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Tensor], message: str, tokens: int):
    w_pivot, coeff = operands(24, 40, 10, torch.float32)
    arguments = {"x": torch.randn(40, 24), "w_pivot": w_pivot, "coeff": coeff, "order": merge_order(40, 10)} | change
    arguments["x"] = arguments["x"][:tokens]
    with pytest.raises((RuntimeError, IndexError), match=message):
        native(**arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_operator_is_sound_and_compiles(dynamic: bool):
    w_pivot, coeff = operands(24, 40, 10, torch.float32)
    order = merge_order(40, 10)
    for tokens in (2, 40):
        torch.library.opcheck(native, (torch.randn(tokens, 24), w_pivot, coeff, order))
    compiled = torch.compile(lambda x: native(x, w_pivot, coeff, order).relu(), dynamic=dynamic)
    for tokens in (2, 5, 40):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x), native(x, w_pivot, coeff, order).relu())


def test_without_a_compiler_the_reason_is_told(tmp_path: Path):
    code = (
        "import torch._inductor.config as config; config.cpp.cxx = ('/no/such/compiler',)\n"
        "from pifa_compiler.kernels import linear_cpu; print(linear_cpu.load())"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.stdout.startswith("native code could not be built")
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def _small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds take a moment and go to an empty cache."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(linear_cpu, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


@pytest.mark.usefixtures("_small_source")
@pytest.mark.parametrize("left", [0, 5000], ids=["empty", "cut short"])
def test_a_damaged_library_is_built_again(left: int):
    library = linear_cpu.build(pick_vec_isa())
    assert linear_cpu.build(pick_vec_isa()) == library
    os.truncate(library, left)
    again = linear_cpu.build(pick_vec_isa())
    assert answer(again) == 42
    assert linear_cpu.build(pick_vec_isa()) == again


@pytest.mark.usefixtures("_small_source")
def test_several_may_build_at_once(monkeypatch: pytest.MonkeyPatch):
    everyone, build = threading.Barrier(3, timeout=60), CppBuilder.build

    def build_at_once(self: CppBuilder) -> None:
        everyone.wait()
        build(self)
        everyone.wait()

    monkeypatch.setattr(CppBuilder, "build", build_at_once)
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(linear_cpu.build, [pick_vec_isa()] * 3))
    assert [answer(library) for library in built] == [42] * 3
    assert linear_cpu.build(pick_vec_isa()) in built  # which does not wait: it finds one


def test_a_user_without_a_home_is_told_the_reason(monkeypatch: pytest.MonkeyPatch):
    def no_home(key: str) -> Path:
        raise CacheError("there is no place for a cache")

    monkeypatch.setattr(linear_cpu, "folder_for", no_home)
    assert linear_cpu.load.__wrapped__() == "native code could not be built: there is no place for a cache"

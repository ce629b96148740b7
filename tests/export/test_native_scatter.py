import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from pifa_compiler.export import native_scatter, onnx_session, session

from pifa_compiler.errors import ExportError

LIBRARY = native_scatter.build()
needs_native = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))


def scatter_file(path: Path, kind: int, function: bool = False) -> Path:
    """y = PifaScatter(y_p, y_n, order), sizes free, with or without a function of that name."""
    node = helper.make_node("PifaScatter", ["y_p", "y_n", "order"], ["y"], domain="ai.pifa")
    inputs = [helper.make_tensor_value_info(name, kind, ["rows", None]) for name in ("y_p", "y_n")]
    order = helper.make_tensor_value_info("order", TensorProto.INT64, [None])
    graph = helper.make_graph([node], "g", [*inputs, order], [helper.make_tensor_value_info("y", kind, None)])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("ai.pifa", 1)]
    # A body that is plainly wrong: whoever runs it is found out.
    wrong = helper.make_function(
        "ai.pifa", "PifaScatter", ["y_p", "y_n", "order"], ["y"], [helper.make_node("Neg", ["y_p"], ["y"])], imports
    )
    model = helper.make_model(graph, opset_imports=imports, functions=[wrong] if function else [], ir_version=10)
    onnx.save(model, path)
    return path


def merge_order(out: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    """The order of pivots and others that are each ascending, as PIFA layers have it."""
    rows = rng.permutation(out)
    return np.argsort(np.concatenate((np.sort(rows[:rank]), np.sort(rows[rank:]))))


@needs_native
@pytest.mark.parametrize("any_order", [False, True], ids=["merge", "any"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TensorProto.DOUBLE, np.float64), (TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)],
    ids=["fp64", "fp32", "fp16"],
)
@pytest.mark.parametrize(
    ("rows", "rank", "out"), [(1, 1, 2), (3, 17, 33), (2, 64, 64), (0, 4, 9), (5, 31, 95), (700, 130, 257)]
)
def test_rows_are_put_where_order_says(
    tmp_path: Path, rows: int, rank: int, out: int, kind: int, dtype: type, any_order: bool
) -> None:
    rng = np.random.default_rng(0)
    y_p, y_n = rng.standard_normal((rows, rank)).astype(dtype), rng.standard_normal((rows, out - rank)).astype(dtype)
    order = rng.permutation(out) if any_order else merge_order(out, rank, rng)
    opened = session(scatter_file(tmp_path / "s.onnx", kind), threads=2, strict=True)
    (y,) = opened.run(None, {"y_p": y_p, "y_n": y_n, "order": order})
    assert np.array_equal(y, np.concatenate((y_p, y_n), axis=1)[:, order])


@needs_native
def test_nothing_is_written_outside_of_the_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y_p, y_n = rng.standard_normal((700, 130)).astype(np.float32), rng.standard_normal((700, 127)).astype(np.float32)
    opened = session(scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT), strict=True)
    around = np.full((900, 257), np.nan, np.float32)
    binding = opened.io_binding()
    for name, value in (("y_p", y_p), ("y_n", y_n), ("order", merge_order(257, 130, rng))):
        binding.bind_cpu_input(name, value)
    binding.bind_output("y", "cpu", 0, np.float32, (700, 257), around[100:].ctypes.data)
    opened.run_with_iobinding(binding)
    assert np.isnan(around[:100]).all()
    assert not np.isnan(around[100:800]).any()
    assert np.isnan(around[800:]).all()


@needs_native
def test_the_native_operator_wins_over_a_function_of_its_name(tmp_path: Path) -> None:
    file = scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True)
    feed = {"y_p": np.ones((1, 1), np.float32), "y_n": np.zeros((1, 1), np.float32), "order": np.array([1, 0])}
    assert session(file, strict=True).run(None, feed)[0].tolist() == [[0.0, 1.0]]
    assert session(file, native=False).run(None, feed)[0].tolist() == [[-1.0]]


@needs_native
@pytest.mark.parametrize(
    ("order", "y_n"), [([0, 2], (1, 1)), ([-1, 0], (1, 1)), ([0, 1, 2], (1, 1)), ([0, 1], (2, 1)), ([0, 1], (1, 1, 1))]
)
def test_operands_that_do_not_fit_are_refused(tmp_path: Path, order: list[int], y_n: tuple[int, ...]) -> None:
    opened = session(scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT), strict=True)
    feed = {"y_p": np.ones((1, 1), np.float32), "y_n": np.ones(y_n, np.float32), "order": np.array(order)}
    with pytest.raises(Exception, match=r"PifaScatter: |Invalid rank"):
        opened.run(None, feed)


@needs_native
def test_a_session_says_what_it_loaded(tmp_path: Path) -> None:
    report: list[onnx_session.NativeRecord] = []
    session(scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True), report=report)
    assert report == [onnx_session.NativeRecord(str(LIBRARY), None)]


def test_without_a_compiler_the_functions_run_and_a_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(onnx_session, "build", native_scatter.build.__wrapped__)
    file = scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True)
    report: list[onnx_session.NativeRecord] = []
    with pytest.warns(UserWarning, match="there is no C compiler"):
        opened = session(file, report=report)
    assert opened.run(None, {"y_p": [[1.0]], "y_n": [[0.0]], "order": [0, 1]})[0].tolist() == [[-1.0]]
    assert report[0].library is None
    assert "no C compiler" in str(report[0].reason)
    with pytest.raises(ExportError, match="no C compiler"):
        session(file, strict=True)


def test_a_compiler_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "could not build pifa_scatter.c" in str(native_scatter.build.__wrapped__())
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


@needs_native
@pytest.mark.parametrize("left", [0, 5000], ids=["empty", "cut short"])
def test_a_damaged_library_is_built_again(left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = native_scatter.build.__wrapped__
    library, content = build(), Path(LIBRARY).read_bytes()
    assert build() == library
    os.truncate(library, left)
    again = build()
    assert again.read_bytes() == content
    assert build() == again


def test_a_provider_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    file = scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True)
    with pytest.raises(ExportError, match=r"no NoSuchExecutionProvider.*onnxruntime-gpu"):
        session(file, providers=["NoSuchExecutionProvider", "CPUExecutionProvider"])


def test_a_silent_fall_back_to_the_cpu_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu lists CUDA also where its libraries are missing, and then starts without it."""
    file = scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True)
    real, seen = onnxruntime.InferenceSession, []

    def without_cuda(path: str, options: onnxruntime.SessionOptions, providers: list[str]) -> object:
        seen.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    monkeypatch.setattr(onnx_session, "build", lambda: pytest.fail("the CPU's library is not for a CUDA session"))
    with pytest.raises(ExportError, match="CUDAExecutionProvider could not be started"):
        session(file, providers=listed)
    assert seen == [listed]


def test_two_runtimes_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scatter_file(tmp_path / "s.onnx", TensorProto.FLOAT, function=True)
    monkeypatch.setattr(onnx_session, "distributions", lambda name: [SimpleNamespace(name=name)])
    with pytest.raises(ExportError, match="both installed and break each other"):
        session(file)


def test_what_onnxruntime_cannot_open_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot open"):
        session(tmp_path / "bad.onnx", native=False)
    with pytest.raises(ExportError, match="there is no file"):
        session(tmp_path / "none.onnx")

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from fuzz import fuzz_onnx
from onnx import helper, numpy_helper
from onnx_models import low_rank_file, matrix, node_types, save_graph
from pifa_compiler.export import rewrite_onnx, session, to_onnx
from torch import nn

from pifa_compiler.errors import ExportError

RANDOM = np.random.default_rng(0)
SHAPES = (("V", (24, 8)), ("U", (8, 32)))


def check_lossless(source: Path, target: Path, d_in: int) -> None:
    """Both files give the same numbers, stock and native, up to the rounding of float32 sums of some 30 terms."""
    x = np.random.default_rng(0).standard_normal((5, d_in)).astype(np.float32)
    before = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    wanted = before.run(None, {before.get_inputs()[0].name: x})
    for native in (False, True):
        got = session(target, native=native).run(None, {before.get_inputs()[0].name: x})
        for result, value in zip(got, wanted, strict=True):
            np.testing.assert_allclose(result, value, rtol=0, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_pair_with_a_bias_becomes_one_layer(tmp_path: Path, external: bool) -> None:
    source = low_rank_file(tmp_path / "in.onnx", external=external)
    result = rewrite_onnx(source, tmp_path / "out.onnx")
    assert node_types(tmp_path / "out.onnx") == {"PifaLinear": 1, "Add": 1}
    assert [(pair.shape, pair.rank, pair.skipped) for pair in result.pairs] == [((32, 24), 8, None)]
    assert (result.stored_before, result.stored_after) == (8 * (24 + 32), 8 * (24 + 32 - 8) + 8)
    assert (tmp_path / "out.onnx.data").exists() == external
    check_lossless(source, tmp_path / "out.onnx", 24)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kinds", [("Gemm", "Gemm"), ("MatMul", "Gemm"), ("Gemm", "MatMul")], ids="-".join)
def test_gemm_in_every_spelling_becomes_one_layer(
    tmp_path: Path, kinds: tuple[str, str], bias: bool, transposed: int
) -> None:
    first = {"transB": transposed} if kinds[0] == "Gemm" else {}
    second = {"transB": transposed} if kinds[1] == "Gemm" else {}
    with_bias = bias and kinds[1] == "Gemm"
    nodes = [
        helper.make_node(kinds[0], ["x", "V"], ["a"], **first),
        helper.make_node(kinds[1], ["a", "U", *(["c"] if with_bias else [])], ["y"], **second),
    ]
    v = matrix("V", *((8, 24) if first.get("transB") else (24, 8)))
    u = matrix("U", *((32, 8) if second.get("transB") else (8, 32)))
    source = save_graph(tmp_path / "in.onnx", nodes, [v, u, *([matrix("c", 32)] if with_bias else [])], 24, {"y": 32})
    rewrite_onnx(source, tmp_path / "out.onnx")
    assert node_types(tmp_path / "out.onnx") == {"PifaLinear": 1} | ({"Add": 1} if with_bias else {})
    check_lossless(source, tmp_path / "out.onnx", 24)


def test_a_shared_first_product_becomes_one_layer_and_a_split(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "V"], ["a"]),
        helper.make_node("MatMul", ["a", "Uq"], ["q"]),
        helper.make_node("Gemm", ["a", "Uk", "ck"], ["k"]),
        helper.make_node("MatMul", ["a", "Uv"], ["v"]),
    ]
    constants = [matrix("V", 24, 8), matrix("Uq", 8, 16), matrix("Uk", 8, 12), matrix("ck", 12), matrix("Uv", 8, 5)]
    source = save_graph(tmp_path / "in.onnx", nodes, constants, 24, {"q": 16, "k": 12, "v": 5})
    result = rewrite_onnx(source, tmp_path / "out.onnx")
    assert node_types(tmp_path / "out.onnx") == {"PifaLinear": 1, "Split": 1, "Add": 1}
    assert [pair.shape for pair in result.pairs] == [(16, 24), (12, 24), (5, 24)]
    assert result.stored_after < result.stored_before == 8 * (24 + 33)
    check_lossless(source, tmp_path / "out.onnx", 24)


def test_what_pytorch_exports_is_rewritten(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(24, 8, bias=False), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    to_onnx(model, tmp_path / "in.onnx", torch.randn(2, 24), dynamic_shapes=({0: torch.export.Dim("n")},))
    result = rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [pair.rank for pair in result.pairs if pair.skipped is None] == [8]
    check_lossless(tmp_path / "in.onnx", tmp_path / "out.onnx", 24)


def test_a_weight_is_found_behind_a_transpose_in_an_old_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["V"], ["Vt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "Vt"], ["a"]),
        helper.make_node("Transpose", ["U"], ["Ut"]),
        helper.make_node("MatMul", ["a", "Ut"], ["y"]),
    ]
    source = save_graph(tmp_path / "in.onnx", nodes, [matrix("V", 8, 24), matrix("U", 32, 8)], 24, {"y": 32}, opset=14)
    model = onnx.load(source)
    model.ir_version = 7
    onnx.save(model, source)
    rewrite_onnx(source, tmp_path / "out.onnx")
    assert node_types(tmp_path / "out.onnx") == {"PifaLinear": 1}
    names = {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert names == {"U.w_pivot", "U.coeff", "U.order"}
    check_lossless(source, tmp_path / "out.onnx", 24)


NEAR_MISSES = {
    "there is a bias between": (
        [helper.make_node("Gemm", ["x", "V", "c"], ["a"]), helper.make_node("MatMul", ["a", "U"], ["y"])],
        [matrix("V", 24, 8), matrix("c", 8), matrix("U", 8, 32)],
        {"y": 32},
    ),
    "is an output of the graph": (
        [helper.make_node("MatMul", ["x", "V"], ["a"]), helper.make_node("MatMul", ["a", "U"], ["y"])],
        [matrix("V", 24, 8), matrix("U", 8, 32)],
        {"y": 32, "a": 8},
    ),
    "has another user": (
        [
            helper.make_node("MatMul", ["x", "V"], ["a"]),
            helper.make_node("MatMul", ["a", "U"], ["y"]),
            helper.make_node("Relu", ["a"], ["z"]),
        ],
        [matrix("V", 24, 8), matrix("U", 8, 32)],
        {"y": 32, "z": 8},
    ),
    "not low-rank: width 30": (
        [helper.make_node("MatMul", ["x", "V"], ["a"]), helper.make_node("MatMul", ["a", "U"], ["y"])],
        [matrix("V", 24, 30), matrix("U", 30, 32)],
        {"y": 32},
    ),
    "no product of constants feeds another one": (
        [helper.make_node("MatMul", ["x", "V"], ["a"]), helper.make_node("Relu", ["a"], ["y"])],
        [matrix("V", 24, 8)],
        {"y": 8},
    ),
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_a_near_miss_is_left_with_its_reason_and_nothing_is_written(tmp_path: Path, reason: str) -> None:
    nodes, constants, outputs = NEAR_MISSES[reason]
    source = save_graph(tmp_path / "in.onnx", nodes, constants, 24, outputs)
    with pytest.raises(ExportError, match=f"nothing to rewrite, nothing written: .*{reason}"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [child.name for child in tmp_path.iterdir()] == ["in.onnx"]


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_no_weight_of_a_near_miss_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    nodes, constants, outputs = NEAR_MISSES[reason]
    source = save_graph(tmp_path / "in.onnx", nodes, constants, 24, outputs, external=True)
    monkeypatch.setattr(onnx_ir.ExternalTensor, "numpy", lambda tensor: pytest.fail(f"{tensor.name} was read"))
    with pytest.raises(ExportError, match=reason):
        rewrite_onnx(source, tmp_path / "out.onnx")


def test_each_weight_of_a_pair_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, numpy = [], onnx_ir.ExternalTensor.numpy
    monkeypatch.setattr(onnx_ir.ExternalTensor, "numpy", lambda tensor: read.append(tensor.name) or numpy(tensor))
    rewrite_onnx(low_rank_file(tmp_path / "in.onnx", external=True), tmp_path / "out.onnx")
    assert sorted(name for name in read if name in "UV") == ["U", "V"]


def test_a_second_run_finds_nothing(tmp_path: Path) -> None:
    rewrite_onnx(low_rank_file(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    with pytest.raises(ExportError, match="holds PIFA layers already: nothing to rewrite"):
        rewrite_onnx(tmp_path / "out.onnx", tmp_path / "again.onnx")


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    source = low_rank_file(tmp_path / "inner" / "in.onnx", external=True)
    (tmp_path / "inner" / "in.onnx.data").rename(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret")):
        model = onnx.load(source, load_external_data=False)
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        source.write_bytes(model.SerializeToString())
        with pytest.raises(ExportError, match="outside the model's own folder"):
            rewrite_onnx(source, tmp_path / "out.onnx")
    (tmp_path / "inner" / "in.onnx.data").symlink_to(tmp_path / "secret")
    low_rank_link = onnx.load(source, load_external_data=False)
    for tensor in low_rank_link.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "in.onnx.data"
    source.write_bytes(low_rank_link.SerializeToString())
    with pytest.raises(ExportError, match="outside the model's own folder"):
        rewrite_onnx(source, tmp_path / "out.onnx")


@pytest.mark.parametrize("offset", ["-8", "far"])
def test_external_data_at_no_valid_place_is_refused(tmp_path: Path, offset: str) -> None:
    source = low_rank_file(tmp_path / "in.onnx", external=True)
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data.add(key="offset", value=offset)
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="no valid place"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = low_rank_file(tmp_path / "in.onnx").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(ExportError, match="truncated or not an ONNX file"):
            rewrite_onnx(tmp_path / "cut.onnx", tmp_path / "out.onnx")
    source = low_rank_file(tmp_path / "external.onnx", external=True)
    data = tmp_path / "external.onnx.data"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ExportError, match=r"data file 'external.onnx.data' is truncated"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    data.unlink()
    with pytest.raises(ExportError, match=r"data file 'external.onnx.data' is missing"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def change_tensor(source: Path, name: str, **fields: object) -> None:
    model = onnx.load(source, load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    for field, value in fields.items():
        if isinstance(value, list):
            tensor.ClearField(field)
            getattr(tensor, field).extend(value)
        else:
            setattr(tensor, field, value)
    source.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dims": [8, 2**31]}, "68719476736"),  # 64 GiB
        ({"dims": [8, -32]}, "no shape or dtype"),
        ({"dims": [8, 31]}, "992"),
        ({"data_type": 999}, "of no known dtype"),
        ({"data_type": 0}, "no shape or dtype"),
    ],
)
def test_data_that_does_not_fit_its_dimensions_is_refused(
    tmp_path: Path, fields: dict[str, object], words: str, external: bool
) -> None:
    source = low_rank_file(tmp_path / "in.onnx", external=external)
    change_tensor(source, "U", **fields)
    with pytest.raises(ExportError, match=f"'U'.*{words}"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def test_two_constants_of_one_name_are_refused(tmp_path: Path) -> None:
    source = low_rank_file(tmp_path / "in.onnx")
    model = onnx.load(source)
    model.graph.initializer.append(matrix("V", 24, 8))
    source.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="two constants are called 'V'"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def file_of(path: Path, dtype: type, scale: float) -> Path:
    """y = x V U of a dtype other than float32, the weights times `scale`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [numpy_helper.from_array(RANDOM.standard_normal(s).astype(dtype) * dtype(scale), n) for n, s in SHAPES]
    nodes = [helper.make_node("MatMul", ["x", "V"], ["a"]), helper.make_node("MatMul", ["a", "U"], ["y"])]
    values = [helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 24), ("y", 32))]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_file_in_float64_is_rewritten_and_opened_with_the_native_operator(tmp_path: Path) -> None:
    source, x = file_of(tmp_path / "in.onnx", np.float64, 1), RANDOM.standard_normal((5, 24))
    rewrite_onnx(source, tmp_path / "out.onnx")
    (wanted,) = session(source).run(None, {"x": x})
    for native in (False, True):
        (got,) = session(tmp_path / "out.onnx", native=native).run(None, {"x": x})
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())  # sums in another order


@pytest.mark.parametrize("scale", [300, 1e-4], ids=["overflow", "underflow"])
def test_a_pair_whose_product_does_not_fit_into_its_dtype_stays(tmp_path: Path, scale: float) -> None:
    source = file_of(tmp_path / "in.onnx", np.float16, scale)
    with pytest.raises(ExportError, match=r"nothing written: .*do not fit into torch.float16"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def test_damaged_files_are_rewritten_or_refused(tmp_path: Path) -> None:
    # A dtype that does not exist, names that are no text, in the graph and of a data file, a number of 1e38.
    for first, count in ((0, 20), (616, 1), (709, 1), (1229, 1), (2017, 1), (21347, 1)):
        (folder := tmp_path / str(first)).mkdir()
        outcomes, wrong = fuzz_onnx.run(folder, range(first, first + count))
        assert wrong == []
        assert outcomes.total() == count


@pytest.mark.slow
def test_thousands_of_damaged_files_are_rewritten_or_refused(tmp_path: Path) -> None:
    outcomes, wrong = fuzz_onnx.run(tmp_path, range(10_000, 12_000))
    assert wrong == []
    assert min(outcomes["rewritten"], outcomes["refused"]) > 200  # both are tried


def test_paths_and_opsets_that_do_not_do_are_refused(tmp_path: Path) -> None:
    source = low_rank_file(tmp_path / "in.onnx")
    with pytest.raises(ExportError, match="exists already"):
        rewrite_onnx(source, source)
    with pytest.raises(ExportError, match="cannot be rewritten in its own place"):
        rewrite_onnx(source, source, overwrite=True)
    with pytest.raises(ExportError, match="there is no file"):
        rewrite_onnx(tmp_path / "none.onnx", tmp_path / "out.onnx")
    old = low_rank_file(tmp_path / "old.onnx", opset=13)
    with pytest.raises(ExportError, match="opset 13, too old"):
        rewrite_onnx(old, tmp_path / "out.onnx")

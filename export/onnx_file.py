"""ONNX files on disk: where one may be written, how it is put there whole, and how one from elsewhere is read.

A file is written into a folder beside its place, checked there, and moved: `model.onnx` and, with external data,
`model.onnx.data`.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..drafts import delete_abandoned
from ..errors import ExportError
from ..files import check_files, expand_home, resolve

if TYPE_CHECKING:
    import onnx

DATA_SUFFIX = ".data"


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The file to write, without links; refuses what could not or should not be written, before long work.

    Raises:
        ExportError: it exists and `overwrite` is not set, is a folder, has no suffix .onnx, or cannot be written there.
    """
    final = resolve(path, ExportError)
    if final.suffix != ".onnx":
        raise ExportError(f"an ONNX file is named *.onnx, got {str(path)!r}; add the suffix")
    data = data_file(final)
    check_files(path, final, data, refusal=ExportError)
    for file in (final, data):
        if file.exists() and not overwrite:
            raise ExportError(f"{file} exists already; choose another name, or say overwrite (--force)")
    return final


def data_file(path: Path) -> Path:
    """Where the weights of the model at `path` lie if they are external."""
    return path.with_name(path.name + DATA_SUFFIX)


def check_model(path: Path) -> None:
    """`onnx.checker` in full, types and shapes included; data that lies outside the file is not read.

    Raises:
        ExportError: the file is not valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        # ValueError of a dtype that does not exist, and of what is said about a name that is no text.
        raise ExportError(f"{path.name} does not pass onnx.checker: {error}") from error


def read_model(path: str | os.PathLike[str]) -> "onnx.ModelProto":
    """A model from a file that may come from anywhere, its external weights not loaded yet.

    Raises:
        ExportError: there is none, it is truncated or not ONNX, a tensor has more or less data than its dimensions say,
            two share a name, or external data is missing, too short, or lies outside the model's folder.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import external_data_helper as external

    source = expand_home(path, ExportError)
    delete_abandoned(source.parent)
    if not source.is_file():
        raise ExportError(f"there is no file {str(path)!r}; give an .onnx file")
    try:
        model = onnx.load_model(str(source), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{path} is truncated or not an ONNX file ({error}); copy it again") from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise ExportError(f"{path} is truncated or not an ONNX file: it holds no graph; copy it again")
    for tensor in external._get_all_tensors(model):
        wanted = _data_size(source, tensor)
        if external.uses_external_data(tensor):
            _check_external(source, tensor, wanted)
        elif (held := _held_size(tensor)) != wanted:
            raise ExportError(
                f"{source}: {tensor.name!r} {list(tensor.dims)} takes {wanted} bytes, or numbers, of data, and has "
                f"{held}; copy it again"
            )
    for graph in _graphs(model.graph):
        names = [tensor.name for tensor in graph.initializer] + [
            tensor.values.name for tensor in graph.sparse_initializer
        ]
        if twice := next((name for name, times in Counter(names).items() if times > 1), None):
            raise ExportError(f"{source}: two constants are called {twice!r}; runtimes disagree which of them counts")
    return model


def _graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _data_size(source: Path, tensor: "onnx.TensorProto") -> int:
    """How much data the dimensions ask for: bytes where it is raw or external, else numbers of its own field."""
    import onnx_ir as ir

    try:
        kind = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ExportError(f"{source}: {tensor.name!r} is of no known dtype ({error}); copy it again") from error
    if kind is ir.DataType.UNDEFINED or any(size < 0 for size in tensor.dims):
        raise ExportError(f"{source}: {tensor.name!r} {list(tensor.dims)} has no shape or dtype; copy it again")
    numbers: int = math.prod(tensor.dims)
    bits: int = 0 if kind is ir.DataType.STRING else kind.bitwidth
    in_bytes = tensor.HasField("raw_data") or tensor.data_location == tensor.EXTERNAL
    if bits and (in_bytes or bits < 8):
        return -(-numbers * bits // 8)
    return numbers * (2 if kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1)


def _held_size(tensor: "onnx.TensorProto") -> int:
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    fields = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
    return sum(len(getattr(tensor, field)) for field in fields)


def _check_external(source: Path, tensor: "onnx.TensorProto", wanted: int) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if not all(isinstance(value, str) for value in entries.values()):  # bytes where they are no text
        raise ExportError(f"{source}: {tensor.name!r} has no valid place in its file ({entries}); copy it again")
    folder = source.parent.resolve()
    try:
        file = (folder / location).resolve()
        size = file.stat().st_size if file.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a NUL, or links in a circle
        raise ExportError(f"{source}: the data of {tensor.name!r} lies at no valid place ({error})") from error
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ExportError(
            f"{source}: the data of {tensor.name!r} lies at {location!r}, outside the model's own folder; such a file "
            "is not read"
        )
    if size is None:
        raise ExportError(f"{source}: the data file {location!r} is missing; copy it beside the model")
    offset, length = entries.get("offset", "0"), entries.get("length", str(wanted))
    if not all(number.isdecimal() and len(number) < 20 for number in (offset, length)) or int(length) != wanted:
        raise ExportError(
            f"{source}: {tensor.name!r} {list(tensor.dims)}, of {wanted} bytes, has no valid place in its file "
            f"({entries}); copy it again"
        )
    if int(offset) + wanted > size:
        raise ExportError(f"{source}: the data file {location!r} is truncated; copy it again")

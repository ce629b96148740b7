"""ONNX files on disk: where one may be written, how it is put there whole, and how one from elsewhere is read.

A file is written into a folder beside its place, checked there, and moved: `model.onnx` and, with external data,
`model.onnx.data`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ExportError
from ..files import check_place

if TYPE_CHECKING:
    import onnx

DATA_SUFFIX = ".data"


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The file to write, without links; refuses what could not or should not be written, before long work.

    Raises:
        ExportError: it exists and `overwrite` is not set, is a folder, has no suffix .onnx, or its place is not
            writable.
    """
    final = Path(path).expanduser().resolve()
    if final.suffix != ".onnx":
        raise ExportError(f"an ONNX file is named *.onnx, got {str(path)!r}; add the suffix")
    for file in (final, data_file(final)):
        if file.is_dir():
            raise ExportError(f"{file} is a folder; wanted the name of a file to write")
        if file.exists() and not overwrite:
            raise ExportError(f"{file} exists already; choose another name, or say overwrite (--force)")
    check_place(path, final, ExportError)
    return final


def data_file(path: Path) -> Path:
    """Where the weights of the model at `path` lie if they are external."""
    return path.with_name(path.name + DATA_SUFFIX)


def check_model(path: Path) -> None:
    """`onnx.checker` in full, types and shapes included.

    Raises:
        ExportError: the file is not valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} does not pass onnx.checker: {error}") from error


def read_model(path: str | os.PathLike[str]) -> "onnx.ModelProto":
    """A model from a file that may come from anywhere, its external weights not loaded yet.

    Raises:
        ExportError: there is none, it is truncated or not ONNX, or its external data is missing, too short, or lies
            outside its folder.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import external_data_helper as external

    source = Path(path).expanduser()
    if not source.is_file():
        raise ExportError(f"there is no file {str(path)!r}; give an .onnx file")
    try:
        model = onnx.load_model(str(source), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{path} is truncated or not an ONNX file ({error}); copy it again") from error
    if not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise ExportError(f"{path} is truncated or not an ONNX file: it holds no graph; copy it again")
    for tensor in external._get_all_tensors(model):
        if external.uses_external_data(tensor):
            _check_external(source, tensor)
    return model


def _check_external(source: Path, tensor: "onnx.TensorProto") -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = source.parent.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ExportError(
            f"{source}: the data of {tensor.name!r} lies at {location!r}, outside the model's own folder; such a file "
            "is not read"
        )
    if not file.is_file():
        raise ExportError(f"{source}: the data file {location!r} is missing; copy it beside the model")
    numbers = [entries.get(name, "0") for name in ("offset", "length")]
    if not all(number.isdecimal() for number in numbers):
        raise ExportError(f"{source}: {tensor.name!r} has no valid place in its file ({entries}); copy it again")
    end = sum(map(int, numbers))
    if end > file.stat().st_size:
        raise ExportError(f"{source}: the data file {location!r} is truncated; copy it again")

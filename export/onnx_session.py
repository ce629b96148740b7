"""`session`: an exported file in onnxruntime, with the native `PifaScatter` where there is one."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from ..drafts import delete_abandoned
from ..errors import ExportError
from .native_scatter import build

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class NativeRecord:
    """Whether a session has the native `PifaScatter`.

    Attributes:
        library: its path; None if the model's own functions run instead.
        reason: why they do; None if the library is loaded.
    """

    library: str | None
    reason: str | None


def session(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[str] = (CPU,),
    native: bool = True,
    threads: int | None = None,
    options: "onnxruntime.SessionOptions | None" = None,
    report: list[NativeRecord] | None = None,
    strict: bool = False,
) -> "onnxruntime.InferenceSession":
    """Opens an ONNX file; the numbers are the same with the native operator and without it.

    Args:
        path: a file that `to_onnx` or `rewrite_onnx` wrote, or any other.
        providers: of onnxruntime, all of which must really be there. The native operator is for CPUs: it is left out
            where any other provider is asked for, and the model's functions run there.
        native: whether to use the native operator; built on first use.
        threads: within an operator; None is as onnxruntime chooses.
        options: to go on from; the library and `threads` are added to them.
        report: a list that gets one record of what was done.
        strict: whether it is an error, and not a warning, if the native operator cannot be had.

    Raises:
        ExportError: there is no such file, a provider is missing (onnxruntime would fall back to the CPU silently),
            onnxruntime refuses the file, onnxruntime is installed twice, or `strict` and there is no native operator.
    """
    import onnxruntime

    _check_one_runtime()
    file = Path(path).expanduser()
    delete_abandoned(file.parent)
    if not file.is_file():
        raise ExportError(f"there is no file {str(path)!r}; give an .onnx file")
    missing = set(providers) - set(onnxruntime.get_available_providers())
    if missing or not providers:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} here has no {', '.join(sorted(missing)) or 'provider to run on'}; "
            f"it has {', '.join(onnxruntime.get_available_providers())}. For CUDA install onnxruntime-gpu in the place "
            "of onnxruntime (the extra onnx-gpu)"
        )
    settings = onnxruntime.SessionOptions() if options is None else options
    if threads is not None:
        settings.intra_op_num_threads = threads
    record = _native(settings, providers, native)
    if native and record.reason is not None and set(providers) == {CPU}:
        if strict:
            raise ExportError(f"the native PifaScatter cannot be had: {record.reason}")
        warnings.warn(f"the model runs without the native PifaScatter: {record.reason}", stacklevel=2)
    try:
        opened = onnxruntime.InferenceSession(str(file), settings, providers=list(providers))
    except Exception as error:  # its errors share no base class
        raise ExportError(f"onnxruntime cannot open {path}: {error}") from error
    if lost := set(providers) - set(opened.get_providers()):
        raise ExportError(
            f"{', '.join(sorted(lost))} could not be started, and the model would run on "
            f"{', '.join(opened.get_providers())} alone; are the provider's own libraries (CUDA, cuDNN) installed?"
        )
    if report is not None:
        report.append(record)
    return opened


def _check_one_runtime() -> None:
    """Refuses onnxruntime and onnxruntime-gpu side by side: they share a folder, and one overwrites the other.

    Raises:
        ExportError: both are installed.
    """
    names = {str(found.name).lower() for found in distributions(name="onnxruntime")}
    names |= {str(found.name).lower() for found in distributions(name="onnxruntime-gpu")}
    if len(names) > 1:
        raise ExportError(
            "onnxruntime and onnxruntime-gpu are both installed and break each other; uninstall both, then install one "
            "(the extra onnx or onnx-gpu)"
        )


def _native(options: "onnxruntime.SessionOptions", providers: Sequence[str], wanted: bool) -> NativeRecord:
    """Adds the library to `options` if it can be had and belongs there."""
    import onnxruntime

    if not wanted:
        return NativeRecord(None, "not asked for")
    if set(providers) != {CPU}:
        return NativeRecord(None, f"the native operator is for CPUs, the session is for {', '.join(providers)}")
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 17):
        return NativeRecord(None, f"onnxruntime {onnxruntime.__version__} is older than 1.17")
    library = build()
    if isinstance(library, str):
        return NativeRecord(None, library)
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # noqa: BLE001 -- its errors share no base class
        return NativeRecord(None, f"onnxruntime cannot load {library}: {error}")
    return NativeRecord(str(library), None)

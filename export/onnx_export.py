"""`to_onnx`: a captured module or a causal language model as one ONNX file."""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, ExportError
from ..files import atomic_files
from . import onnx_ops
from .causal_lm import CausalLm, CausalLmWithCache, is_causal_lm
from .onnx_check import check_tokens, largest_error
from .onnx_file import check_model, check_target, data_file

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

OLDEST_OPSET, NEWEST_OPSET = 18, 23
"""What PyTorch's exporter writes; 23 brings Attention, RotaryEmbedding and RMSNormalization as single nodes."""

_DTYPES = (torch.float32, torch.float16, torch.float64)


@dataclass(frozen=True)
class OnnxExport:
    """What `to_onnx` wrote.

    Attributes:
        path: the file; `data_path` is the file with its weights, None if they are inside.
        opset: of the standard operators.
        layers: PIFA layers in it; `layers_in_order` of them need no reordering, another layer absorbed it.
        bytes: of all files.
        seconds: wall time.
        error: largest difference from PyTorch's results over the largest of these; None if that was not checked.
        tokens_checked: number of greedily generated tokens that are PyTorch's too; None if that was not checked, as is
            so without a key/value cache.
    """

    path: str
    data_path: str | None
    opset: int
    layers: int
    layers_in_order: int
    bytes: int
    seconds: float
    error: float | None = None
    tokens_checked: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def to_onnx(
    model: "nn.Module | ExportedProgram",
    path: str | os.PathLike[str],
    example: Any = None,
    *,
    dynamic_shapes: Any = None,
    kv_cache: bool = False,
    opset: int = 23,
    functions: bool = True,
    external_data: bool = True,
    overwrite: bool = False,
    check: bool = False,
) -> OnnxExport:
    """Writes a model as an ONNX file that stock onnxruntime runs, and that a native `PifaScatter` makes faster.

    PIFA layers are nodes `ai.pifa::PifaLinear`, whose bodies the file holds as model-local functions (see `onnx_ops`).
    The file is written under a temporary name, passes `onnx.checker` in full, and is then moved to `path`.

    Args:
        model: a module (a captured graph is one) or an exported program. Weights in float32, float16 or float64.
        path: the file, named *.onnx.
        example: arguments to capture the module with: a tensor, a sequence, or a mapping of keyword arguments. Causal
            language models of transformers need none: their inputs are `input_ids` and `attention_mask`
            [batch, sequence], with dynamic sizes.
        dynamic_shapes: which sizes of `example` vary, as `torch.export.export` takes it.
        kv_cache: for a causal language model: add inputs `past_key_values.%d.key` and `.value`, outputs
            `present.%d.key` and `.value` [batch, heads, tokens, head size]; the attention mask then covers past and new
            tokens.
        opset: version of the standard operators, 18 to 23.
        functions: whether PIFA layers stay nodes of their own. False writes standard operators only, for runtimes that
            do not know functions; the native operator is then of no use.
        external_data: whether weights go into a second file, `path` + ".data"; a single file holds 2 GB at most.
        overwrite: whether a file at `path` may be replaced.
        check: whether the file is run by onnxruntime on `example` and compared with PyTorch before it is moved: its
            results and, with `kv_cache`, the tokens that it generates greedily.

    Raises:
        ExportError: an argument is refused (all are checked before the work starts), or the file fails its check.
        CaptureError: the model cannot be captured as one graph, or an operator has no ONNX form.
    """
    started = time.perf_counter()
    final = check_export(path, opset=opset, overwrite=overwrite)
    _check_dtypes(model)
    with _evaluating(model):
        call = _call_of(model, example, dynamic_shapes, kv_cache)
        with _quiet():
            written = _translate(call, opset)
        layers = onnx_ops.lay_out_weights(written)
        in_order = sum(node.op_type == onnx_ops.LINEAR_IN_ORDER for node in written.graph.all_nodes())
        onnx_ops.attach_functions(written)
        if not functions:
            _inline(written)
        error = tokens = None
        with atomic_files(final, data_file(final), ExportError, overwrite=overwrite) as partial:
            _save(written, partial, external_data)
            check_model(partial)
            if check:
                examples = [call.args, *([call.module.empty_example()] if kv_cache else [])]
                error = max(largest_error(partial, call.module, args, call.kwargs) for args in examples)
                tokens = check_tokens(partial, call.module) if kv_cache else None
    data = data_file(final)
    files = [final] + ([data] if data.exists() else [])
    return OnnxExport(
        str(final),
        str(data) if len(files) > 1 else None,
        opset,
        layers,
        in_order,
        sum(file.stat().st_size for file in files),
        time.perf_counter() - started,
        error,
        tokens,
    )


def check_export(path: str | os.PathLike[str], *, opset: int = 23, overwrite: bool = False) -> Path:
    """What `to_onnx` refuses without having seen the model; returns the file to write, without links.

    Raises:
        ExportError: `path` cannot or should not be written, or there is no such opset.
    """
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        age = "too old" if opset < OLDEST_OPSET else "too new"
        raise ExportError(f"opset {opset} is {age}; choose one from {OLDEST_OPSET} to {NEWEST_OPSET}")
    return check_target(path, overwrite=overwrite)


@dataclass(frozen=True)
class _Call:
    """A model, and how it is called and named."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None
    input_names: list[str] | None = None
    output_names: list[str] | None = None


def _call_of(model: Any, example: Any, dynamic_shapes: Any, kv_cache: bool) -> _Call:
    if isinstance(model, torch.export.ExportedProgram):
        if example is not None or dynamic_shapes is not None or kv_cache:
            raise ExportError("an exported program brings its own example and shapes; leave these arguments out")
        args, kwargs = model.example_inputs
        return _Call(model, args, kwargs)
    if example is None and is_causal_lm(model):
        if getattr(model.config, "is_encoder_decoder", False):
            raise ExportError(f"{type(model).__name__} has an encoder and a decoder; export each with its own example")
        if dynamic_shapes is not None:
            raise ExportError("dynamic_shapes belong to an example; a causal language model brings its own")
        wrapped = (CausalLmWithCache if kv_cache else CausalLm)(model)
        names = wrapped.input_names, wrapped.output_names
        return _Call(wrapped, wrapped.example(), {}, wrapped.dynamic_shapes(), *names)
    if kv_cache:
        raise ExportError("kv_cache is for causal language models of transformers, given without an example")
    if example is None:
        raise ExportError(f"{type(model).__name__} is no causal language model: give an example of its arguments")
    if isinstance(example, Mapping):
        return _Call(model, (), dict(example), dynamic_shapes)
    args = (example,) if isinstance(example, Tensor) or not isinstance(example, Sequence) else tuple(example)
    return _Call(model, args, {}, dynamic_shapes)


def _check_dtypes(model: Any) -> None:
    """Refuses weights of a dtype that onnxruntime has no kernels for on CPUs."""
    state = model.state_dict
    for name, tensor in (state() if callable(state) else state).items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ExportError(f"{name} has no values (meta device); load the model before exporting it")
        if tensor.dtype.is_floating_point and tensor.dtype not in _DTYPES:
            raise ExportError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which onnxruntime cannot compute with on CPUs; "
                "cast the model first: model.float() or model.half() (--dtype float32)"
            )


def _check_operators(program: "ExportedProgram") -> None:
    """Refuses experts in PIFA form: onnxruntime has no product that gives every expert rows of its own."""
    grouped = (torch.ops.pifa.grouped_linear.default, torch.ops.pifa.grouped_mm.default)
    if any(node.target in grouped for node in program.graph.nodes):
        raise ExportError(
            "the model has experts in PIFA form, which cannot be written as ONNX; compress it without them "
            '(skip), and model.set_experts_implementation("batched_mm"), which can'
        )


def _translate(call: _Call, opset: int) -> "ir.Model":
    from torch.onnx import OnnxExporterError

    program = call.module if isinstance(call.module, torch.export.ExportedProgram) else _capture(call)
    _check_operators(program)
    try:
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=call.input_names,
            output_names=call.output_names,
            custom_translation_table={torch.ops.pifa.linear.default: onnx_ops.translation()},
            verbose=False,
        )
    except OnnxExporterError as error:
        raise CaptureError(f"the captured model has no ONNX form: {error}") from error
    if written is None:
        raise CaptureError("PyTorch's exporter returned nothing")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    model: ir.Model = written.model
    ClearMetadataAndDocStringPass()(model)  # stack traces, with paths of this machine
    return model


def _capture(call: _Call) -> "ExportedProgram":
    module = call.module
    try:
        with torch.no_grad():
            return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes, strict=False)
    except Exception as error:
        raise CaptureError(f"torch.export could not capture {type(module).__name__} as one graph: {error}") from error


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for as long as the block runs."""
    training = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    for part in training:
        part.training = False  # not eval(): exported graphs refuse to be called so
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def _inline(model: "ir.Model") -> None:
    from onnx_ir.passes.common import InlinePass

    InlinePass()(model)
    model.opset_imports.pop(onnx_ops.DOMAIN, None)


def _save(model: "ir.Model", path: Path, external_data: bool) -> None:
    import onnx_ir as ir

    try:
        ir.save(model, path, external_data=data_file(path).name if external_data else None)
    except ValueError as error:  # protobuf's own limit
        raise ExportError(
            f"{path.name} is too large for a single file ({error}); write it with external data"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what PyTorch's exporter says about its own parts."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        registration.setLevel(level)

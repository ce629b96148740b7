"""`pifa export`: a saved model, or somebody else's ONNX file, as an ONNX file with PIFA layers."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError, ExportError
from .options import Json, RemoteCode
from .output import print_json, progress, work

if TYPE_CHECKING:
    from ..export import OnnxExport, OnnxRewrite

EXAMPLE = "Example: pifa export smol-pifa -o smol/model.onnx --kv-cache --check"

Source = Annotated[
    str | None,
    typer.Argument(metavar="DIR", help="A compressed model; any other MODEL does too. With --from-onnx an ONNX file."),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.onnx", help="File to write.")]
Cache = Annotated[
    bool, typer.Option("--kv-cache", help="Add inputs and outputs for past keys and values, and a genai_config.json.")
]
NoFunctions = Annotated[
    bool, typer.Option("--no-functions", help="Standard operators only, for runtimes that do not know functions.")
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Run the file in onnxruntime beside PyTorch and compare; with --kv-cache also what both generate.",
    ),
]
FromOnnx = Annotated[bool, typer.Option("--from-onnx", help="Rewrite the low-rank pairs of an ONNX file instead.")]
BuildNative = Annotated[bool, typer.Option("--build-native", help="Build the native operator for this machine.")]
Opset = Annotated[int, typer.Option(help="Version of the standard operators, 18 to 23.")]
OneFile = Annotated[bool, typer.Option("--one-file", help="Weights inside the file, 2 GB at most.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
Dtype = Annotated[Literal["auto", "float32", "float16"], typer.Option(help="Of the weights; auto is as stored.")]


def export_verb(
    source: Source = None,
    output: Output = None,
    kv_cache: Cache = False,
    no_functions: NoFunctions = False,
    check: Check = False,
    from_onnx: FromOnnx = False,
    build_native: BuildNative = False,
    opset: Opset = 23,
    one_file: OneFile = False,
    dtype: Dtype = "auto",
    force: Force = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a model as an ONNX file, or an ONNX file with its low-rank pairs in PIFA form."""
    if source is None and not build_native:
        raise typer.BadParameter("give a model to export, or --build-native")
    if source is not None and output is None:
        raise typer.BadParameter("-o FILE.onnx says where to write")
    if from_onnx and (kv_cache or no_functions or check or one_file):
        raise typer.BadParameter("--from-onnx goes without --kv-cache, --no-functions, --check and --one-file")
    _check_packages()
    result: dict[str, Any] = {}
    with work(as_json):
        if source is not None and output is not None and from_onnx:
            result["rewrite"] = _rewrite(source, output, force)
        elif source is not None and output is not None:
            options = {
                "kv_cache": kv_cache,
                "functions": not no_functions,
                "check": check,
                "opset": opset,
                "external_data": not one_file,
                "overwrite": force,
            }
            with progress("exporting", as_json) as tell:
                result["export"], result["genai"] = _export(source, output, dtype, trust_remote_code, options, tell)
        if build_native:
            result["native"] = _build()
    if as_json:
        print_json({key: value if isinstance(value, str | None) else value.to_dict() for key, value in result.items()})
    else:
        for line in _lines(**result):
            typer.echo(line)


def _check_packages() -> None:
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if lacking:
        raise ConfigError(f"export needs {', '.join(lacking)}; pip install 'pifa-compiler[onnx]'")


def _rewrite(source: str, output: Path, force: bool) -> "OnnxRewrite":
    from ..export import rewrite_onnx

    return rewrite_onnx(source, output, overwrite=force)


def _export(
    source: str, output: Path, dtype: str, trust_remote_code: bool, options: dict[str, Any], tell: Any
) -> "tuple[OnnxExport, str | None]":
    """The export, and what became of genai_config.json: its path, why there is none, or None where none is wanted."""
    from ..export import check_export, to_onnx, write_genai_config
    from ..hf.loading import load_model, load_tokenizer

    check_export(output, opset=options["opset"], overwrite=options["overwrite"])
    tell(0, 2, "reading the model")
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    tell(1, 2, "writing the graph; takes a minute or two")
    exported = to_onnx(model, output, **options)
    if not options["kv_cache"]:
        return exported, None
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        return exported, str(write_genai_config(model, output, tokenizer, overwrite=options["overwrite"]))
    except ExportError as error:
        return exported, f"not written: {error}"


def _build() -> str:
    from ..export import build_native

    found = build_native()
    if isinstance(found, str):
        raise ExportError(f"the native operator cannot be had: {found}; models run without it, on their own functions")
    return str(found)


def _lines(
    export: "OnnxExport | None" = None,
    genai: str | None = None,
    rewrite: "OnnxRewrite | None" = None,
    native: str | None = None,
) -> list[str]:
    lines = []
    if export is not None:
        files = " and ".join(filter(None, (export.path, export.data_path)))
        lines.append(f"{files}: {export.bytes / 1e6:.1f} MB, opset {export.opset}, in {export.seconds:.0f} s")
        lines.append(f"{export.layers} PIFA layers, {export.layers_in_order} of them without any reordering")
        if export.error is not None:
            lines.append(f"largest difference from PyTorch: {export.error:.2g} of the largest result")
        if export.tokens_checked is not None:
            lines.append(f"{export.tokens_checked} tokens generated greedily, the same as PyTorch's")
    if genai is not None:
        lines.append(f"for onnxruntime-genai: {genai}")
    if rewrite is not None:
        done = [pair for pair in rewrite.pairs if pair.skipped is None]
        lines.append(
            f"{rewrite.path}: {len(done)} pairs in PIFA form, {rewrite.stored_before:,} -> {rewrite.stored_after:,} "
            "stored numbers"
        )
        lines += [f"left: {pair.node}: {pair.skipped}" for pair in rewrite.pairs if pair.skipped is not None]
    if native is not None:
        lines.append(f"native operator: {native}")
    return lines

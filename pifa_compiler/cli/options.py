"""The arguments and options that several verbs share, and the checks that parsing alone does not do."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError, DeviceError
from ..files import check_opens

if TYPE_CHECKING:
    import torch

MethodName = Literal["two-sided", "optimal", "mpifa", "svd-llm", "lord", "fwsvd", "asvd", "svd"]
AllocatorName = Literal["global", "uniform", "attn-mlp", "owl", "d-rank", "welore"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
ShortDtypeName = Literal["fp32", "bf16", "fp16"]

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a name on the Hugging Face Hub, or a .gguf file.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `pifa compress` has written.")]
OutputFolder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model in DIR.")]
Data = Annotated[
    str, typer.Option(help="wikitext2, pydoc (the texts in CPython's help), or a .txt, .jsonl or .parquet file.")
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens a window.")]
Seed = Annotated[int, typer.Option(help="Of the calibration windows.")]
RankMultiple = Annotated[int, typer.Option(min=1, help="Ranks are multiples of this; 1 is exact.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Default: auto, as stored; for GGUF float32.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N, to compute on. Default: the first GPU, if there is one.")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let Python code that comes with MODEL run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress.")]


def device_of(name: str | None) -> "torch.device":
    """What `--device` asks for; bad usage if it is not there."""
    from ..device import find_device

    try:
        return find_device(name)
    except DeviceError as error:
        raise typer.BadParameter(str(error)) from error


def check_plot(plot: Path | None) -> None:
    """Refuses a `--plot` that could not be drawn before the long work, not after it."""
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot takes a .png, .svg or .pdf file, got {str(plot)!r}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install 'pifa-compiler[plot]'")
    check_opens(plot, ConfigError)

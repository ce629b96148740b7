"""The command line `pifa`: parses, calls and prints. What is printed for people is laid out in `cli_print`.

Exit codes: 0 done, 1 refused (a `PifaError`, as one line), 2 bad usage, 130 interrupted.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import ConfigError, PifaError
from . import bench as cli_bench
from . import compare as cli_compare
from . import export as cli_export
from . import tables as cli_print
from .output import Device, Json
from .output import device_of as _device_of
from .output import print_json as _print_json
from .output import progress as _progress
from .output import work as _work


class _Verbs(TyperGroup):
    """Turns what this package refuses, and an interrupt, into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PifaError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    cls=_Verbs,
    help="Makes language models smaller and faster without training: low-rank linears in PIFA form.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a name on the Hugging Face Hub, or a .gguf file.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `pifa compress` has written.")]
Data = Annotated[
    str, typer.Option(help="wikitext2, pydoc (the texts in CPython's help), or a .txt, .jsonl or .parquet file.")
]
CalibrationData = Annotated[
    str,
    typer.Option(
        help="wikitext2, pydoc (the texts in CPython's help), self (text that the model writes), "
        "or a .txt, .jsonl or .parquet file."
    ),
]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens a window.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto (as stored), float32, bfloat16 or float16. Default: auto, for GGUF float32."),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let Python code that comes with MODEL run.")]


def main() -> None:
    """The console script."""
    app(prog_name="pifa")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pifa-compiler {version('pifa-compiler')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before a verb; each does what it does by its own callback."""


@app.command(
    "compress",
    no_args_is_help=True,
    epilog="Example: pifa compress HuggingFaceTB/SmolLM2-135M -o smol-pifa --density 0.6 --data wikitext2",
)
def compress_verb(
    name: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")],
    density: Annotated[float, typer.Option(help="Stored numbers over dense numbers, in (0, 1]; never exceeded.")] = 0.5,
    method: Annotated[
        str, typer.Option(help="How weights are made low-rank; an unknown name lists all.")
    ] = "two-sided",
    mix: Annotated[float, typer.Option(help="Share of the dense model's inputs in the target, in [0, 1].")] = 0.25,
    damping: Annotated[float, typer.Option(help="Regularisation, relative to the Gram matrix.")] = 1e-3,
    data: CalibrationData = "pydoc",
    skip: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Linears to leave dense. Repeatable.")
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=RANK", help="Ranks for linears by name, whatever the density. Repeatable."),
    ] = None,
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks are multiples of this; 1 is exact.")] = 32,
    allocator: Annotated[
        str | None,
        typer.Option(help="How ranks are shared out; an unknown name lists all. Default: global for two-sided."),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Weigh errors by what they do to predictions.")
    ] = True,
    dtype: Dtype = None,
    device: Device = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Seqlen = 2048,
    seed: Annotated[int, typer.Option(help="Of the calibration windows.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a saved model in DIR.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a model's linears low-rank and save it in PIFA form."""
    from ..compress import CompressConfig, compress

    _check_dtype(dtype)
    place = _device_of(device)
    try:
        config = CompressConfig(
            density=density,
            method=method,
            mix=mix,
            damping=damping,
            ranks=_ranks(rank or []),
            skip=tuple(skip or ()),
            rank_multiple=rank_multiple,
            allocator=allocator,
            gradients=gradients,
        )
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with _work(as_json, place):
        from ..checkpoint import save_pretrained
        from ..device import device_name
        from ..files import check_destination
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.text import calibration_batches, read_text

        check_destination(output, overwrite=force)
        if data != "self":
            read_text(data, "calibration")  # a missing text is refused before the weights are read
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        batches = calibration_batches(data, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
        with _progress("compressing", as_json) as progress:
            report = compress(model, batches, config, progress=progress)
        save_pretrained(model, output, tokenizer=tokenizer, report=report, overwrite=force)
        at = device_name(place)
    if as_json:
        _print_json({**report.to_dict(), "output": str(output), "bytes": cli_print.folder_bytes(output), "device": at})
    else:
        cli_print.summary(report, output, data, at)


@app.command("eval", no_args_is_help=True, epilog="Example: pifa eval smol-pifa --data wikitext2 --windows 20")
def eval_verb(
    name: ModelName,
    data: Data = "pydoc",
    windows: Annotated[int | None, typer.Option(min=1, help="How many; default: all of the text.")] = None,
    seqlen: Seqlen = 2048,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the perplexity over consecutive windows of a text."""
    _check_dtype(dtype)
    place = _device_of(device)
    with _work(as_json, place):
        from ..device import device_name
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.perplexity import perplexity
        from ..hf.text import evaluation_batches, read_text

        read_text(data, "evaluation")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        batches = evaluation_batches(data, model, tokenizer, seqlen=seqlen, limit=windows)
        with _progress("windows", as_json) as progress:
            result = perplexity(model, batches, progress)
        at = device_name(place)
    if as_json:
        _print_json({**vars(result), "device": at})
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4f}  ({data}: {result.windows} windows of {result.seqlen}, "
            f"{result.tokens:,} tokens predicted, on {at})"
        )


@app.command(
    "generate", no_args_is_help=True, epilog='Example: pifa generate smol-pifa "Low-rank matrices are" --compile'
)
def generate_verb(
    name: Annotated[str, typer.Argument(metavar="DIR", help="A compressed model; any other MODEL does as well.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    compiled: Annotated[
        bool,
        typer.Option("--compile", help='Run through torch.compile(backend="pifa"); the first tokens take a while.'),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Continue a text, greedily."""
    _check_dtype(dtype)
    place = _device_of(device)
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty")
    with _work(as_json, place):
        from ..device import device_name
        from ..hf.generate import compile_step, generate, prompt_tokens
        from ..hf.loading import check_vocabulary, load_model, load_tokenizer

        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        check_vocabulary(model, tokenizer)
        tokens = prompt_tokens(model, tokenizer, prompt, max_new_tokens)
        step = compile_step(model, "pifa") if compiled else None
        with _progress("tokens", as_json) as progress:
            result = generate(model, tokens, max_new_tokens, progress, step=step)
        text = tokenizer.decode(result.tokens, skip_special_tokens=True)
        at = device_name(place)
    if as_json:
        _print_json({"prompt": prompt, "text": text, "compiled": compiled, **result.to_dict(), "device": at})
    else:
        typer.echo(prompt + str(text))
        typer.echo(f"({len(result.tokens)} tokens in {result.seconds:.1f} s on {at})", err=True)


@app.command("inspect", no_args_is_help=True, epilog="Example: pifa inspect smol-pifa")
def inspect_verb(folder: Folder, as_json: Json = False) -> None:
    """Show a compressed model layer by layer."""
    with _work(as_json):
        from ..checkpoint.inspect import inspect

        found = inspect(folder)
    if as_json:
        _print_json(found.to_dict())
    else:
        cli_print.layers(found, folder)


@app.command("demo", epilog="Example: pifa demo -o smol-pifa")
def demo_verb(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write.")] = Path("pifa-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace a saved model in DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M and compare it with what it was: some minutes, on any CPU."""
    with _work(as_json):
        from ..bench.demo import run

        with _progress("demo", as_json) as progress:
            result = run(output, overwrite=force, progress=progress)
    if as_json:
        _print_json(result.to_dict())
    else:
        cli_print.demo(result, output)


app.command("export", no_args_is_help=True, epilog=cli_export.EXAMPLE)(cli_export.export_verb)
app.command(
    "compare",
    no_args_is_help=True,
    epilog="Example: pifa compare HuggingFaceTB/SmolLM2-135M --densities 0.8,0.5 --methods two-sided,mpifa,wanda-2:4",
)(cli_compare.compare_verb)
app.add_typer(cli_bench.app, name="bench")


def _ranks(pairs: list[str]) -> dict[str, int]:
    """PATTERN=RANK, each, as a mapping."""
    ranks = {}
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        if not pattern or not number.isdecimal():
            raise typer.BadParameter(f"--rank takes PATTERN=RANK such as '*.down_proj=96', got {pair!r}")
        ranks[pattern] = int(number)
    return ranks


def _check_dtype(dtype: str | None) -> None:
    from ..hf.loading import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")

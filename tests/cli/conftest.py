from pathlib import Path

import pytest
from command_line import SHORT, pifa
from tiny_models import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(f"w{i * i % 61}" for i in range(400)))
    return file


@pytest.fixture(scope="module")
def compressed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in PIFA form."""
    folder = tmp_path_factory.mktemp("compressed") / "pifa"
    assert pifa("compress", model, "-o", folder, "--data", text, *SHORT).exit_code == 0
    return folder

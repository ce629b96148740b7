"""What README and docs/ say: tables are those of their rows, code runs, commands parse, links lead somewhere."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from typer.main import get_command

from pifa_compiler import PifaLinear, compress
from pifa_compiler.cli import app

ROOT = Path(__file__).parents[1]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(file.relative_to(ROOT)) for file in DOCUMENTS]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = load_tables()


def blocks(file: Path, language: str) -> list[str]:
    return [text for kind, text in _FENCE.findall(file.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)
def test_tables_are_those_of_their_rows(file: Path):
    text = file.read_text(encoding="utf-8")
    assert TABLES.with_tables(text) == text, "run `make docs`"
    assert text.count("<!-- table:") == text.count("<!-- end of table -->") == len(TABLES._TABLE.findall(text))


def test_a_changed_figure_is_seen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "23.36" in text
    assert TABLES.with_tables(text.replace("23.36", "23.35")) == text


def test_every_table_is_in_a_document():
    used = {found["name"] for file in DOCUMENTS for found in TABLES._TABLE.finditer(file.read_text(encoding="utf-8"))}
    assert used == set(TABLES.TABLES)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What code in the documents finds: the names that it does not define, and in the place of the Hub a tiny model."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("tiny")
    tiny_tokenizer(model_max_length=64).save_pretrained("tiny")
    model = tiny_llama()
    batches = [torch.randint(0, 64, (2, 24)) for _ in range(2)]
    small = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)).requires_grad_(False)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)))
    import pifa_compiler

    return {
        "torch": torch,
        "pc": pifa_compiler,
        "model": model,
        "batches": batches,
        "my_texts": [" ".join(f"w{(7 * i + j) % 61}" for j in range(32)) for i in range(3)],
        "low_rank": small,
        "x": torch.randn(3, 16),
        "gm": traced,
    }


def run(file: Path, world: dict[str, Any]) -> None:
    for code in blocks(file, "python"):
        exec(compile(code.replace(HUB_MODEL, "tiny"), file.name, "exec"), world)  # noqa: S102  our own documents


def test_code_of_the_readme_runs(world: dict[str, Any]):
    run(ROOT / "README.md", world)
    assert any(isinstance(module, PifaLinear) for module in world["model"].modules())


def test_code_of_safety_runs(world: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    run(ROOT / "docs" / "safety.md", world)
    assert any(record.rule == "FactorizePair" for record in world["records"])
    assert "lm_head" in capsys.readouterr().out


def test_code_of_distillation_runs(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    config = world["pc"].DistillConfig
    monkeypatch.setattr(world["pc"], "DistillConfig", lambda steps: config(steps=steps // 60))
    run(ROOT / "docs" / "distillation.md", world)
    assert len(world["report"].distillation.steps) == 2


def test_code_of_architecture_runs(world: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    run(ROOT / "docs" / "architecture.md", world)
    assert "FactorizePair" in capsys.readouterr().out


def test_code_of_the_checkpoint_format_runs(world: dict[str, Any]):
    compress(world["model"], world["batches"])
    world["pc"].save_pretrained(world["model"], "smol-pifa")
    run(ROOT / "docs" / "checkpoint-format.md", world)
    assert isinstance(world["model"].model.layers[0].mlp.down_proj, PifaLinear)


def test_code_of_onnx_runs(world: dict[str, Any]):
    pytest.importorskip("onnxruntime")
    x: Tensor = torch.randn(2, 16)
    world |= {"model": nn.Sequential(PifaLinear(16, 16, 4), nn.ReLU()), "example": (x,), "feed": {}}
    from pifa_compiler import export

    def fed(path: str) -> Any:
        opened = export.session(path)
        world["feed"][opened.get_inputs()[0].name] = x.numpy()
        return opened

    code = blocks(ROOT / "docs" / "onnx.md", "python")[0].replace('session("model.onnx").', 'fed("model.onnx").')
    exec(compile(code, "onnx.md", "exec"), world | {"fed": fed})  # noqa: S102  our own document


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_code_of_lora_runs(world: dict[str, Any]):
    pytest.importorskip("peft")
    compress(world["model"], world["batches"])
    world["pc"].save_pretrained(world["model"], "model-pifa")
    run(ROOT / "docs" / "lora.md", world)
    merged = {layer.name.rpartition(".")[2] for layer in world["report"].layers}
    assert merged == {"q_proj", "v_proj", "down_proj"}


def test_code_of_large_models_runs(world: dict[str, Any]):
    world["model"].save_pretrained("model")
    run(ROOT / "docs" / "large-models.md", world)
    assert world["report"].density <= 0.5
    assert isinstance(world["pc"].load_pretrained("model-pifa").model.layers[0].mlp.down_proj, PifaLinear)


def test_code_of_attention_runs(world: dict[str, Any]):
    run(ROOT / "docs" / "attention.md", world)
    assert "4 heads of attention in a basis of inputs, in 2 layers" in str(world["report"])


def test_all_documents_with_code_are_run():
    with_code = {file.name for file in DOCUMENTS if blocks(file, "python")}
    others = {
        "architecture.md",
        "attention.md",
        "checkpoint-format.md",
        "distillation.md",
        "large-models.md",
        "lora.md",
        "onnx.md",
        "safety.md",
    }
    assert with_code == {"README.md", *others}


def commands() -> list[str]:
    lines = [line for file in DOCUMENTS for block in blocks(file, "sh") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


@pytest.mark.parametrize("line", commands())
def test_commands_are_as_they_are_written(line: str):
    program, *arguments = shlex.split(line, comments=True)
    if program == "torchrun":
        program, arguments = "pifa", arguments[arguments.index("pifa_compiler") + 1 :]
    if program == "pifa":
        command: Any = get_command(app)
        context = None
        while hasattr(command, "commands"):
            context = command.make_context(command.name or "pifa", arguments[:1], parent=context)
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(command.name, arguments, parent=context)  # raises for an unknown option or a missing one
    elif program == "make":
        assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert [program, arguments[0]] == ["pip", "install"]
        extra = arguments[1].partition("[")[2].rstrip("]")
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def anchors(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(file: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        assert place.is_file(), target
        assert not anchor or anchor in anchors(place), target


def test_the_map_of_rooms_is_that_of_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = text.partition("<!-- rooms -->")[2].partition("<!-- end of rooms -->")[0]
    told: list[str] = []
    for line in rooms.strip().splitlines()[2:]:
        folder, files = line.split("|")[2:4]
        told += [f"{folder.strip().strip('`')}/{name}.py" for name in re.findall(r"`(\w+)`", files)]
    folders = ("pifa_compiler", "passes", "kernels", "export")
    there = [str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert sorted(told) == sorted(there)


def test_the_order_of_imports_is_that_of_the_contract():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.findall(r"^    (\w[\w |]*)$", text.partition("## Imports")[2].partition("## ")[0], re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    assert ["__main__", *told] == contract["layers"]

"""Heavy packages are loaded by what needs them: `import pifa_compiler` takes what `import torch` takes."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("pifa_compiler", "passes", "kernels", "export") for path in (ROOT / folder).rglob("*.py")
)
HEAVY = {
    *("transformers", "datasets", "safetensors", "gguf", "typer", "rich"),
    *("onnx", "onnxscript", "onnxruntime", "triton", "matplotlib"),
}
ALLOWED_AT_THE_TOP = {
    "pifa_compiler/cli/": {"typer", "rich"},  # imported by the command only
    "pifa_compiler/checkpoint/quantizer.py": {"transformers"},  # derives from its classes; imported by its registry
    "kernels/basis_linear_triton_": {"triton"},
    "kernels/grouped_linear_triton_": {"triton"},
    "kernels/linear_triton_": {"triton"},  # @triton.jit decorates functions; imported where the form is emitted
}
"""By how a path starts."""


def modules_after(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after `statement`."""
    code = (
        f"{statement}; import sys, json; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def top_level_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a file is imported, blocks of if, try and with included, `if TYPE_CHECKING` left out."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level_statements(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level_statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level_statements(handler.body)
        else:
            yield node


def heavy_imports(code: str) -> set[str]:
    """The heavy packages that a file imports as soon as it is imported itself."""
    found: set[str] = set()
    for node in top_level_statements(ast.parse(code).body):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found & HEAVY


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in SOURCES])
def test_heavy_packages_are_imported_where_they_are_used(path: str) -> None:
    allowed = [names for start, names in ALLOWED_AT_THE_TOP.items() if path.startswith(start)]
    assert heavy_imports((ROOT / path).read_text(encoding="utf-8")) <= set().union(*allowed)


def test_heavy_imports_are_seen_in_blocks_but_not_in_functions_or_for_type_checkers() -> None:
    hidden = "try:\n    import onnx.helper\nexcept ImportError:\n    from triton import jit"
    harmless = "if TYPE_CHECKING:\n    import transformers\ndef f():\n    import datasets"
    assert heavy_imports(hidden) == {"onnx", "triton"}
    assert heavy_imports(harmless) == set()


def test_importing_the_package_loads_nothing_heavy_that_torch_does_not_load() -> None:
    by_torch = modules_after("import torch")
    assert (modules_after("import pifa_compiler") - by_torch) & HEAVY == set()


def test_importing_the_text_and_model_modules_loads_nothing_heavy_that_torch_does_not_load() -> None:
    by_torch = modules_after("import torch")
    names = ("loading", "text", "perplexity", "smollm2")
    loaded = modules_after("; ".join(f"import pifa_compiler.hf.{name}" for name in names))
    assert (loaded - by_torch) & HEAVY == set()

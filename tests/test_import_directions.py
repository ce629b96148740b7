"""What may import what: left may import right, and a layer its own modules. A new module is given its place here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "pifa_compiler"

LAYERS: tuple[set[str], ...] = (
    {
        *("__main__", "cli", "cli_bench", "cli_compare", "cli_export", "cli_generate", "cli_inspect", "cli_output"),
        *("cli_print", "demo"),
    },
    {"bench_layer", "bench_model", "bench_onnx", "bench_rows", "bench_timing", "compare"},
    {"compress", "compact", "backend"},
    {"absorb", "group_solver", "targets"},
    {"capture", "sweep", "reconstruct", "hf_quantizer", "registration", "pruning", "pairs"}
    | {"enclosure", "enclosed_window"}
    | {"checkpoint", "checkpoint_files", "atomic_folder"}
    | {"pretrained", "calibration", "perplexity", "smollm2"}
    | {"allocate", "allocators", "causal_attention", "graph_run", "output_gradients", "predictions", "token_masks"},
    {"passes", "export"},
    {"factors", "dense_weight", "linear", "linears", "report", "errors", "output_place", "device", "numerics"}
    | {"linear_proof", "exchange", "exchangeable", "module_code"},
    {"kernels"},
)
STRANGERS = {"passes", "export"}  # of one layer, and yet they never see each other

HEAVY = {"triton", "onnx", "onnxscript", "onnxruntime", "transformers", "datasets"} | {
    "matplotlib", "typer", "rich", "safetensors", "gguf"
}  # fmt: skip
HEAVY_AT_THE_TOP = {
    "pifa_compiler/cli.py": {"typer", "rich"},  # imported by the command only
    "pifa_compiler/cli_bench.py": {"typer"},  # imported by the command only
    "pifa_compiler/cli_export.py": {"typer"},  # imported by the command only
    "pifa_compiler/cli_compare.py": {"typer"},  # imported by the command only
    "pifa_compiler/cli_output.py": {"typer"},  # imported by the command only
    "pifa_compiler/cli_print.py": {"rich"},  # imported by the command only
    "pifa_compiler/hf_quantizer.py": {"transformers"},  # derives from its classes; imported by transformers' registry
    # @triton.jit decorates their functions; imported by the lowering, where it emits the operator
    "kernels/linear_triton.py": {"triton"},
    "kernels/linear_triton_decode.py": {"triton"},
    "kernels/linear_triton_prefill.py": {"triton"},
    "kernels/linear_triton_tiles.py": {"triton"},
}


def sources() -> list[Path]:
    folders = (PACKAGE, "passes", "export", "kernels")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """pifa_compiler.passes.lower for passes/lower.py: as installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str) -> str:
    """The entry of LAYERS that a module belongs to, "" for the package's own __init__."""
    return [*module.split("."), ""][1]


def layer(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no place in LAYERS; give it one"
    return found[0]


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """The full names that a file imports anywhere, `from x import y` as both x and x.y."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            known = {module_name(path) for path in sources()}
            names = [f"{origin}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if name in known]
            yield from submodules
            if len(submodules) < len(names):
                yield origin


def forbidden(importer: str, imported: str) -> str | None:
    """Why the module `importer` may not import the module `imported`, or None."""
    if imported.partition(".")[0] != PACKAGE or importer == PACKAGE:
        return None
    source, target = place(importer), place(imported)
    if target == "":
        return f"{importer} imports the package's own __init__, which imports everything"
    if layer(target) < layer(source):
        return f"{importer} imports {imported}, which lies to its left"
    if source != target and {source, target} <= STRANGERS:
        return f"{importer} imports {imported}: passes and export never see each other"
    return None


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


def heavy_imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in top_level_statements(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found & HEAVY


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_from_left_to_right_only(path: Path) -> None:
    module = module_name(path)
    if place(module):
        layer(place(module))
    imported = imported_modules(ast.parse(path.read_text()), module, path.name == "__init__.py")
    assert [reason for name in imported if (reason := forbidden(module, name))] == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    allowed = HEAVY_AT_THE_TOP.get(str(path.relative_to(ROOT)), set())
    assert heavy_imports(ast.parse(path.read_text())) - allowed == set()


@pytest.mark.parametrize(
    ("module", "is_package", "code", "imported"),
    [
        ("pifa_compiler.passes.lower", False, "from .rewrite import Skip", "pifa_compiler.passes.rewrite"),
        ("pifa_compiler.passes.lower", False, "from ..kernels import linear", "pifa_compiler.kernels.linear"),
        ("pifa_compiler.passes", True, "from .rewrite import Skip", "pifa_compiler.passes.rewrite"),
        ("pifa_compiler.compress", False, "def f():\n    from . import errors", "pifa_compiler.errors"),
        ("pifa_compiler.compress", False, "from . import PifaLinear", "pifa_compiler"),
        ("pifa_compiler.compress", False, "from torch import nn", "torch"),
    ],
)
def test_relative_imports_are_resolved(module: str, is_package: bool, code: str, imported: str) -> None:
    assert list(imported_modules(ast.parse(code), module, is_package)) == [imported]


@pytest.mark.parametrize(
    ("importer", "imported", "refused"),
    [
        ("cli", "compress", False),
        ("compress", "sweep", False),
        ("sweep", "compress", True),
        ("passes.lower", "kernels", False),
        ("kernels.linear", "errors", True),
        ("passes.lower", "export", True),
        ("export", "passes.rewrite", True),
        ("passes.lower", "passes.rewrite", False),
        ("passes.lower", "capture", True),
    ],
)
def test_a_wrong_direction_is_seen(importer: str, imported: str, refused: bool) -> None:
    assert (forbidden(f"{PACKAGE}.{importer}", f"{PACKAGE}.{imported}") is not None) is refused


def test_heavy_imports_are_seen_in_blocks_but_not_in_functions_or_for_type_checkers() -> None:
    hidden = "try:\n    import onnx.helper\nexcept ImportError:\n    from triton import jit"
    harmless = "if TYPE_CHECKING:\n    import transformers\ndef f():\n    import datasets"
    assert heavy_imports(ast.parse(hidden)) == {"onnx", "triton"}
    assert heavy_imports(ast.parse(harmless)) == set()

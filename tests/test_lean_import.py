import json
import subprocess
import sys

HEAVY = {
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "triton",
    "datasets",
    "matplotlib",
    "typer",
    "rich",
    "gguf",
}


def modules_after(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after `statement`."""
    code = (
        f"{statement}; import sys, json; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_heavy_that_torch_does_not_load() -> None:
    by_torch = modules_after("import torch")
    assert (modules_after("import pifa_compiler") - by_torch) & HEAVY == set()


def test_importing_the_text_and_model_modules_loads_nothing_heavy_that_torch_does_not_load() -> None:
    by_torch = modules_after("import torch")
    names = ("loading", "text", "perplexity", "smollm2")
    loaded = modules_after("; ".join(f"import pifa_compiler.hf.{name}" for name in names))
    assert (loaded - by_torch) & HEAVY == set()

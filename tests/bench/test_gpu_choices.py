"""`benchmarks/gpu_choices.py` without a GPU: every choice computes the same; clocks are stand-ins."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pifa_compiler.kernels import linear
from triton_interpreter import interpreted

from pifa_compiler.bench import gpu
from pifa_compiler.errors import BenchError

pytest.importorskip("triton", reason="needs the package triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_choices.py"
CPU = torch.device("cpu")


def medians(calls, *, rounds):
    for call in calls.values():
        call()
    return dict.fromkeys(calls, 1.0)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with clocks by which every call takes a millisecond, and nothing compiled."""
    spec = importlib.util.spec_from_file_location("gpu_choices", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gpu_choices", module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(gpu, "graph_of", lambda call, count: lambda: [call(i) for i in range(count)])
    monkeypatch.setattr(gpu, "gpu_medians", medians)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


@interpreted
def test_every_choice_is_right_and_timed(choices: ModuleType):
    rows = list(choices.choice_rows([32], [1, 3, 300], torch.float32, CPU))
    assert [(row.what, row.tokens, row.choice) for row in rows] == [
        *[(what, tokens, choice) for tokens in (1, 3) for what, names in (
            ("linear", ("gemm", "kernels", "stored order", *(["last adds"] if tokens > 1 else []))),
            ("projections", ("gemm", "kernels", "multiplied", "stored order")),
        ) for choice in names],
        *[("projections", 300, choice) for choice in ("gemm", "kernels", "multiplied", "stored order")],
    ]  # fmt: skip
    assert all(row.ms == 1 / 4 for row in rows)  # four sets of weights go round
    assert all(0 < row.error < 1e-5 for row in rows)


def test_a_wrong_choice_is_not_timed(choices: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "linear_gemm", lambda x, w, c: x)
    monkeypatch.setattr(choices, "linear_triton", lambda x, w, c, o, b: linear(x, w, c, o, b))
    monkeypatch.setattr(gpu, "graph_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(BenchError, match="linear, d = 32, 3 tokens: wrong results"):
        list(choices.choice_rows([32], [3], torch.float32, CPU))

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import pifa_compiler as pc
from pifa_compiler import numerics
from pifa_compiler.compress import measure
from pifa_compiler.numerics import own_numerics
from pifa_compiler.reconstruction.statistics import DenseStatistics


@contextmanager
def matmul_precision(precision: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def mkldnn_precision(precision: str):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of a GPU": lambda: torch.amp.autocast("cuda", torch.float16, enabled=torch.cuda.is_available()),
    "medium precision": lambda: matmul_precision("medium"),
    "bfloat16 products": lambda: mkldnn_precision("bf16"),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def state() -> list[Any]:
    return [
        numerics._older_switch(torch.get_float32_matmul_precision),
        *(settings.fp32_precision for settings in numerics._PRECISIONS),
        numerics._older_switch(lambda: torch.backends.cudnn.allow_tf32),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    ]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 20))


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, torch.Tensor], DenseStatistics]:
    batches = [torch.arange(40).view(2, 20) % 17]
    model = language_model()
    statistics = measure(model, batches)
    pc.compress(model, batches, pc.CompressConfig(density=0.8, rank_multiple=1))
    return model.state_dict(), statistics


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_what_the_caller_has_set_changes_no_bit_and_is_set_afterwards(plain, caller):
    batches, model = [torch.arange(40).view(2, 20) % 17], language_model()
    with caller():
        before = state()
        statistics = measure(model, batches)
        pc.compress(model, batches, pc.CompressConfig(density=0.8, rank_multiple=1))
        assert state() == before
    weights, wanted = plain
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for sums in ("gram", "gradient_gram", "sum_abs"):
        found = getattr(statistics, sums)
        assert all(torch.equal(value, found[name]) for name, value in getattr(wanted, sums).items())
        assert len(found) > 0
    assert all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
def test_compact_does_not_depend_on_the_caller_either(caller):
    found = []
    for surroundings in (nullcontext, caller):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 24)), nn.ReLU())
        with surroundings():
            pc.compact(model)
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert "0.w_pivot" in found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@own_numerics()
def refuse() -> float:
    assert torch.get_default_dtype() == torch.float32
    assert {settings.fp32_precision for settings in numerics._PRECISIONS} == {"ieee"}
    return 1 / 0


def test_the_caller_s_settings_come_back_after_an_error():
    with matmul_precision("high"), default_dtype(torch.float64):
        before = state()
        with pytest.raises(ZeroDivisionError):
            refuse()
        assert state() == before


def test_gradients_are_taken_inside_only_where_they_are_asked_for():
    with own_numerics():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_precision_is_set_where_assignments_to_flags_are_forbidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)  # as after disable_global_flags
    before = torch.backends.cudnn.allow_tf32
    with own_numerics():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before

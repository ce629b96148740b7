"""Devices of the command line; GPUs are played by torch's own answers, as none need be there."""

import pytest
import torch

from pifa_compiler.device import device_name, enough_memory, find_device
from pifa_compiler.errors import DeviceError


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("gpus", "found"), [(0, "cpu"), (2, "cuda")])
def test_the_first_gpu_is_taken_where_there_is_one(gpus: int, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, gpus)
    assert find_device() == torch.device(found)


def test_a_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    for name in ("cpu", "cuda", "cuda:1"):
        assert find_device(name) == torch.device(name)
    assert device_name(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("name", ["mps", "cuda:x", "cuda:-1", "cpu:0", "gpu", ""])
def test_unknown_devices_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(DeviceError, match="give cpu, cuda or cuda:N"):
        find_device(name)


@pytest.mark.parametrize(("gpus", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(gpus: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(DeviceError, match=f"finds {gpus} GPUs"):
        find_device(name)


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match="--device cpu"), enough_memory(torch.device("cpu")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="other"), enough_memory(torch.device("cpu")):
        raise RuntimeError("other")

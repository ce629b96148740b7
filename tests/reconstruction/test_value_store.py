import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from pifa_compiler.errors import OffloadError
from pifa_compiler.reconstruction import value_store
from pifa_compiler.reconstruction.value_store import Room, ValueStore


@pytest.fixture
def nodes() -> list[Node]:
    graph = Graph()
    return [graph.placeholder(f"x{number}") for number in range(3)]


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_store, "_SMALL", 0)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_come_back_from_files_as_they_were(dtype, nodes, tmp_path):
    store = ValueStore(Room(0, tmp_path))
    values: dict[Node, Any] = {
        nodes[0]: torch.randn(3, 5, 7).mul(10).to(dtype),
        nodes[1]: torch.randn(6, 4).to(dtype).T,  # not contiguous
        nodes[2]: "no tensor",
    }
    store.put("batch", values)
    assert len(list(tmp_path.iterdir())) == 2
    found = store.get("batch")
    assert found[nodes[2]] == "no tensor"
    assert all(torch.equal(found[node], values[node]) for node in nodes[:2])
    assert found[nodes[0]].dtype == dtype
    store.drop("batch", {nodes[0]})
    assert len(list(tmp_path.iterdir())) == 1
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_filled_up_to_the_limit_and_its_peak_is_told(nodes, tmp_path):
    store = ValueStore(Room(100, tmp_path))
    store.put(0, {nodes[0]: torch.zeros(20), nodes[1]: torch.zeros(20)})  # 80 bytes each
    assert (store.peak_bytes, len(list(tmp_path.iterdir()))) == (80, 1)
    store.put(0, {nodes[1]: store.get(0)[nodes[1]]})
    store.put(1, {nodes[0]: torch.ones(20)})
    assert (store.peak_bytes, len(list(tmp_path.iterdir()))) == (80, 1)
    assert [float(tensor.sum()) for tensor in store.tensors()] == [20]


def test_an_expanded_value_is_never_written(nodes, tmp_path):
    store = ValueStore(Room(0, tmp_path))
    store.put(0, {nodes[0]: torch.zeros(1, 4).expand(1000, 4)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_and_leaves_no_file(nodes, tmp_path, monkeypatch):
    def full(tensor: torch.Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(value_store, "_numbers", full)
    with pytest.raises(OffloadError, match=r"cannot hold what is kept between steps: No space left.*--offload"):
        ValueStore(Room(0, tmp_path)).put(0, {nodes[0]: torch.zeros(4)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda path: path.write_bytes(b"12"), "was cut off meanwhile"), (Path.unlink, "cannot be read: No such file")],
)
def test_a_file_that_was_damaged_meanwhile_is_refused(damage, words, nodes, tmp_path):
    store = ValueStore(Room(0, tmp_path))
    store.put(0, {nodes[0]: torch.zeros(4)})
    damage(next(tmp_path.iterdir()))
    with pytest.raises(OffloadError, match=words):
        store.get(0)

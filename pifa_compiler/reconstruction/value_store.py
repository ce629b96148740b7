"""`ValueStore`: what a walk over a graph keeps of every batch between two steps, in memory or beyond it in files."""

import secrets
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import OffloadError
from ..graph.run import Values

_SMALL = 1 << 16
"""Bytes of values that stay in memory, however little there is."""


@dataclass(frozen=True)
class Room:
    """Where values may lie.

    Attributes:
        limit: bytes of values in memory; None for any number.
        folder: where the others are written; with a limit there is one.
        device: where large values are kept in memory; None leaves each where it is.
    """

    limit: int | None = None
    folder: Path | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class _InFile:
    """A tensor's place on disk."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Moved:
    """A tensor kept on another device than it is used on."""

    tensor: Tensor
    device: torch.device


class ValueStore:
    """Values by key (a batch, or a flow of one) and node; a node's value under a key never changes once it is put.

    Args:
        room: where they may lie.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._kept: dict[Hashable, dict[Node, Any]] = {}
        self._names = (f"value-{secrets.token_hex(4)}-{number}.bin" for number in count())
        self._bytes = 0
        self.peak_bytes = 0

    def put(self, key: Hashable, values: Mapping[Node, Any]) -> None:
        """Makes `values` all that is kept under `key`.

        Raises:
            OffloadError: a file cannot be written.
        """
        old = self._kept.pop(key, {})
        kept: dict[Node, Any] = {}
        for node, value in values.items():
            if node in old:
                kept[node] = old.pop(node)
            else:
                kept[node] = self._keep(value)
        self._kept[key] = kept
        for value in old.values():
            self._forget(value)

    def add(self, key: Hashable, values: Mapping[Node, Any]) -> None:
        """Keeps `values` under `key` beside what is there."""
        self.put(key, {**self._kept.get(key, {}), **values})

    def get(self, key: Hashable) -> Values:
        """What is kept under `key`, read into memory."""
        return {node: self._read(value) for node, value in self._kept.get(key, {}).items()}

    def select(self, key: Hashable, nodes: Mapping[Node, Any] | set[Node]) -> Values:
        """Of what is kept under `key` the values of `nodes`, read into memory."""
        return {node: self._read(value) for node, value in self._kept.get(key, {}).items() if node in nodes}

    def drop(self, key: Hashable, nodes: set[Node]) -> None:
        """Forgets the values of `nodes` under `key`."""
        kept = self._kept.get(key, {})
        for node in nodes & kept.keys():
            self._forget(kept.pop(node))

    def clear(self) -> None:
        """Forgets everything, files too."""
        for key in list(self._kept):
            self.put(key, {})
        self._kept.clear()

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are in memory."""
        for kept in self._kept.values():
            yield from (leaf for leaf in pytree.tree_leaves(list(kept.values())) if isinstance(leaf, Tensor))

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        size = value.numel() * value.element_size()
        expanded = size > value.untyped_storage().nbytes()  # a file would hold what memory does not
        limit = self._room.limit
        if limit is not None and size > _SMALL and not expanded and self._bytes + size > limit:
            return self._write(value)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        if self._room.device not in (None, value.device) and size > _SMALL and not expanded:
            return _Moved(value.to(self._room.device), value.device)
        return value

    def _forget(self, value: Any) -> None:
        if isinstance(value, _InFile):
            value.path.unlink(missing_ok=True)
        elif isinstance(value, Tensor | _Moved):
            tensor = value.tensor if isinstance(value, _Moved) else value
            self._bytes -= tensor.numel() * tensor.element_size()

    def _write(self, value: Tensor) -> _InFile:
        folder = self._room.folder
        assert folder is not None  # noqa: S101  whoever sets a limit gives a folder
        path = folder / next(self._names)
        try:
            with path.open("wb") as file:
                file.write(_numbers(value.detach().cpu().contiguous()))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OffloadError(
                f"{folder} cannot hold what is kept between steps: {error.strerror}; make room, or name another folder "
                "(--offload)"
            ) from error
        return _InFile(path, value.shape, value.dtype, value.device)

    def _read(self, value: Any) -> Any:
        if isinstance(value, _InFile):
            tensor = torch.empty(value.shape, dtype=value.dtype)
            numbers = _numbers(tensor)
            try:
                with value.path.open("rb") as file:
                    whole = file.readinto(numbers) == len(numbers)
            except OSError as error:
                raise OffloadError(f"{value.path} cannot be read: {error.strerror}; start with --resume") from error
            if not whole:
                raise OffloadError(f"{value.path} was cut off meanwhile; start with --resume")
            return tensor.to(value.device)
        return value.tensor.to(value.device) if isinstance(value, _Moved) else value


def _numbers(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data

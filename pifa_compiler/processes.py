"""`Processes`: the processes that share one run, as torchrun starts them; alone, a run needs none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ProcessError

_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: as long as one may solve a wide linear alone."""


class Processes:
    """This process among those that share a run: every one calls the same methods in the same order.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Which of `count` things are this process's, none of which is another's."""
        return range(self.rank, count, self.size)

    def sum(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes, by name; where one lacks a tensor that others have, it counts as zero.

        Raises:
            ProcessError: another process is gone.
        """
        if self.size == 1:
            return dict(tensors)
        shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for each in self.gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}):
            shapes |= each
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        found = {}
        with _explained():
            for name, (shape, dtype) in sorted(shapes.items()):
                own = tensors.get(name)
                total = torch.zeros(shape, dtype=dtype, device=device) if own is None else own.clone()
                dist.all_reduce(total)
                found[name] = total
        return found

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; they are pickled, among the run's own processes.

        Raises:
            ProcessError: another process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Waits until all processes are here.

        Raises:
            ProcessError: another process is gone.
        """
        if self.size > 1:
            with _explained():
                dist.barrier()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except dist.DistBackendError as error:
        raise ProcessError(f"another process of this run is gone: {error}") from error
    except RuntimeError as error:  # what gloo raises
        if "onnection" not in str(error) and "imed out" not in str(error):
            raise
        raise ProcessError(f"another process of this run is gone ({error}); start it again with --resume") from error


@contextmanager
def joined(environment: Mapping[str, str], device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun has started together, by what it says in the environment; alone without it.

    Raises:
        ProcessError: they cannot be reached.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Processes()
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the other processes cannot be reached: {error}; start all by torchrun") from error
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()

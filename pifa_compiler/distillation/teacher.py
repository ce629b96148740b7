"""What the student is to predict: asked of the teacher at every step, or written to disk once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..processes import Processes
from ..run_folder import load_tensors, save_tensors
from .losses import TopK
from .objective import Call, HiddenStates, Predictions

Objective = Predictions | HiddenStates


class Teacher(Protocol):
    """Gives what a batch is compared with."""

    def target(self, number: int, call: Call) -> Tensor | TopK:
        """Of the batch `number`, called as `call` on the device of the student."""


class LiveTeacher:
    """Runs the teacher, which keeps its weights, its dtype and its mode."""

    def __init__(self, model: nn.Module, objective: Objective, autocast: Callable[[], Any]) -> None:
        self._model, self._objective, self._autocast = model, objective, autocast

    def target(self, number: int, call: Call) -> Tensor:
        """See `Teacher`."""
        with torch.no_grad(), self._autocast():
            return self._objective.output(self._model, call).detach()


class StoredTeacher:
    """The likeliest tokens, from a folder; what is not there yet is written there first.

    Args:
        folder: one file a batch.
        calls: all batches.
        live: asks the teacher.
        k: how many tokens at each place.
        temperature: that their probabilities are of.
        device: where batches are called.
        processes: those that share the work.
        tell: called as tell(done, total, what).
    """

    def __init__(
        self,
        folder: Path,
        calls: Sequence[Call],
        live: LiveTeacher,
        *,
        k: int,
        temperature: float,
        device: torch.device,
        processes: Processes,
        tell: Callable[[int, int, str], None],
    ) -> None:
        self._folder, self._device = folder, device
        folder.mkdir(exist_ok=True)
        own = processes.own(len(calls))
        # All processes have as many calls, as a teacher whose weights are spread over them wants.
        for turn in range(-(-len(calls) // processes.size)):
            number = own[min(turn, len(own) - 1)] if own else 0
            if not self._path(number).exists() or processes.size > 1:
                logits = live.target(number, calls[number].to(device))
                if turn < len(own):
                    save_tensors(self._path(number), TopK.of_logits(logits, k, temperature).to_dict(), {})
            tell(turn + 1, len(own), "the teacher's predictions")
        processes.wait()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"

    def target(self, number: int, call: Call) -> TopK:
        """See `Teacher`."""
        found = load_tensors(self._path(number))
        if found is None:
            raise FileNotFoundError(self._path(number))
        return TopK.from_dict(found[0], self._device)

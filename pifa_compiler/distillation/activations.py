"""What a step keeps in memory for its way back, measured on one batch, and how it is made to fit."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..memory import format_bytes, parse_bytes
from ..modules import storage_of
from .objective import Call
from .student import Student
from .teacher import Objective

_OUTPUTS = 3
"""The student's output, the teacher's, and a gradient are there at once."""

_PER_TRAINED = 12
"""Bytes beside its own four of a trained number: its gradient and AdamW's two moments."""


def fit_memory(
    student: Student,
    teacher: nn.Module | None,
    objective: Objective,
    call: Call,
    memory: str | int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> bool:
    """Makes one batch fit: values of a block's inside are computed twice if they have to be. True if they are.

    Args:
        student: as it will be trained.
        teacher: the model that runs beside it, if one does.
        call: the largest batch.
        memory: bytes, or text such as "8GiB".
        autocast: the precision of products.

    Raises:
        ConfigError: it fits neither way; the message says what would do.
    """
    limit = parse_bytes(memory)
    held = _held(student.copy, teacher) + _PER_TRAINED * student.numbers
    kept = activation_bytes(student, objective, call, autocast)
    if held + kept <= limit:
        return False
    student.compute_twice()
    kept = activation_bytes(student, objective, call, autocast)
    if held + kept > limit:
        raise ConfigError(
            f"{format_bytes(limit)} do not suffice: models, gradients and the optimizer take {format_bytes(held)}, one "
            f"batch {format_bytes(kept)}; give {format_bytes(held + kept, up=True)} (--memory), or shorter batches"
        )
    return True


def activation_bytes(
    student: Student, objective: Objective, call: Call, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Bytes that one batch's way forward keeps for its way back, outputs and weights in lower precision included."""
    weights = {storage_of(tensor) for tensor in (*student.copy.parameters(), *student.copy.buffers())}
    sizes: dict[tuple[str, int], int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        place = storage_of(tensor)
        if place not in weights and place not in sizes and tensor.device.type == student.device.type:
            sizes[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other tensor is given its place
        return tensor

    call = call.to(student.device)
    with torch.enable_grad(), autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = objective.output(student.copy, call)
    return sum(sizes.values()) + _OUTPUTS * output.numel() * output.element_size()


def _held(*models: nn.Module | None) -> int:
    """Bytes of models, what they share once."""
    tensors = (tensor for model in models if model is not None for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

"""What a form of an operator is: one way to compute it on one type of device, and when.

Each form of `pifa::linear`, `pifa::grouped_linear` or `pifa::basis_linear` is a file of this folder that defines a
`Form`; `FORMS`, in `passes/lower.py`, lists them by operator and by type of device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Linear = Callable[..., Tensor]
"""The operator's operands -> y: x, w_pivot, coeff, order, bias of `pifa::linear`, say."""


@dataclass(frozen=True)
class Case:
    """What a form is chosen by.

    Attributes:
        device: type of the device, such as "cpu".
        dtype: of the weights.
        d_in, d_out: the shape of the linear, or of each expert's.
        tokens: rows of x, or of the example that was traced where they vary; None if unknown.
        other_dtypes: those of x, bias and result that are known and differ from `dtype`, as under autocast.
        groups: of heads, each with a basis of its own, in `pifa::basis_linear`.
    """

    device: str
    dtype: torch.dtype
    d_in: int
    d_out: int
    tokens: int | None
    other_dtypes: frozenset[torch.dtype] = frozenset()
    groups: int = 1


@dataclass(frozen=True)
class Form:
    """One way to compute an operator.

    Attributes:
        name: what records call it.
        dtypes: it computes in, the same for x, weights, bias and result.
        reason_against: why a case of these dtypes is left to others, or None.
        linear: the operator written in others, which the pass `Lower` traces into the graph. What stands behind
            the form's own operator, such as a bias, stays visible to the compiler, which fuses it with what follows.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    reason_against: Callable[[Case], str | None]
    linear: Linear


def check_dtypes(operator: str, plain: str, dtypes: Sequence[torch.dtype], operands: Iterable[Tensor | None]) -> None:
    """Refuses operands that do not all have one and the same of `dtypes`; those that are None are passed over.

    Args:
        operator: of a form, by name.
        plain: the operator that takes any.

    Raises:
        ValueError: saying what came.
    """
    got = [operand.dtype for operand in operands if operand is not None]
    if got[0] not in dtypes or len(set(got)) > 1:
        raise ValueError(f"{operator} takes one of {tuple(dtypes)} throughout, got {got}; cast, or use {plain}")

"""`CompressConfig`: what a model is to be compressed to, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..factors import Pivoting
from .allocators import ALLOCATORS
from .methods import METHODS


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What `compress` is asked to do.

    Attributes:
        density: stored numbers (row orders included) over dense numbers, of the linears that are compressed, in (0, 1];
            never exceeded in total, whatever single layers get. At 1 nothing is changed.
        method: how weights are made low-rank, a name in `METHODS`.
        mix: f in [0, 1]: the share of the dense model in M's target Y = (1 - f) W X_u + f W X_o. Where the output is
            added to a residual stream H, `two-sided` takes (1 - f) W X_u + f (W X_o + H_o - H_u), so that a later layer
            makes up for part of what earlier ones lost.
        damping: regularisation of `two-sided` and `optimal`: this times the mean diagonal of the inputs' Gram matrix.
            With 0, directions that the inputs hardly have are as inexact as sums in float32 are.
        ranks: ranks by name pattern (`fnmatch`; the first that matches counts); such layers do not follow `density`.
        skip: name patterns of linears to leave dense; they do not count for the density.
        rank_multiple: ranks are multiples of this (of layers too small for that, any), since matrix units are faster
            there; 1 is exact.
        pivoting: how pivot rows are chosen, "lu" or "qr" (see `factorize`).
        allocator: how the density is shared out over the layers, a name in `ALLOCATORS`; None takes the
            method's own, "global" for `two-sided` and "uniform" for the others, as they were published.
        gradients: whether `two-sided` weighs output errors by what they do to the model's predictions. That takes one
            backward pass over the batches and a causal language model; for others, and without it, the errors of all
            outputs count alike.
        gradient_damping: as `damping`, of the Gram matrix of these gradients.
        refine: steps of AdamW for every block between two sums of the residual stream, once its linears are solved:
            its factors are trained until the block computes what the dense model's does (see `refinement`). A step
            takes an eighth of the calibration batches. 0 leaves the closed form as it is.

    Raises:
        ConfigError: an option is unknown or outside its range.
    """

    density: float = 0.5
    method: str = "two-sided"
    mix: float = 0.25
    damping: float = 1e-3
    ranks: Mapping[str, int] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    rank_multiple: int = 32
    pivoting: Pivoting = "lu"
    allocator: str | None = None
    gradients: bool = True
    gradient_damping: float = 1e-2
    refine: int = 0

    def __post_init__(self) -> None:
        _check_number("density", self.density, "in (0, 1]", lambda value: 0 < value <= 1)
        _check_number("mix", self.mix, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_number("damping", self.damping, "0 or more", lambda value: value >= 0)
        _check_number("gradient_damping", self.gradient_damping, "1e-6 or more", lambda value: value >= 1e-6)
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if self.allocator is not None and self.allocator not in ALLOCATORS:
            raise ConfigError(f"unknown allocator {self.allocator!r}; known are {', '.join(ALLOCATORS)}")
        if not isinstance(self.rank_multiple, int) or self.rank_multiple < 1:
            raise ConfigError(f"rank_multiple must be an integer of 1 or more, got {self.rank_multiple!r}")
        if not isinstance(self.refine, int) or isinstance(self.refine, bool) or self.refine < 0:
            raise ConfigError(f"refine must be an integer of 0 or more, got {self.refine!r}")
        if self.pivoting not in ("lu", "qr"):
            raise ConfigError(f'pivoting must be "lu" or "qr", got {self.pivoting!r}')
        skip: object = self.skip
        if isinstance(skip, str):
            raise ConfigError(f"skip must be a tuple of patterns, got the string {self.skip!r}; write ({self.skip!r},)")
        for pattern, rank in self.ranks.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"the rank for {pattern!r} must be an integer of 1 or more, got {rank!r}")


def _check_number(name: str, value: object, interval: str, allowed: Callable[[float], bool]) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not allowed(value):
        raise ConfigError(f"{name} must be a number {interval}, got {value!r}")

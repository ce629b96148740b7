"""What was done to a model, layer by layer: the records that every door returns and prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .factors import FactorQuality, stored_numbers


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: its place in the model, as in `named_modules`.
        shape: (out, in) of its weight.
        rank: rank of its PIFA form; None if it was left as it was.
        skipped: why it was left as it was; None if it is in PIFA form.
        target: whether it counts for the density: skipped by its role (the output head, a `skip` pattern) it does not,
            left dense because PIFA would not be smaller it does.
        stored_before, stored_after: numbers stored, the row order's indices included, biases not.
        error: relative output error on the calibration inputs, ||(W - W') X|| / ||W X||; None where unknown.
        quality: of the factorization.
        notes: what was out of the ordinary, such as a singular Gram matrix.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    skipped: str | None
    target: bool
    stored_before: int
    stored_after: int
    error: float | None = None
    quality: FactorQuality | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_factors(
        cls,
        name: str,
        shape: tuple[int, int],
        rank: int,
        quality: FactorQuality,
        *,
        stored_before: int | None = None,
        error: float | None = None,
        notes: Iterable[str] = (),
    ) -> "LayerReport":
        """A layer that is in PIFA form now."""
        before = shape[0] * shape[1] if stored_before is None else stored_before
        after = stored_numbers(*shape, rank)
        return cls(name, shape, rank, None, True, before, after, error, quality, tuple(notes))

    @classmethod
    def of_skip(cls, name: str, shape: tuple[int, int], reason: str, *, target: bool) -> "LayerReport":
        """A layer that was left as it was."""
        dense = shape[0] * shape[1]
        return cls(name, shape, None, reason, target, dense, dense)


@dataclass
class Report:
    """What `compress` or `compact` did.

    Attributes:
        method: how low-rank weights were made: a name in `METHODS`, or "lossless".
        density_requested: the budget asked for; None for a lossless run.
        layers: one entry a linear layer, in the model's order.
        params_before, params_after: parameters and row orders of the whole model, shared ones counted once.
        seconds: wall time.
        activation_bytes: largest store of calibration activations held at once.
        notes: what was not tried, and why.
    """

    method: str
    density_requested: float | None
    layers: list[LayerReport] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0
    seconds: float = 0.0
    activation_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds to `notes` what is not there yet."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def density(self) -> float:
        """Stored numbers over dense numbers of the linears that were targets; 1 if there were none."""
        dense = sum(layer.shape[0] * layer.shape[1] for layer in self.layers if layer.target)
        return sum(layer.stored_after for layer in self.layers if layer.target) / dense if dense else 1.0

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers left as they were, each with its reason."""
        return [layer for layer in self.layers if layer.skipped is not None]

    @property
    def factorized(self) -> list[LayerReport]:
        """The layers in PIFA form."""
        return [layer for layer in self.layers if layer.skipped is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "density_requested": self.density_requested,
            "density": self.density,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "seconds": self.seconds,
            "activation_bytes": self.activation_bytes,
            "notes": self.notes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {len(self.factorized)} layers in PIFA form, {len(self.skipped)} left as they were; "
            f"density {self.density:.4f}, {self.params_before:,} -> {self.params_after:,} parameters "
            f"in {self.seconds:.1f} s"
        ]
        reasons: dict[str, int] = {}
        for layer in self.skipped:
            reasons[str(layer.skipped)] = reasons.get(str(layer.skipped), 0) + 1
        lines += [f"  {count} left: {reason}" for reason, count in reasons.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

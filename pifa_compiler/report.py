"""What was done to a model, layer by layer: the records that every door returns and prints."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .errors import CheckpointError
from .factors import FactorQuality, stored_numbers

_EXPERTS_NAMED = 8
"""Experts that a note names."""

_KINDS_SHOWN = 5
"""Classes that are named where a report is shown; `Report.others` has all."""


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, or one of the projections of a mixture of experts, of all experts.

    Attributes:
        name: its place in the model, as in `named_modules`.
        shape: (out, in) of its weight; (experts, out, in) of experts.
        rank: rank of its PIFA form; None if it was left as it was.
        skipped: why it was left as it was; None if it is in PIFA form.
        target: whether it counts for the density: skipped by its role (the output head, a `skip` pattern) it does not,
            left dense because PIFA would not be smaller it does.
        stored_before, stored_after: numbers stored, the row order's indices included, biases not.
        error: relative output error on the calibration inputs, ||(W - W') X|| / ||W X||; of experts the root of the
            mean of its square; None where unknown.
        quality: of the factorization; of experts the worst.
        notes: what was out of the ordinary, such as a singular Gram matrix.
        heads: how many of its heads are in a basis of inputs (`BasisLinear`); None in every other form.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    skipped: str | None
    target: bool
    stored_before: int
    stored_after: int
    error: float | None = None
    quality: FactorQuality | None = None
    notes: tuple[str, ...] = ()
    heads: int | None = None

    @classmethod
    def of_factors(
        cls,
        name: str,
        shape: tuple[int, ...],
        rank: int,
        quality: FactorQuality | None,
        *,
        stored_before: int | None = None,
        error: float | None = None,
        notes: Iterable[str] = (),
    ) -> "LayerReport":
        """A layer that is in PIFA form now."""
        *experts, d_out, d_in = shape
        before = math.prod(shape) if stored_before is None else stored_before
        after = math.prod(experts) * stored_numbers(d_out, d_in, rank)
        return cls(name, shape, rank, None, True, before, after, error, quality, tuple(notes))

    @classmethod
    def of_skip(cls, name: str, shape: tuple[int, ...], reason: str, *, target: bool) -> "LayerReport":
        """A layer that was left as it was."""
        dense = math.prod(shape)
        return cls(name, shape, None, reason, target, dense, dense)

    @classmethod
    def of_experts(cls, name: str, experts: Sequence["LayerReport"]) -> "LayerReport":
        """One projection of all experts, from the entries of each, in order; all are in PIFA form, or none."""
        shape, first = (len(experts), *experts[0].shape), experts[0]
        if first.rank is None:
            return cls.of_skip(name, shape, str(first.skipped), target=first.target)
        errors = [each.error for each in experts if each.error is not None]
        error = math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None
        qualities = [each.quality for each in experts if each.quality is not None]
        keys = ("max_coeff", "condition", "error")
        worst = {key: max(getattr(quality, key) for quality in qualities) for key in keys} if qualities else None
        quality = None if worst is None else FactorQuality(**worst)
        rank = max(each.rank or 0 for each in experts)
        noted: dict[str, list[int]] = {}
        for index, each in enumerate(experts):
            for note in each.notes:
                noted.setdefault(note, []).append(index)
        notes = [note if len(of) == len(experts) else f"{note} ({_experts(of)})" for note, of in noted.items()]
        return cls.of_factors(name, shape, rank, quality, error=error, notes=notes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerReport":
        """A layer as `asdict` gave it, or JSON made of that."""
        quality = None if values["quality"] is None else FactorQuality(**values["quality"])
        known = {**values, "shape": tuple(values["shape"]), "notes": tuple(values["notes"]), "quality": quality}
        return cls(**known)


def _experts(numbers: Sequence[int]) -> str:
    more = len(numbers) - _EXPERTS_NAMED
    shown = ", ".join(map(str, numbers[:_EXPERTS_NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"expert{'s' * (len(numbers) > 1)} {shown}"


@dataclass(frozen=True)
class OtherReport:
    """A module that is no linear layer and holds numbers of its own: an embedding, a norm, a convolution, experts.

    Attributes:
        name: its place in the model, as in `named_modules`.
        kind: its class.
        shapes: of its own parameters and buffers, by their names.
        numbers: in its parameters; what an earlier entry shares with it is counted there.
        buffered: in its buffers.
    """

    name: str
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    numbers: int
    buffered: int


@dataclass(frozen=True)
class StepRow:
    """One step of training.

    Attributes:
        step: its number, from 1.
        seconds: since the run began, at its end.
        learning_rate: in it.
        loss: on its batches, before it.
        gradient_norm: before it was clipped.
        held_out: the loss on the held-out batches after it; None where they were not looked at.
    """

    step: int
    seconds: float
    learning_rate: float
    loss: float
    gradient_norm: float
    held_out: float | None


@dataclass
class DistillReport:
    """What `distill` did.

    Attributes:
        loss: what was compared with the teacher, as in `DistillConfig`.
        trained: how many numbers.
        held_out_before, held_out_after: the loss on the held-out batches at the start, and in the state that was kept.
        best_step: after which that state was reached; 0 if it is the one to start with.
        seconds: wall time.
        interrupted: whether the run was stopped before its end by an interrupt.
        steps: all steps.
        notes: what was out of the ordinary.
    """

    loss: str
    trained: int
    held_out_before: float
    held_out_after: float
    best_step: int
    seconds: float
    interrupted: bool = False
    steps: list[StepRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillReport":
        """A report as `asdict` gave it, or JSON made of that."""
        return cls(**{**values, "steps": [StepRow(**row) for row in values["steps"]]})

    def __str__(self) -> str:
        lines = [
            f"distilled: {self.trained:,} numbers trained in {len(self.steps)} steps, {self.seconds:.0f} s; loss on "
            f"held-out batches {self.held_out_before:.4f} -> {self.held_out_after:.4f} (step {self.best_step})"
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass
class Report:
    """What `compress`, `compact` or `distill` did.

    Attributes:
        method: how low-rank weights were made: a name in `METHODS`, or "lossless".
        density_requested: the budget asked for; None for a lossless run.
        layers: one entry a linear layer, in the model's order.
        params_before, params_after: parameters and row orders of the whole model, shared ones counted once.
        seconds: wall time.
        activation_bytes: largest store of calibration activations held at once.
        planned_bytes: of memory that the run was to take, by arithmetic before it started.
        notes: what was not tried, and why.
        others: one entry for everything else that holds numbers, in the model's order.
        distillation: the training after it; None if there was none.
    """

    method: str
    density_requested: float | None
    layers: list[LayerReport] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0
    seconds: float = 0.0
    activation_bytes: int = 0
    planned_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    others: list[OtherReport] = field(default_factory=list)
    distillation: DistillReport | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """A report as `to_dict` gave it, or JSON made of that; of an older version too.

        Raises:
            CheckpointError: it is none.
        """
        plain = ["method", "density_requested", "params_before", "params_after", "seconds", "activation_bytes"]
        try:
            others = [
                OtherReport(**{**other, "shapes": {name: tuple(shape) for name, shape in other["shapes"].items()}})
                for other in values["others"]
            ]
            trained = values.get("distillation")
            return cls(
                **{key: values[key] for key in plain},
                planned_bytes=values.get("planned_bytes", 0),
                layers=[LayerReport.from_dict(layer) for layer in values["layers"]],
                notes=list(values["notes"]),
                others=others,
                distillation=None if trained is None else DistillReport.from_dict(trained),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"what a report should be is none ({type(error).__name__}: {error}); delete the model's "
                "pifa_report.json, or compress again"
            ) from error

    def note(self, text: str) -> None:
        """Adds to `notes` what is not there yet."""
        if text not in self.notes:
            self.notes.append(text)

    def describe_rest(self, model: nn.Module) -> None:
        """Fills `others` with what `model` holds beside the layers."""
        layers = {layer.name for layer in self.layers}
        inside = tuple(f"{name}." for name in layers if name)
        seen = {id(own) for name, module in model.named_modules() if name in layers for own in module.parameters()}
        self.others = []
        for name, module in model.named_modules():
            if name in layers or (inside and name.startswith(inside)):
                continue
            parameters = {key: own for key, own in module.named_parameters(recurse=False) if id(own) not in seen}
            buffers = {key: own for key, own in module.named_buffers(recurse=False) if id(own) not in seen}
            seen |= {id(own) for own in (*parameters.values(), *buffers.values())}
            if parameters or buffers:
                shapes = {key: tuple(own.shape) for key, own in (*parameters.items(), *buffers.items())}
                numbers, buffered = (sum(own.numel() for own in each.values()) for each in (parameters, buffers))
                self.others.append(OtherReport(name, type(module).__name__, shapes, numbers, buffered))

    @property
    def model_density(self) -> float:
        """Numbers that the whole model stores over those that it stored before, whatever they belong to."""
        return self.params_after / self.params_before if self.params_before else 1.0

    @property
    def untouched(self) -> int:
        """Numbers of the whole model that are as they were: in no layer that is in PIFA form, but for its bias."""
        return self.params_after - sum(layer.stored_after for layer in (*self.factorized, *self.in_basis))

    @property
    def untouched_by_kind(self) -> dict[str, int]:
        """`others` by class, and how many numbers each has, most first; what holds none is left out."""
        kinds: dict[str, int] = {}
        for other in self.others:
            kinds[other.kind] = kinds.get(other.kind, 0) + other.numbers
        return {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: -kinds[kind]) if kinds[kind]}

    @property
    def density(self) -> float:
        """Stored numbers over dense numbers of the linears that were targets; 1 if there were none."""
        dense = sum(math.prod(layer.shape) for layer in self.layers if layer.target)
        return sum(layer.stored_after for layer in self.layers if layer.target) / dense if dense else 1.0

    @property
    def linear_density(self) -> float:
        """The same of all linears, those that the budget leaves out too: routers, the output head, `skip` patterns."""
        dense = sum(math.prod(layer.shape) for layer in self.layers)
        return sum(layer.stored_after for layer in self.layers) / dense if dense else 1.0

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers left as they were, each with its reason."""
        return [layer for layer in self.layers if layer.skipped is not None]

    @property
    def factorized(self) -> list[LayerReport]:
        """The layers in PIFA form."""
        return [layer for layer in self.layers if layer.skipped is None and layer.heads is None]

    @property
    def in_basis(self) -> list[LayerReport]:
        """The layers whose heads are in a basis of inputs."""
        return [layer for layer in self.layers if layer.heads is not None]

    @property
    def rest(self) -> str:
        """In words, how much of the model is as it was, and what holds most of that."""
        kinds = [f"{numbers:,} in {kind}" for kind, numbers in self.untouched_by_kind.items()]
        shown = kinds[:_KINDS_SHOWN] + (["others"] if len(kinds) > _KINDS_SHOWN else [])
        share = self.untouched / self.params_before if self.params_before else 0.0
        beside = f"; beside linear layers {', '.join(shown)}" if shown else ""
        return f"{self.untouched:,} numbers ({share:.0%} of the model) are as they were{beside}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "density_requested": self.density_requested,
            "density": self.density,
            "linear_density": self.linear_density,
            "model_density": self.model_density,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "seconds": self.seconds,
            "activation_bytes": self.activation_bytes,
            "planned_bytes": self.planned_bytes,
            "notes": self.notes,
            "untouched": self.untouched,
            "layers": [asdict(layer) for layer in self.layers],
            "others": [asdict(other) for other in self.others],
            "distillation": None if self.distillation is None else asdict(self.distillation),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {len(self.factorized)} layers in PIFA form, {len(self.skipped)} left as they were; "
            f"density {self.density:.4f}, {self.linear_density:.4f} with the linears that do not count for it, "
            f"{self.params_before:,} -> {self.params_after:,} parameters "
            f"({self.model_density:.4f} of the whole model) in {self.seconds:.1f} s"
        ]
        if self.in_basis:
            heads = sum(layer.heads or 0 for layer in self.in_basis)
            lines.append(f"  {heads} heads of attention in a basis of inputs, in {len(self.in_basis)} layers")
        reasons: dict[str, int] = {}
        for layer in self.skipped:
            reasons[str(layer.skipped)] = reasons.get(str(layer.skipped), 0) + 1
        lines += [f"  {count} left: {reason}" for reason, count in reasons.items()]
        lines += [f"  {self.rest}"] if self.others else []
        lines += [f"  {note}" for note in self.notes]
        lines += [str(self.distillation)] if self.distillation is not None else []
        return "\n".join(lines)

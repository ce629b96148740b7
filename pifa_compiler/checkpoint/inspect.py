"""What a saved PIFA model is made of: shapes and ranks from its tensors, the rest from the report saved with it."""

import math
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..drafts import delete_abandoned
from ..errors import CheckpointError
from ..factors import rounding_error, stored_numbers
from .checksums import verify_checksums
from .format import FLOATING, all_ranks, open_tensors, read_report, read_settings, weight_files

Kind = TypeVar("Kind", int, float, str, list[Any])


@dataclass(frozen=True)
class Layer:
    """One linear, or one projection of all experts; of those left dense only what the report says is known.

    Attributes:
        name: its place in the model.
        shape: (out, in) of its weight, (experts, out, in) of experts.
        rank: of its PIFA form; None if it is dense.
        stored_before, stored_after: numbers stored, pivot indices included, biases not.
        max_coeff: largest |coefficient|, of all experts; rounding errors of the pivot rows grow by about this much.
        bf16_error: relative Frobenius error of its dense weight once its factors are rounded to bfloat16, estimated
            (of experts the worst; `factors.rounding_error`); 0 if they are stored so, None if it is dense.
        error: relative output error on the calibration inputs; None where unknown.
        skipped: why it is dense; None if it is in PIFA form.
        notes: what was out of the ordinary.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    stored_before: int
    stored_after: int
    max_coeff: float | None = None
    bf16_error: float | None = None
    error: float | None = None
    skipped: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """A saved model.

    Attributes:
        method, density_requested, density: from config.json; None where unknown.
        params_before, params_after: of the whole model, from the report; None without one.
        layers: in the model's order where the report tells it.
    """

    method: str | None
    density_requested: float | None
    density: float | None
    params_before: int | None
    params_after: int | None
    layers: list[Layer]

    @property
    def stored_before(self) -> int:
        """Numbers in the dense weights of all layers listed."""
        return sum(layer.stored_before for layer in self.layers)

    @property
    def stored_after(self) -> int:
        """Numbers stored for all layers listed."""
        return sum(layer.stored_after for layer in self.layers)

    @property
    def max_coeff(self) -> float | None:
        """Largest |coefficient| of all layers; None where there is none."""
        return max((layer.max_coeff for layer in self.layers if layer.max_coeff is not None), default=None)

    @property
    def bf16_error(self) -> float | None:
        """Largest error of a layer by rounding to bfloat16; None where there is none."""
        return max((layer.bf16_error for layer in self.layers if layer.bf16_error is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("stored_before", "stored_after", "max_coeff", "bf16_error")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def inspect(folder: str | os.PathLike[str], *, verify: bool = False) -> Inspection:
    """Reads a folder that `save_pretrained` has written; weights are read one layer at a time.

    Args:
        folder: the folder.
        verify: whether to compare all tensors with the checksums saved with them.

    Raises:
        CheckpointError: it is no PIFA model, it is damaged, or its report is; with `verify`, a tensor is not what was
            saved, or there are no checksums.
    """
    delete_abandoned(Path(folder).parent)
    settings = read_settings(folder)
    if verify:
        verify_checksums(Path(folder))
    report = read_report(folder) or {}
    measured = _measure_layers(Path(folder), all_ranks(settings))
    try:
        rows = {row["name"]: row for row in report.get("layers", [])}
        layers = [_merge(row, measured.get(name)) for name, row in rows.items()]
        before, after = (_optional(report.get(key), int) for key in ("params_before", "params_after"))
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: pifa_report.json is damaged ({error!r}); delete it or save again") from error
    layers += [layer for name, layer in measured.items() if name not in rows]
    method, requested, density = (settings.get(key) for key in ("method", "density_requested", "density"))
    return Inspection(method, requested, density, before, after, layers)


def _measure_layers(folder: Path, ranks: dict[str, int]) -> dict[str, Layer]:
    """What the tensors of each layer in PIFA form say of it."""
    places: dict[str, dict[str, Any]] = {}
    measured = {}
    with ExitStack() as stack:
        files = weight_files(folder)
        opened = {file: stack.enter_context(open_tensors(file)) for file in dict.fromkeys(files.values())}
        for key, file in files.items():
            name, _, part = key.rpartition(".")
            if part in ("w_pivot", "coeff"):
                places.setdefault(name, {})[part] = opened[file]
        whole = {name: parts for name, parts in places.items() if len(parts) == 2}
        if len(whole) != len(ranks):
            raise CheckpointError(
                f"{folder}: config.json names {len(ranks)} PIFA layers, its safetensors files hold {len(whole)}; "
                "it is damaged or incomplete: copy or save it again"
            )
        for name, parts in whole.items():
            w_pivot, coeff = (parts[part].get_tensor(f"{name}.{part}") for part in ("w_pivot", "coeff"))
            measured[name] = _measure(name, w_pivot, coeff)
    # transformers renames tensors of some architectures when it saves.
    own_names = dict(zip(sorted(measured.keys() - ranks), sorted(ranks.keys() - measured.keys()), strict=True))
    renamed = [replace(layer, name=own_names.get(name, name)) for name, layer in measured.items()]
    return {layer.name: layer for layer in renamed}


def _measure(name: str, w_pivot: Tensor, coeff: Tensor) -> Layer:
    fits = w_pivot.ndim == coeff.ndim in (2, 3) and w_pivot.shape[:-2] == coeff.shape[:-2] and w_pivot.numel() > 0
    fits = fits and w_pivot.shape[-2] == coeff.shape[-1]
    if not fits or not {w_pivot.dtype, coeff.dtype} <= set(FLOATING):
        found = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in (w_pivot, coeff))
        raise CheckpointError(f"{name}: w_pivot and coeff, {found}, do not fit each other; the file is damaged")
    *experts, rank, d_in = w_pivot.shape
    shape = (*experts, d_out := rank + coeff.shape[-2], d_in)
    each = zip(w_pivot.view(-1, rank, d_in), coeff.view(-1, d_out - rank, rank), strict=True)
    return Layer(
        name,
        shape,
        rank,
        math.prod(shape),
        math.prod(experts) * stored_numbers(d_out, d_in, rank),
        max_coeff=float(coeff.abs().max()) if coeff.numel() else 0.0,
        bf16_error=max(rounding_error(*factors) for factors in each),
    )


def _merge(row: dict[str, Any], measured: Layer | None) -> Layer:
    """What the report says about a layer, and what its tensors say where they do.

    Raises:
        LookupError, TypeError, ValueError: the report says something odd.
    """
    quality = row.get("quality") or {}
    told = Layer(
        _is_a(row["name"], str),
        _shape(row["shape"]),
        _optional(row["rank"], int),
        _is_a(row["stored_before"], int),
        _is_a(row["stored_after"], int),
        _optional(quality.get("max_coeff"), float),
        error=_optional(row["error"], float),
        skipped=_optional(row["skipped"], str),
        notes=tuple(_is_a(note, str) for note in _is_a(row["notes"], list)),
    )
    if measured is None:
        return told
    return replace(measured, error=told.error, skipped=told.skipped, notes=told.notes)


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    """(out, in) of a linear, (experts, out, in) of a projection of experts."""
    if len(sizes) not in (2, 3):
        raise ValueError(f"{sizes!r:.80} is no shape of a weight")
    return tuple(_is_a(size, int) for size in sizes)


def _is_a(value: Any, kind: type[Kind]) -> Kind:
    """`value`, which has to be of this kind; a float may be written as an integer."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return kind(value)


def _optional(value: Any, kind: type[Kind]) -> Kind | None:
    return None if value is None else _is_a(value, kind)

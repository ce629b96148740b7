"""What a saved PIFA model is made of: shapes and ranks from its tensors, the rest from the report saved with it."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..factors import stored_numbers
from .format import read_report, read_settings


@dataclass(frozen=True)
class Layer:
    """One linear; of those left dense only what the report says is known.

    Attributes:
        name: its place in the model.
        shape: (out, in) of its weight.
        rank: of its PIFA form; None if it is dense.
        stored_before, stored_after: numbers stored, pivot indices included, biases not.
        max_coeff: largest |coefficient|.
        error: relative output error on the calibration inputs; None where unknown.
        skipped: why it is dense; None if it is in PIFA form.
        notes: what was out of the ordinary.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    stored_before: int
    stored_after: int
    max_coeff: float | None = None
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "stored_before": self.stored_before, "stored_after": self.stored_after}


def inspect(folder: str | os.PathLike[str]) -> Inspection:
    """Reads a folder that `save_pretrained` has written; weights are read one layer at a time.

    Raises:
        CheckpointError: it is no PIFA model, it is damaged, or its report is.
    """
    settings = read_settings(folder)
    report = read_report(folder) or {}
    measured = {name: _measure(name, *found) for name, found in _tensors(Path(folder), settings["ranks"]).items()}
    try:
        rows = {row["name"]: row for row in report.get("layers", [])}
        layers = [_merge(row, measured.get(name)) for name, row in rows.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: pifa_report.json is damaged ({error!r}); delete it or save again") from error
    layers += [layer for name, layer in measured.items() if name not in rows]
    return Inspection(
        settings.get("method"),
        settings.get("density_requested"),
        settings.get("density"),
        report.get("params_before"),
        report.get("params_after"),
        layers,
    )


def _tensors(folder: Path, ranks: dict[str, int]) -> dict[str, tuple[list[int], list[int], float]]:
    """Shapes of `w_pivot` and `coeff`, and the largest |coefficient|, of each layer."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, dict[str, Any]] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 -- safe_open is no mapping
                    name, _, part = key.rpartition(".")
                    if part == "w_pivot":
                        found.setdefault(name, {})["w_pivot"] = tensors.get_slice(key).get_shape()
                    elif part == "coeff":
                        coeff = tensors.get_tensor(key)
                        found.setdefault(name, {})["coeff"] = list(coeff.shape)
                        found[name]["largest"] = float(coeff.abs().max()) if coeff.numel() else 0.0
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); save the model again") from error
    whole = {name: parts for name, parts in found.items() if {"w_pivot", "coeff"} <= parts.keys()}
    if len(whole) != len(ranks):
        raise CheckpointError(
            f"{folder}: config.json names {len(ranks)} PIFA layers, its safetensors files hold {len(whole)}; "
            "it is damaged or incomplete: copy or save it again"
        )
    return {name: (parts["w_pivot"], parts["coeff"], parts["largest"]) for name, parts in whole.items()}


def _measure(name: str, w_pivot: list[int], coeff: list[int], largest: float) -> Layer:
    if len(w_pivot) != 2 or len(coeff) != 2 or w_pivot[0] != coeff[1]:
        raise CheckpointError(f"{name}: w_pivot {w_pivot} and coeff {coeff} do not fit each other; the file is damaged")
    rank, d_out, d_in = w_pivot[0], w_pivot[0] + coeff[0], w_pivot[1]
    return Layer(name, (d_out, d_in), rank, d_out * d_in, stored_numbers(d_out, d_in, rank), largest)


def _merge(row: dict[str, Any], measured: Layer | None) -> Layer:
    """What the report says about a layer, and what its tensors say where they do."""
    shape = (int(row["shape"][0]), int(row["shape"][1]))
    if measured is None:
        quality = row.get("quality") or {}
        before, after = int(row["stored_before"]), int(row["stored_after"])
        extra: dict[str, Any] = {"max_coeff": quality.get("max_coeff")}
    else:
        shape, before, after = measured.shape, measured.stored_before, measured.stored_after
        extra = {"max_coeff": measured.max_coeff}
    rank = row["rank"] if measured is None else measured.rank
    return Layer(
        row["name"],
        shape,
        rank,
        before,
        after,
        error=row["error"],
        skipped=row["skipped"],
        notes=tuple(row["notes"]),
        **extra,
    )

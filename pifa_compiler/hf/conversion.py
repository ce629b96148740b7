"""How transformers makes a model's tensors of those in its files: what it renames, puts together, or takes apart.

The files of a mixture of experts have a matrix for each expert, `experts.3.w1.weight`; the model has one parameter for
all of them. transformers' own conversion of each class does that (`transformers.core_model_loading`).
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.format import loading_errors
from ..errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """A tensor in a file.

    Attributes:
        path: of the file.
        name: in it.
        pattern: which of the converter's sources it is.
    """

    path: Path
    name: str
    pattern: str


@dataclass(frozen=True)
class Origin:
    """What a tensor of a model is made of, and others perhaps with it.

    Attributes:
        target: its name in the model, or that of the first that is made.
        parts: in the order that transformers takes them in.
        converter: a `WeightConverter` of transformers; None where the one part is what is wanted.
        model: the model.
    """

    target: str
    parts: tuple[Part, ...]
    converter: Any = None
    model: Any = None

    def make(self, value: Callable[[Part], Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in the model, from the values of the parts."""
        if self.converter is None:
            return {self.target: value(self.parts[0])}
        converter = copy.deepcopy(self.converter)
        for part in self.parts:
            converter.add_tensor(self.target, part.name, part.pattern, value(part))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}

    def entry(self, index: int) -> "Origin | None":
        """What makes the tensor [1, ..] of one entry along the first dimension alone; None if nothing is known to."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        first, *others = [None] if self.converter is None else self.converter.operations
        if not (isinstance(first, MergeModulelist) and first.dim == 0):
            return None
        if not all(isinstance(other, Concatenate) and other.dim > 0 for other in others):
            return None
        seen: Counter[str] = Counter()
        parts = []
        for part in self.parts:
            if seen[part.pattern] == index:
                parts.append(part)
            seen[part.pattern] += 1
        return replace(self, parts=tuple(parts))


def find_origins(model: Any, files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """What the tensors of a model are made of, by their names in it; tensors that no file holds are left out.

    Args:
        model: a `PreTrainedModel`, on the meta device.
        files: the file of each tensor.
        shapes: the shape of each tensor.

    Raises:
        CheckpointError: transformers cannot convert tensors of these shapes.
    """
    from transformers.core_model_loading import dot_natural_key

    rename, converters = _renaming(model)
    wanted = model.state_dict()
    by_target: dict[str, Origin] = {}
    for name in sorted(files, key=dot_natural_key):
        target, pattern = rename(name)
        if target in wanted:
            part = Part(files[name], name, pattern or "")
            known = by_target.get(target)
            if known is None or pattern is None:
                by_target[target] = Origin(target, (part,), converters.get(pattern), model)
            else:
                by_target[target] = replace(known, parts=(*known.parts, part))
    found: dict[str, Origin] = {}
    for origin in by_target.values():
        try:
            made = origin.make(lambda part: torch.empty(shapes[part.name], device="meta"))
        except loading_errors() as error:
            raise CheckpointError(
                f"transformers cannot make {origin.target} of a {type(model).__name__} from {origin.parts[0].name}"
                f"{' and others' if len(origin.parts) > 1 else ''} ({error}); the files do not belong together"
            ) from error
        for name, tensor in made.items():
            if name in wanted and tensor.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{origin.parts[0].path.parent}: {name} is {list(tensor.shape)}, a {type(model).__name__} of its "
                    f"config.json has {list(wanted[name].shape)}; the files do not belong together, fetch the model "
                    "again"
                )
            found[name] = origin
    return found


def check_own_names(model: Any) -> None:
    """Refuses a model whose tensors, saved under their own names, transformers would call or make otherwise.

    Raises:
        CheckpointError: naming the first.
    """
    rename, _ = _renaming(model)
    for name in model.state_dict():
        target, pattern = rename(name)
        if target != name or pattern is not None:
            raise CheckpointError(
                f"transformers would take {name} of a {type(model).__name__}, saved as it is, for {target}; load the "
                "model and call compress() on it"
            )


def _renaming(model: Any) -> tuple[Callable[[str], tuple[str, str | None]], dict[str | None, Any]]:
    """What gives a tensor in a file its name in the model and the pattern of its converter; and these by pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, wanted = model.base_model_prefix, model.state_dict()

    def rename(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, wanted)
        if found[0] not in wanted and name in wanted:
            return name, None
        return found

    return rename, {pattern: converter for converter in converters for pattern in converter.source_patterns}

"""A Hugging Face model whose weights stay in their files: its modules are on the meta device."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.format import CONFIG, check_layers, few_modules, loading_errors, open_tensors, weight_files
from ..errors import CheckpointError, ConfigError
from ..graph.weights import EntryView
from ..memory import read_ahead, trim_heap
from .conversion import Origin, Part, check_own_names, find_origins
from .loading import DTYPES, explain_failure, find_folder, model_class, quietly, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightsInFiles:
    """The weights of a model, read from safetensors files when they are asked for (see `graph.weights.Weights`).

    Files are mapped into memory while their tensors are in use, so that only what is read takes any.

    Args:
        origins: for each name in the model's state dict what it is made of, and the name of what is made there.
        dtypes: what each is to be.
        held: tensors that are in no file, such as rotary tables.
        device: where tensors go.
    """

    def __init__(
        self,
        origins: Mapping[str, tuple[Origin, str]],
        dtypes: Mapping[str, torch.dtype],
        held: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._origins = dict(origins)
        self._dtypes, self._device = dtypes, device
        self._held = {name: tensor.to(device) for name, tensor in held.items()}
        self._views: dict[str, EntryView] = {}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._read: dict[str | tuple[str, int], Tensor] = {}

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return sorted({part.path for origin, _ in self._origins.values() for part in origin.parts})

    def add_views(self, views: Mapping[str, EntryView]) -> None:
        """Lets names be read that are of parts of the model's tensors."""
        self._views |= views

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the device and in the dtype it is wanted in.

        Raises:
            CheckpointError: there is none, or its file was damaged or taken away meanwhile.
        """
        if name in self._held:
            return self._held[name]
        if name in self._views:
            view = self._views[name]
            entry = self._entry(view.of, view.index)
            return entry.as_strided(view.shape, view.stride, entry.storage_offset() + view.offset)
        if name not in self._read:
            origin, made_as = self._origin(name)
            made = origin.make(lambda part: self._value(part, name))
            self._read.update(made.items())  # of one that is taken apart the others will be asked for too
            self._read[name] = made[made_as]
        return self._read[name]

    def _entry(self, name: str, index: int) -> Tensor:
        """One entry of a tensor along its first dimension, without the others where the files have it by itself."""
        key = name, index
        if key not in self._read:
            origin, made_as = self._origin(name)
            alone = origin.entry(index)
            if alone is not None:
                self._read[key] = alone.make(lambda part: self._value(part, name))[made_as][0].contiguous()
            elif origin.converter is None:
                self._read[key] = self._value(origin.parts[0], name, index).contiguous()
            else:
                self._read[key] = self.read(name)[index].contiguous()
        return self._read[key]

    def _origin(self, name: str) -> tuple[Origin, str]:
        if name not in self._origins:
            raise CheckpointError(f"no file holds the tensor {name}; fetch the model again")
        return self._origins[name]

    def _value(self, part: Part, name: str, index: int | None = None) -> Tensor:
        """A tensor of a file, or one entry of it, as the tensor `name` of the model is to be."""
        if part.path not in self._open:
            self._open[part.path] = self._stack.enter_context(open_tensors(part.path))
        found = _tensor(self._open[part.path], part.name, part.path)
        return (found if index is None else found[index]).to(self._device, self._dtypes.get(name, found.dtype))

    def expect(self, names: Iterable[str]) -> None:
        """Has the disk bring tensors into the system's cache; they take no memory of the process."""
        wanted: set[tuple[Path, str, int | None]] = set()
        for name in names:
            view = self._views.get(name)
            key = name if view is None else (view.of, view.index)
            origin, _ = self._origins.get(name if view is None else view.of, (None, ""))
            if origin is None or key in self._read:
                continue
            alone = None if view is None else origin.entry(view.index)
            index = view.index if view is not None and origin.converter is None else None
            wanted |= {(part.path, part.name, index) for part in (alone or origin).parts}
        for path, stored, index in wanted:
            with open_tensors(path) as tensors:
                found = _tensor(tensors, stored, path)
                read_ahead(found if index is None else found[index])

    def give_back(self) -> None:
        """Lets go of all tensors that were read, and of the files that they lie in."""
        self._read.clear()
        self._open.clear()
        self._stack.close()
        trim_heap()


@dataclass(frozen=True)
class StoredModel:
    """A model that is not in memory.

    Attributes:
        folder: where it lies.
        model: its modules, parameters on the meta device, buffers that are in no file with their values.
        weights: its tensors.
        bytes: of all files that hold weights.
    """

    folder: Path
    model: "PreTrainedModel"
    weights: WeightsInFiles
    bytes: int


def open_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> StoredModel:
    """Opens a model without reading its weights.

    Args:
        name: a folder with config.json and safetensors files, sharded or not, or a name on the Hugging Face Hub, which
            is fetched into the hub's cache.
        dtype: of the weights, as in `load_model`.
        device: where weights go when they are read; None is the CPU.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        CheckpointError: there is no such model, it cannot be reached, its files are missing, truncated or of another
            model, or the output would not be read again as it is written.
        ConfigError: `dtype` is not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    from accelerate import init_empty_weights

    folder = find_folder(name)
    place = torch.device("cpu") if device is None else device
    files = weight_files(folder)
    check_layers(folder / CONFIG, len(files))
    try:
        with quietly(), few_modules(len(files)):
            config = read_config(str(folder), trust_remote_code=trust_remote_code)
            if getattr(config, "quantization_config", None) is not None:
                raise CheckpointError(f"{folder} holds a quantized model; wanted one with plain weights")
            kind = model_class(config)
            wanted = _dtype_of(config, dtype, files)
            with init_empty_weights(include_buffers=False):
                model: PreTrainedModel = (
                    kind.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
                    if kind.__name__.startswith("Auto")
                    else kind._from_config(config, dtype=wanted)
                )
            model.tie_weights()
    except loading_errors() as error:
        raise explain_failure(folder, error, "a model in safetensors form") from error
    model.eval()
    origins = _origins(model, files, folder)
    check_own_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {key: buffer for key, buffer in model.named_buffers() if key not in origins}
    dtypes = {key: parameter.dtype for key, parameter in parameters.items()}
    weights = WeightsInFiles(origins, dtypes, held, place)
    return StoredModel(folder, model, weights, sum(path.stat().st_size for path in set(files.values())))


def _dtype_of(config: Any, dtype: str | None, files: Mapping[str, Path]) -> torch.dtype:
    """The dtype asked for; else what the config names, else that of the first tensor."""
    if dtype not in (None, "auto"):
        named: torch.dtype = getattr(torch, str(dtype))
        return named
    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    for name, path in files.items():
        with open_tensors(path) as tensors:
            dtype_of_first = _tensor(tensors, name, path).dtype
        if dtype_of_first.is_floating_point:
            return dtype_of_first
    raise CheckpointError(f"{next(iter(files.values()), 'the model')} holds no floating-point tensor; it is no model")


def _tensor(tensors: Any, name: str, path: Path) -> Tensor:
    """A tensor of an open file, mapped into memory."""
    from safetensors import SafetensorError

    try:
        found: Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError, KeyError, AttributeError) as error:  # the last two for dtypes unknown to torch
        raise CheckpointError(f"{path}: {name} cannot be read ({error}); fetch the model again") from error
    return found


def _origins(model: "PreTrainedModel", files: Mapping[str, Path], folder: Path) -> dict[str, tuple[Origin, str]]:
    """What every parameter and saved buffer is made of, tied ones included, after shapes were compared."""
    wanted = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    made = find_origins(model, files, _shapes(files))
    names_of: dict[int, list[str]] = {}
    for key, tensor in wanted.items():
        names_of.setdefault(id(tensor), []).append(key)
    origins: dict[str, tuple[Origin, str]] = {}
    for keys in names_of.values():
        stored = next((key for key in keys if key in made), None)
        if stored is None:
            raise CheckpointError(
                f"{folder} lacks {keys[0]} of a {type(model).__name__}: it is incomplete, fetch the model again"
            )
        origins.update(dict.fromkeys(keys, (made[stored], stored)))
    return origins


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with open_tensors(path) as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return found

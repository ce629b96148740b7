"""A Hugging Face model whose weights stay in their files: its modules are on the meta device."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.format import CONFIG, check_layers, few_modules, loading_errors, open_tensors, weight_files
from ..errors import CheckpointError, ConfigError
from ..memory import read_ahead, trim_heap
from .loading import DTYPES, explain_failure, find_folder, model_class, quietly, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightsInFiles:
    """The weights of a model, read from safetensors files when they are asked for (see `graph.weights.Weights`).

    Files are mapped into memory while their tensors are in use, so that only what is read takes any.

    Args:
        files: for each name in the model's state dict the file and the name in it; tied tensors have one of both.
        dtypes: what each is to be.
        held: tensors that are in no file, such as rotary tables.
        device: where tensors go.
    """

    def __init__(
        self,
        files: Mapping[str, tuple[Path, str]],
        dtypes: Mapping[str, torch.dtype],
        held: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.files = dict(files)
        self._dtypes, self._device = dtypes, device
        self._held = {name: tensor.to(device) for name, tensor in held.items()}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._read: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the device and in the dtype it is wanted in.

        Raises:
            CheckpointError: there is none, or its file was damaged or taken away meanwhile.
        """
        if name in self._held:
            return self._held[name]
        if name not in self._read:
            if name not in self.files:
                raise CheckpointError(f"no file holds the tensor {name}; fetch the model again")
            path, stored = self.files[name]
            if path not in self._open:
                self._open[path] = self._stack.enter_context(open_tensors(path))
            found = _tensor(self._open[path], stored, path)
            self._read[name] = found.to(self._device, self._dtypes.get(name, found.dtype))
        return self._read[name]

    def expect(self, names: Iterable[str]) -> None:
        """Has the disk bring tensors into the system's cache; they take no memory of the process."""
        for path, stored in {self.files[name] for name in names if name in self.files and name not in self._read}:
            with open_tensors(path) as tensors:
                read_ahead(_tensor(tensors, stored, path))

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
            model, or they hold weights that transformers would convert while it loads them.
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
    places = _places(model, files, folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {key: buffer for key, buffer in model.named_buffers() if key not in places}
    dtypes = {key: parameter.dtype for key, parameter in parameters.items()}
    weights = WeightsInFiles(places, dtypes, held, place)
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


def _places(model: nn.Module, files: Mapping[str, Path], folder: Path) -> dict[str, tuple[Path, str]]:
    """The place of every parameter and saved buffer, tied ones included, after shapes were compared."""
    wanted = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    shapes = _shapes(files)
    names_of: dict[int, list[str]] = {}
    for key, tensor in wanted.items():
        names_of.setdefault(id(tensor), []).append(key)
    places: dict[str, tuple[Path, str]] = {}
    for keys in names_of.values():
        stored = next((key for key in keys if key in files), None)
        if stored is None:
            raise CheckpointError(
                f"{folder} lacks {keys[0]} of a {type(model).__name__}: it is incomplete, or transformers converts "
                "its tensors while it loads them; load the model and call compress() on it"
            )
        if shapes[stored] != tuple(wanted[stored].shape):
            raise CheckpointError(
                f"{folder}: {stored} is {list(shapes[stored])}, a {type(model).__name__} of its config.json has "
                f"{list(wanted[stored].shape)}; the files do not belong together, fetch the model again"
            )
        places.update(dict.fromkeys(keys, (files[stored], stored)))
    return places


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with open_tensors(path) as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return found

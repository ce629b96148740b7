"""Writing a compressed model whose tensors are not in memory: one shard at a time."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..drafts import sync
from ..files import atomic_folder
from ..report import Report
from .format import CONFIG, INDEX, PICKLES, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_COPIED = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".md")


def write_model(
    model: "PreTrainedModel",
    folder: str | os.PathLike[str],
    read: Callable[[str], Tensor],
    report: Report,
    *,
    source: Path,
    shard_bytes: int,
    overwrite: bool = False,
    complete: Callable[[Path], None] = lambda draft: None,
) -> None:
    """Writes a model with layers in PIFA form into a folder, wholly or not at all, as `save_pretrained` does.

    Args:
        model: its modules; their tensors may be on the meta device.
        folder: where to.
        read: gives a tensor by its name in the model's state dict.
        report: goes into the config and beside it.
        source: the folder of the dense model, whose other files (tokenizer, generation settings) are copied.
        shard_bytes: how much of the weights to hold, and to write into one file.
        overwrite: whether a saved model of that name may be replaced.
        complete: called with the folder that holds all, on the disk, just before it takes its name.

    Raises:
        CheckpointError: the model could not be loaded again, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from . import write_beside
    from .quantizer import add_guard, check_loadable, describe

    settings = describe(model, report)
    check_loadable(model, model.config.quantization_config)
    own = _distinct(model.state_dict(keep_vars=True))
    guard = add_guard({}, model)
    shards = list(_shards({**own, **guard}, shard_bytes))
    with atomic_folder(folder, overwrite=overwrite) as partial:
        _copy_beside(source, partial)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(partial)
        places: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _own(guard[name] if name in guard else read(name)) for name in names}
            try:
                save_file(tensors, partial / file, metadata={"format": "pt"})
            except SafetensorError as error:  # how safetensors reports that the disk is full
                raise OSError(str(error)) from error
            places.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_beside(partial, model, settings, report)
        for path in (*partial.iterdir(), partial):
            sync(path)
        complete(partial)


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in memory of its own."""
    return tensor.detach().cpu().contiguous()


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tied tensors the first."""
    seen: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors.items() if seen.setdefault(id(tensor), name) == name}


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, in lists of tensors that take no more than `limit` bytes together, or of one that takes more."""
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _copy_beside(source: Path, folder: Path) -> None:
    """Copies what lies beside a model's weights and is not about them."""
    for path in sorted(source.iterdir()):
        about = path.name in (CONFIG, INDEX) or path.suffix in _NOT_COPIED or path.name.endswith(".index.json")
        if path.is_file() and not about and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)

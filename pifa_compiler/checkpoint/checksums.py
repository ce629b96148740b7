"""A checksum for each tensor of a saved model, in a file beside it: whether they are still what was saved."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .format import open_tensors, read_json, weight_files

CHECKSUMS = "pifa_checksums.json"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of a folder that holds a model's weights."""
    content = json.dumps({"sha256": _measure(folder)}, indent=2)
    (folder / CHECKSUMS).write_text(content + "\n", encoding="utf-8")


def verify_checksums(folder: Path) -> None:
    """Reads all tensors of a saved model and compares their checksums with those saved with it.

    Raises:
        CheckpointError: naming a tensor that differs, or is not there; or the folder was saved without checksums.
    """
    if not (folder / CHECKSUMS).exists():
        raise CheckpointError(f"{folder} has no {CHECKSUMS}, so nothing can be verified; save it again")
    wanted = read_json(folder / CHECKSUMS).get("sha256")
    if not isinstance(wanted, dict):
        raise CheckpointError(f"{folder / CHECKSUMS} has no table `sha256`; it is damaged, copy the model again")
    found = _measure(folder)
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differ:
        raise CheckpointError(
            f"{folder}: {len(differ)} of {len(wanted)} tensors are not what was saved, {differ[0]} first; "
            "copy or save the model again"
        )


def _measure(folder: Path) -> dict[str, str]:
    files = weight_files(folder)
    checksums = {}
    for file in dict.fromkeys(files.values()):
        with open_tensors(file) as tensors:
            for name in (name for name, place in files.items() if place == file):
                checksums[name] = _checksum(tensors.get_tensor(name))
    return checksums


def _checksum(tensor: Tensor) -> str:
    """Of its dtype, shape and bytes, in hexadecimal digits."""
    data = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    data.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return data.hexdigest()

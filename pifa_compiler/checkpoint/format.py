"""The files of a saved model: their names, what they say, and what is refused before anything of them is loaded."""

import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import CheckpointError
from ..experts import layer_name

FORMAT_VERSION = 4
"""Of what is in config.json and of the tensors' names and shapes; a reader refuses what is newer than itself.

1 says which layers are in PIFA form; 2 says of which pairs of linears besides, 3 of which projections of experts, and 4
of which layers heads are in a basis of inputs; each is written where there is something that the one before does not
know.
"""

QUANT_METHOD = "pifa"

CONFIG, WEIGHTS, INDEX, REPORT = "config.json", "model.safetensors", "model.safetensors.index.json", "pifa_report.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_GENERATION = "generation_config.json"
_PARTS = ("w_pivot", "coeff", "pivots")

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that weights may have. Narrower ones are read by nothing that computes a layer."""

_FLOATING_NAMES = ("F64", "F32", "F16", "BF16")

_LARGEST_JSON = 1 << 28
"""Bytes; those of the largest models have some 2 ** 23."""

_MOST_BUFFERED = 1 << 26
"""Numbers of a model that are in no file: tables of positions, masks."""

_MOST_MODULES = (1000, 16)
"""Of a model: so many, and so many for each tensor in its files. Dense models have less than two for each."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer's tensors have to look like: the dense weight is [out_features, in_features].

    Attributes:
        out_features, in_features, rank: the shape of the weight, or of every expert's.
        bias: whether there is one.
        experts: how many weights there are; None in a linear layer, which has one.
    """

    out_features: int
    in_features: int
    rank: int
    bias: bool
    experts: int | None = None


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json of a PIFA folder says about it: ranks, method, densities and versions.

    Raises:
        CheckpointError: there is no such file, it is not JSON, not of a PIFA model, or of a newer format.
    """
    path = Path(folder) / CONFIG
    settings = read_json(path).get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not a PIFA model; load it with transformers and compress() it")
    check_settings(settings, str(path))
    return settings


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report saved with a model, as `Report.to_dict` gave it; None if there is none."""
    path = Path(folder) / REPORT
    return read_json(path) if os.path.lexists(path) else None


def check_folder(folder: Path) -> dict[str, Path]:
    """Refuses a local folder that is not a whole PIFA model; reads the JSON files and the headers of the others.

    Returns:
        The file of each tensor, as `weight_files` does.

    Raises:
        CheckpointError: naming the file.
        OSError: it cannot be read.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; wanted a folder that save_pretrained has written")
    if not folder.is_dir():
        kind = "a pickle, which is never loaded" if folder.name.endswith(PICKLES) else "a file"
        raise CheckpointError(f"{folder} is {kind}; wanted a folder that save_pretrained has written")
    refuse_pickles(folder)
    read_settings(folder)
    tensors = weight_files(folder)
    if not (folder / WEIGHTS).exists() and not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        raise CheckpointError(f"{folder / INDEX} has no table `metadata`; it is damaged, copy it again")
    refuse_fetched_code(read_json(folder / CONFIG), str(folder / CONFIG))
    check_layers(folder / CONFIG, len(tensors))
    if os.path.lexists(folder / _GENERATION):
        read_json(folder / _GENERATION)
    return tensors


def weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a saved model, dense or not; reads an index and the files' headers.

    Raises:
        CheckpointError: there are none, one is missing or truncated, or the index names a file that is not beside it or
            a tensor that is not in its file.
    """
    if (folder / WEIGHTS).exists():
        with open_tensors(folder / WEIGHTS) as tensors:
            return dict.fromkeys(tensors.keys(), folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it is incomplete, copy or save it again")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{folder / INDEX} has no table `weight_map`; it is damaged, copy it again")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {shard!r}; wanted safetensors files beside it")
    held: set[tuple[str, str]] = set()
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / shard} is missing, {folder / INDEX} names it; copy or save the model again"
            )
        with open_tensors(folder / shard) as tensors:
            held |= {(key, shard) for key in tensors.keys()}  # noqa: SIM118
    for key, shard in shards.items():
        if (key, shard) not in held:
            raise CheckpointError(
                f"{folder / shard} does not hold {key}, which {folder / INDEX} says it does; copy the model again"
            )
    return {key: folder / shard for key, shard in shards.items()}


def check_layers(config: Path, tensors: int) -> None:
    """Refuses a config of far more layers than there are tensors: some configs make lists as long as that.

    Raises:
        CheckpointError: naming the entry.
    """
    for key, value in _entries(read_json(config)):
        if key.endswith(("layer", "layers")) and isinstance(value, int) and value > max(tensors, _MOST_MODULES[0]):
            raise CheckpointError(f"{config} says {key}: {value}, the files hold {tensors} tensors; it is damaged")


def quant_method(config: Mapping[str, Any]) -> object:
    """What a model's config.json says of how it is quantized; None where that is nothing."""
    settings = config.get("quantization_config")
    return settings.get("quant_method") if isinstance(settings, dict) else None


def refuse_fetched_code(config: Mapping[str, Any], where: str) -> None:
    """Refuses a config that names an attention, or the like, of a repository: transformers would fetch and run it.

    Raises:
        CheckpointError: naming the entry.
    """
    for key, value in _entries(config):
        if key.strip("_").removesuffix("_internal").endswith("_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{where} says {key}: {value!r:.80}, code that would be fetched and run; take the entry out, or load "
                "it with transformers' from_pretrained if you trust that code"
            )


def _entries(config: object) -> Iterator[tuple[str, Any]]:
    """Every key in a config, those of configs within it too, and its value."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key), value
            yield from _entries(value)


@contextmanager
def few_modules(tensors: int) -> Iterator[None]:
    """Stops the building of a model, in this thread, that has far more modules than its files have tensors.

    A config with a wrong number in it may ask for more than can ever be built.

    Raises:
        CheckpointError: it is stopped.
    """
    built, most = 0, _MOST_MODULES[0] + _MOST_MODULES[1] * tensors
    here = threading.get_ident()

    def count(*_: object) -> None:
        nonlocal built
        built += threading.get_ident() == here
        if built > most:
            raise CheckpointError(
                f"the config describes a model of more than {most} modules, its files hold {tensors} tensors; "
                "it is damaged"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers, and what it is made of, raise when a file says something that they do not expect."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    builtin = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError)
    return (*builtin, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError)


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuses a `quantization_config` that is not what this format says.

    Raises:
        CheckpointError: naming the first thing that is wrong.
    """
    found = settings.get("format_version")
    if not _is_count(found):
        raise CheckpointError(f"{where}: wanted a format_version of 1..{FORMAT_VERSION}, got {found!r}; it is damaged")
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format {found} is newer than this pifa-compiler, which reads up to {FORMAT_VERSION}; "
            "install a newer pifa-compiler"
        )
    ranks, experts, bases = (settings.get(key) for key in ("ranks", "experts", "bases"))
    if not isinstance(ranks, dict) or not (ranks or experts or bases):
        raise CheckpointError(f"{where}: wanted `ranks`, a table of layer names, got {ranks!r:.80}; it is damaged")
    _check_experts(experts, found, where)
    _check_bases(bases, ranks, found, where)
    for name, rank in all_ranks(settings).items():
        if not _is_count(rank):
            raise CheckpointError(f"{where}: {name}: wanted a rank of 1 or more, got {rank!r:.80}; it is damaged")
    _check_pairs(settings.get("pairs"), ranks, found, where)
    versions, method = settings.get("versions") or {}, settings.get("method")
    if not isinstance(versions, dict) or not all(isinstance(each, str) for each in (*versions.values(), method or "")):
        raise CheckpointError(f"{where}: wanted names as `method` and `versions`; it is damaged")
    for key in ("density", "density_requested"):
        if not isinstance(settings.get(key), int | float | None):
            raise CheckpointError(f"{where}: wanted a number as `{key}`, got {settings[key]!r:.80}; it is damaged")


def all_ranks(settings: Mapping[str, Any]) -> dict[str, int]:
    """The ranks of all layers in PIFA form, those of experts too, by their names in the model that was saved."""
    experts = settings.get("experts") or {}
    return {
        **settings["ranks"],
        **{layer_name(place, name): rank for place, held in experts.items() for name, rank in held.items()},
    }


def _check_experts(experts: object, format_version: int, where: str) -> None:
    if experts is None:
        return
    tables = experts.values() if isinstance(experts, dict) and format_version >= 3 else (None,)
    if not all(isinstance(held, dict) and held for held in tables):
        raise CheckpointError(
            f"{where}: wanted `experts`, a table of tables of ranks, of format 3 or newer, got {experts!r:.80}; "
            "it is damaged"
        )


def _check_bases(bases: object, ranks: Mapping[str, int], format_version: int, where: str) -> None:
    if bases is None:
        return
    tables = bases.items() if isinstance(bases, dict) and format_version >= 4 else [("", None)]
    for name, sizes in tables:
        has_sizes = isinstance(sizes, dict) and sizes.keys() == {"head_features", "heads", "groups"}
        if not isinstance(sizes, dict) or not has_sizes or name in ranks or not all(map(_is_count, sizes.values())):
            raise CheckpointError(
                f"{where}: {name}: wanted `bases`, a table of layers that are not in `ranks`, of format 4 or newer, "
                f"each with head_features, heads and groups, got {sizes!r:.80}; it is damaged"
            )


def check_order(order: Tensor, name: str) -> None:
    """Refuses orders [groups, in] that do not have every input once.

    Raises:
        CheckpointError: naming the layer.
    """
    numbers = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device)
    if order.is_meta or not torch.equal(order.sort(dim=-1).values, numbers.expand_as(order)):
        raise CheckpointError(f"{name}.order: wanted every input once in each row; the file is damaged or incomplete")


def _check_pairs(pairs: object, ranks: Mapping[str, int], format_version: int, where: str) -> None:
    if pairs is None:
        return
    if format_version < 2 or not isinstance(pairs, dict):
        raise CheckpointError(
            f"{where}: wanted `pairs`, a table, of format 2 or newer, got {pairs!r:.80}; it is damaged"
        )
    seconds = list(pairs.values())
    for first, second in pairs.items():
        beside = isinstance(second, str) and first.rpartition(".")[0] == second.rpartition(".")[0]
        if not beside or first not in ranks or second in ranks or seconds.count(second) > 1:
            raise CheckpointError(
                f"{where}: {first}: wanted a layer of `ranks` and a linear beside it that is in no other pair, "
                f"got {second!r:.80}; it is damaged"
            )


def check_tensors(
    files: Sequence[str], ranks: Mapping[str, int], shapes: Mapping[str, LayerShape], model: nn.Module
) -> None:
    """Refuses safetensors files whose PIFA tensors are missing, misshapen or contradictory, before they are loaded.

    So it does a model that is much larger than its files, and integers where it has floating-point numbers.

    Reads the headers and the `pivots`, nothing else.

    Args:
        files: all of a model's weight files.
        ranks: all of its layers in PIFA form, by the name in the saved model.
        shapes: what those layers have to look like that the class being loaded has, by the same name.
        model: on the meta device, with these layers.

    Raises:
        CheckpointError: naming the tensor.
    """
    headers: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    layers: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file} is not a safetensors file; pickles are never loaded, save the model again")
        with open_tensors(file) as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            headers.update((key, found.get_shape()) for key, found in slices.items())
            dtypes.update((key, found.get_dtype()) for key, found in slices.items())
    layers = {key.rpartition(".")[0] for key in headers if key.rpartition(".")[2] in _PARTS}
    # transformers renames tensors of some architectures when it saves; then the names agree in number only.
    if not layers >= ranks.keys() and len(layers) == len(ranks):
        shapes = {}
    elif unknown := layers ^ ranks.keys():
        raise CheckpointError(f"{min(unknown)}: in PIFA form in the config or in the file, not in both; it is damaged")
    for name in sorted(layers):
        _check_layer(name, headers, shapes.get(name))
    floating = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    floating |= {f"{name}.{part}" for name in layers for part in ("w_pivot", "coeff")}
    for key in sorted(floating & dtypes.keys()):
        if dtypes[key] not in _FLOATING_NAMES:
            raise CheckpointError(
                f"{key}: wanted one of {', '.join(_FLOATING_NAMES)}, got {dtypes[key]}; it is damaged"
            )
    _check_size(model, sum(math.prod(shape) for shape in headers.values()))
    for file in files:
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, _, part = key.rpartition(".")
                if part == "pivots":
                    rank, others = headers[f"{name}.w_pivot"][-2], headers[f"{name}.coeff"][-2]
                    check_pivots(tensors.get_tensor(key), rank, rank + others, name)


def _check_size(model: nn.Module, stored: int) -> None:
    """Refuses a model that holds far more numbers than its files: what is not in them would be made of nothing."""
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    numbers = sum(tensor.numel() for tensor in own.values())
    if numbers > 4 * stored + _MOST_BUFFERED:
        raise CheckpointError(
            f"the config describes a model of {numbers:,} numbers, its files hold {stored:,}; it is damaged"
        )


def check_pivots(pivots: Tensor, rank: int, out_features: int, name: str) -> None:
    """Refuses pivots that are not `rank` different rows of 0..out_features - 1 in ascending order.

    Those of experts have a dimension more.

    Raises:
        CheckpointError: naming the layer.
    """
    wanted = f"{name}.pivots: wanted {rank} ascending row numbers in 0..{out_features - 1} as int32"
    if pivots.dtype != torch.int32 or pivots.shape[-1] != rank:
        raise CheckpointError(f"{wanted}, got {pivots.dtype} {list(pivots.shape)}; the file is damaged")
    if int(pivots.min()) < 0 or int(pivots.max()) >= out_features:
        raise CheckpointError(f"{wanted}, got {int(pivots.min())}..{int(pivots.max())}; the file is damaged")
    if not bool((pivots[..., 1:] > pivots[..., :-1]).all()):
        raise CheckpointError(f"{wanted}, got unsorted or repeated ones; the file is damaged")


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder whose weights are pickles only: loading one runs whatever code is in it.

    Raises:
        CheckpointError: naming the file.
    """
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle and can run code when it is read; wanted {WEIGHTS}: "
            "save the model again as safetensors, where it was made"
        )


def _check_layer(name: str, headers: Mapping[str, list[int]], wanted: LayerShape | None) -> None:
    for part in _PARTS:
        if f"{name}.{part}" not in headers:
            raise CheckpointError(f"the tensor {name}.{part} is missing; the file is damaged, copy or save it again")
    w_pivot, coeff, pivots = (headers[f"{name}.{part}"] for part in _PARTS)
    if wanted is not None:
        rank, d_out, d_in = wanted.rank, wanted.out_features, wanted.in_features
        experts = [] if wanted.experts is None else [wanted.experts]
    elif len(w_pivot) == len(coeff) in (2, 3):
        rank, d_out, d_in = w_pivot[-2], w_pivot[-2] + coeff[-2], w_pivot[-1]
        experts = w_pivot[:-2]
    else:
        raise CheckpointError(f"{name}: w_pivot {w_pivot} and coeff {coeff} are no matrices; the file is damaged")
    for part, found, right in (
        ("w_pivot", w_pivot, [*experts, rank, d_in]),
        ("coeff", coeff, [*experts, d_out - rank, rank]),
        ("pivots", pivots, [*experts, rank]),
    ):
        if found != right:
            raise CheckpointError(
                f"{name}.{part}: wanted {right} for rank {rank} of a weight [{d_out}, {d_in}], got {found}; "
                "the file does not fit its config, copy or save it again"
            )
    if not 1 <= rank <= min(d_out, d_in):
        raise CheckpointError(f"{name}: rank {rank}, wanted 1..{min(d_out, d_in)}; the file is damaged")
    if wanted is not None and wanted.bias != (f"{name}.bias" in headers):
        raise CheckpointError(
            f"{name}.bias: the model has {'one' if wanted.bias else 'none'}, the file "
            f"{'none' if wanted.bias else 'one'}; the file does not fit its config, copy or save it again"
        )


def open_tensors(file: str | os.PathLike[str]) -> Any:
    """`safe_open`, which reads the header and compares it with the file's length."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file() and os.path.lexists(file):  # reading a pipe would wait for its other end
        raise CheckpointError(f"{file} is no file; copy or save it again")
    try:
        return safe_open(os.fspath(file), framework="pt")
    except (SafetensorError, OSError, MemoryError) as error:  # it is mapped whole
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); copy or save it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its other end, a device may have no end
            raise CheckpointError(f"{path} is no file; copy or save the model again")
        if status.st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} has {status.st_size:,} bytes, wanted {_LARGEST_JSON:,} or less")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; wanted a folder that save_pretrained has written") from error
    except (OSError, ValueError, RecursionError) as error:  # a decoding error is a ValueError, of JSON as of UTF-8
        raise CheckpointError(f"{path} cannot be read ({error}); copy or save the model again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got a {type(found).__name__}; copy or save it again")
    return found


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_pifa(config: Any) -> bool:
    """Whether a model's config says that its layers are in PIFA form."""
    settings = getattr(config, "quantization_config", None)
    return settings is not None and dict(settings).get("quant_method") == QUANT_METHOD


def refuse_other_quantization(model: Any) -> None:
    """Nothing for a model that `describe` will be able to describe once it has layers in PIFA form.

    Raises:
        CheckpointError: its config says that it is quantized by another method.
    """
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None and not is_pifa(config):
        raise CheckpointError(
            "this model's config says that it is quantized by another method, which cannot be saved with PIFA layers; "
            "if its weights are plain numbers all the same (transformers makes them so from a GGUF file), "
            "del model.config.quantization_config first"
        )


def refuse_plain_module(model: Any) -> None:
    """Nothing for a Hugging Face model.

    Raises:
        CheckpointError: it is another module.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"wanted a Hugging Face model, got {type(model).__name__}; save its state_dict() with safetensors.torch"
        )

"""Saving and loading compressed Hugging Face models: safetensors only, whole folders only, checked before use.

The folder is what transformers writes, plus:

    config.json        `quantization_config` says method, densities, ranks and versions (see `describe`)
    model.safetensors  each `PifaLinear` as `w_pivot`, `coeff`, `pivots` and, if there is one, `bias`
    pifa_report.json   the report, if one was given
    README.md          what it is, and how to load it

**Loading without this package** must not succeed: transformers warns about a quantization method that it does not know,
builds dense layers, and fills them with random weights. Two things stop it. `save_pretrained` writes into config.json,
as the name of the weights file, a sentence that says what to import; transformers refuses it with that sentence. And
every save, a plain `model.save_pretrained` too, adds one number under the name of a dense weight, which no dense layer
fits: transformers refuses the mismatch. Not covered: a program that loads with `ignore_mismatched_sizes=True` a folder
written by a plain `model.save_pretrained`, or with `strict=False` by hand; and plain saves of a compressed model that
`describe` has never seen.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .errors import CheckpointError
from .linear import PifaLinear
from .report import Report

FORMAT_VERSION = 1
"""Of what is in config.json and of the tensors' names and shapes; a reader refuses what is newer than itself."""

QUANT_METHOD = "pifa"

_IMPORT_FIRST = (
    "none: this is a PIFA model, `pip install pifa-compiler` and `import pifa_compiler` before from_pretrained"
)
_CONFIG, _WEIGHTS, _INDEX, _REPORT = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pifa_report.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MODEL_FILES = (".safetensors", ".onnx")
_PARTS = ("w_pivot", "coeff", "pivots")


@dataclass(frozen=True)
class LayerShape:
    """What a layer's tensors have to look like: the dense weight is [out_features, in_features]."""

    out_features: int
    in_features: int
    rank: int
    bias: bool


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Report | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a compressed Hugging Face model into a folder, wholly or not at all.

    Args:
        model: a `PreTrainedModel` with `PifaLinear` layers.
        folder: where to; parents are made.
        tokenizer: a tokenizer or processor to put beside it.
        report: what `compress` returned; goes into the config and whole into pifa_report.json.
        overwrite: whether a saved model that is there already may be replaced, once the new one is complete.

    Raises:
        CheckpointError: nothing to save, the folder exists, or it cannot be written (permissions, no space left).
    """
    from safetensors import SafetensorError

    settings = describe(model, report)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} has no values (meta device); load the model before saving it")
    check_destination(folder, overwrite=overwrite, needed_bytes=_stored_bytes(model))
    with atomic_folder(folder, overwrite=overwrite) as partial:
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:  # how safetensors reports that the disk is full
            raise OSError(str(error)) from error
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config = json.loads((partial / _CONFIG).read_text(encoding="utf-8"))
        config["transformers_weights"] = _IMPORT_FIRST
        _write_json(partial / _CONFIG, config)
        if report is not None:
            _write_json(partial / _REPORT, report.to_dict())
        (partial / "README.md").write_text(_model_card(model, settings), encoding="utf-8")


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Loads a compressed model that any `save_pretrained` has written; dense weights are never built.

    The class is the one that was saved. Code that comes with a model is not run: load such a model with transformers'
    own `from_pretrained(folder, trust_remote_code=True)`, after `import pifa_compiler`.

    Args:
        folder: the folder, or "owner/name" of a model on the Hugging Face Hub.
        dtype: of the floating-point weights; None keeps what was saved.
        device: where to; None is the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the folder is missing, damaged, not a PIFA model, of a newer format, or holds pickles only.
    """
    import transformers

    from .registration import register

    register()
    where = os.fspath(folder)
    if os.path.lexists(where) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where):
        _check_folder(Path(where))
    elsewhere = device is not None and torch.device(device).type != "cpu"
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if not _is_pifa(config):
            raise CheckpointError(f"{where} is not a PIFA model; load it with transformers and compress() it")
        config.transformers_weights = None  # for releases of transformers that show the quantizer no config in time
        model, found = _saved_class(config, where).from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map={"": device} if elsewhere else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where} cannot be loaded: {error}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]} first; "
            "it is damaged or incomplete: copy or save it again"
        )
    return model


def describe(model: Any, report: Report | None = None) -> dict[str, Any]:
    """Writes what a loader has to know into `model.config.quantization_config`, and returns it as plain values.

    After it, `model.save_pretrained(folder)` gives a folder that loads. Ranks and versions are taken from the model and
    the installed packages; method and densities from `report`, or else as they were.

    Args:
        model: a `PreTrainedModel` with `PifaLinear` layers; it shares its config with models built from the same one.
        report: what was done to it.

    Raises:
        CheckpointError: it is no Hugging Face model, has no layer in PIFA form, or is quantized otherwise.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"wanted a Hugging Face model, got {type(model).__name__}; save its state_dict() with safetensors.torch"
        )
    import transformers

    from .hf_quantizer import PifaConfig, attach

    ranks = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, PifaLinear)}
    if not ranks:
        raise CheckpointError(
            "no layer of this model is in PIFA form: compress() it first, or call its own save_pretrained"
        )
    refuse_other_quantization(model)
    kept = dict(getattr(model.config, "quantization_config", None) or {})
    config = PifaConfig(
        ranks,
        method=report.method if report else kept.get("method"),
        density_requested=report.density_requested if report else kept.get("density_requested"),
        density=report.density if report else kept.get("density"),
        versions={
            "pifa-compiler": version("pifa-compiler"),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    )
    attach(model, config)
    settings: dict[str, Any] = config.to_dict()
    return settings


def refuse_other_quantization(model: Any) -> None:
    """Nothing for a model that `describe` will be able to describe once it has layers in PIFA form.

    Raises:
        CheckpointError: its config says that it is quantized by another method.
    """
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None and not _is_pifa(config):
        raise CheckpointError(
            "this model's config says that it is quantized by another method, which cannot be saved with PIFA layers; "
            "if its weights are plain numbers all the same (transformers makes them so from a GGUF file), "
            "del model.config.quantization_config first"
        )


def describe_if_pretrained(model: Any, report: Report) -> None:
    """Calls `describe` where there is something to describe: a Hugging Face model with layers in PIFA form."""
    pretrained = hasattr(model, "config") and hasattr(model, "save_pretrained")
    if pretrained and any(isinstance(layer, PifaLinear) for layer in model.modules()):
        describe(model, report)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json of a PIFA folder says about it: ranks, method, densities and versions.

    Raises:
        CheckpointError: there is no such file, it is not JSON, not of a PIFA model, or of a newer format.
    """
    path = Path(folder) / _CONFIG
    settings = _read_json(path).get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not a PIFA model; load it with transformers and compress() it")
    check_settings(settings, str(path))
    return settings


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report saved with a model, as `Report.to_dict` gave it; None if there is none."""
    path = Path(folder) / _REPORT
    return _read_json(path) if path.exists() else None


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes its name `path` when the block ends without an error.

    If the block fails or is interrupted nothing is left of it, and what was at `path` is as before.

    Args:
        path: the folder's name; see `check_destination` for what may be there.
        overwrite: whether a saved model of that name may be replaced.

    Raises:
        CheckpointError: the destination is refused, or any OSError while writing.
    """
    final = _resolved(path)
    check_destination(final, overwrite=overwrite)
    unique = f"{final.name}.{secrets.token_hex(4)}"
    partial, retired = final.with_name(f".{unique}.partial"), final.with_name(f".{unique}.replaced")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if final.exists() and any(final.iterdir()):
            final.rename(retired)
        partial.rename(final)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written, nothing was changed: {_explain(error, final)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not final.exists():
            retired.rename(final)
        shutil.rmtree(retired, ignore_errors=True)


def check_destination(path: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    """Refuses a folder that `atomic_folder` could not or should not write; call it before long work.

    Free are a name that does not exist and an empty folder. With `overwrite` a folder with a config.json or model file
    in it may be replaced as well, any other never: it was not made by a save.

    Raises:
        CheckpointError: something is there already, the place is not writable, or has less room than `needed_bytes`.
    """
    final = _resolved(path)
    try:
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{path} is a file; wanted the name of a folder to write")
        if final.is_dir() and any(final.iterdir()):
            if not overwrite:
                raise CheckpointError(f"{path} exists already; choose another name, or say overwrite (--force)")
            if not any(child.name == _CONFIG or child.suffix in _MODEL_FILES for child in final.iterdir()):
                raise CheckpointError(f"{path} holds no saved model, so it is not replaced; choose another name")
        above = next(folder for folder in final.parents if folder.exists())
        if not above.is_dir():
            raise CheckpointError(f"{above} is a file; {path} cannot be made below it")
        if not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(f"{above} is not writable; choose another place or change its permissions")
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; choose another place") from error
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {needed_bytes:,} bytes and {free:,} are free; make room or choose another place"
        )


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
    ranks = settings.get("ranks")
    if not isinstance(ranks, dict) or not ranks:
        raise CheckpointError(f"{where}: wanted `ranks`, a table of layer names, got {ranks!r:.80}; it is damaged")
    for name, rank in ranks.items():
        if not _is_count(rank):
            raise CheckpointError(f"{where}: {name}: wanted a rank of 1 or more, got {rank!r:.80}; it is damaged")


def check_tensors(files: Sequence[str], ranks: Mapping[str, int], shapes: Mapping[str, LayerShape]) -> None:
    """Refuses safetensors files whose PIFA tensors are missing, misshapen or contradictory, before they are loaded.

    Reads the headers and the `pivots`, nothing else.

    Args:
        files: all of a model's weight files.
        ranks: all of its layers in PIFA form, by the name in the saved model.
        shapes: what those layers have to look like that the class being loaded has, by the same name.

    Raises:
        CheckpointError: naming the tensor.
    """
    headers: dict[str, list[int]] = {}
    layers: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file} is not a safetensors file; pickles are never loaded, save the model again")
        with _open(file) as tensors:
            headers.update((key, tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    layers = {key.rpartition(".")[0] for key in headers if key.rpartition(".")[2] in _PARTS}
    # transformers renames tensors of some architectures when it saves; then the names agree in number only.
    if not layers >= ranks.keys() and len(layers) == len(ranks):
        shapes = {}
    elif unknown := layers ^ ranks.keys():
        raise CheckpointError(f"{min(unknown)}: in PIFA form in the config or in the file, not in both; it is damaged")
    for name in sorted(layers):
        _check_layer(name, headers, shapes.get(name))
    for file in files:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, _, part = key.rpartition(".")
                if part == "pivots":
                    rank, others = headers[f"{name}.w_pivot"][0], headers[f"{name}.coeff"][0]
                    check_pivots(tensors.get_tensor(key), rank, rank + others, name)


def check_pivots(pivots: Tensor, rank: int, out_features: int, name: str) -> None:
    """Refuses pivots that are not `rank` different rows of 0..out_features - 1 in ascending order.

    Raises:
        CheckpointError: naming the layer.
    """
    wanted = f"{name}.pivots: wanted {rank} ascending row numbers in 0..{out_features - 1} as int32"
    if pivots.dtype != torch.int32 or pivots.shape != (rank,):
        raise CheckpointError(f"{wanted}, got {pivots.dtype} {list(pivots.shape)}; the file is damaged")
    if int(pivots.min()) < 0 or int(pivots.max()) >= out_features:
        raise CheckpointError(f"{wanted}, got {int(pivots.min())}..{int(pivots.max())}; the file is damaged")
    if not bool((pivots[1:] > pivots[:-1]).all()):
        raise CheckpointError(f"{wanted}, got unsorted or repeated ones; the file is damaged")


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder whose weights are pickles only: loading one runs whatever code is in it.

    Raises:
        CheckpointError: naming the file.
    """
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle and can run code when it is read; wanted {_WEIGHTS}: "
            "save the model again as safetensors, where it was made"
        )


def add_guard(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """`state_dict` and one number named like a dense weight, so that a loader of dense layers finds a mismatch."""
    name, layer = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, PifaLinear))
    return {**state_dict, f"{name}.weight": torch.zeros(1, dtype=layer.w_pivot.dtype)}


def _check_folder(folder: Path) -> None:
    """Refuses a local folder that is not a whole PIFA model; reads the config and the files' headers."""
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; wanted a folder that save_pretrained has written")
    if not folder.is_dir():
        kind = "a pickle, which is never loaded" if folder.name.endswith(_PICKLES) else "a file"
        raise CheckpointError(f"{folder} is {kind}; wanted a folder that save_pretrained has written")
    refuse_pickles(folder)
    read_settings(folder)
    if (folder / _WEIGHTS).exists():
        files = [folder / _WEIGHTS]
    elif (folder / _INDEX).exists():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{folder / _INDEX} has no table `weight_map`; it is damaged, copy it again")
        for shard in shards.values():
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{folder / _INDEX} names {shard!r}; wanted safetensors files beside it")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        raise CheckpointError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}; it is incomplete, copy or save it again")
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file} is missing, {folder / _INDEX} names it; copy or save the model again")
        with _open(file):
            pass


def _check_layer(name: str, headers: Mapping[str, list[int]], wanted: LayerShape | None) -> None:
    for part in _PARTS:
        if f"{name}.{part}" not in headers:
            raise CheckpointError(f"the tensor {name}.{part} is missing; the file is damaged, copy or save it again")
    w_pivot, coeff, pivots = (headers[f"{name}.{part}"] for part in _PARTS)
    if wanted is not None:
        rank, d_out, d_in = wanted.rank, wanted.out_features, wanted.in_features
    elif len(w_pivot) == len(coeff) == 2:
        rank, d_out, d_in = w_pivot[0], w_pivot[0] + coeff[0], w_pivot[1]
    else:
        raise CheckpointError(f"{name}: w_pivot {w_pivot} and coeff {coeff} are no matrices; the file is damaged")
    for part, found, right in (
        ("w_pivot", w_pivot, [rank, d_in]),
        ("coeff", coeff, [d_out - rank, rank]),
        ("pivots", pivots, [rank]),
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


def _open(file: str | os.PathLike[str]) -> Any:
    """`safe_open`, which reads the header and compares it with the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(os.fspath(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file ({error}); copy or save it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; wanted a folder that save_pretrained has written") from error
    except (OSError, ValueError) as error:  # a decoding error is a ValueError, of JSON as of UTF-8
        raise CheckpointError(f"{path} cannot be read ({error}); copy or save the model again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got a {type(found).__name__}; copy or save it again")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pifa(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None)
    return settings is not None and dict(settings).get("quant_method") == QUANT_METHOD


def _saved_class(config: Any, where: str) -> Any:
    """The model class named in the config: one of transformers', or one registered with its Auto classes."""
    import transformers

    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        registered: Any = auto._model_mapping.get(type(config), None)
        if isinstance(registered, type) and registered.__name__ == name:
            return registered
    raise CheckpointError(
        f"{where}: transformers has no class {name!r}; import the code that registers it, or load it with "
        "from_pretrained(folder, trust_remote_code=True) if you trust the code in the folder"
    )


def _stored_bytes(model: Any) -> int:
    """Bytes of a model's tensors, shared ones counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _resolved(path: str | os.PathLike[str]) -> Path:
    """`path` without links, so that what is renamed is the folder and not a link to it."""
    return Path(path).expanduser().resolve()


def _explain(error: OSError, final: Path) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return f"no space left on the disk of {final.parent}; make room or choose another place ({error})"
    return f"{error}; choose another place or change its permissions"


def _model_card(model: Any, settings: Mapping[str, Any]) -> str:
    name = type(model).__name__
    requested, reached = settings["density_requested"], settings["density"]
    facts = [
        f"- layers in PIFA form: {len(settings['ranks'])}",
        f"- made by: {settings['method'] or 'unknown'}",
        f"- density: {'unknown' if reached is None else format(reached, '.4f')}"
        + ("" if requested is None else f" (asked for: {requested})"),
        "- written by: " + ", ".join(f"{package} {number}" for package, number in settings["versions"].items()),
    ]
    return _CARD.format(name=name, facts="\n".join(facts))


_CARD = """---
library_name: transformers
tags:
- pifa
---

# A {name} in PIFA form

Linear layers of this model are stored as pivot rows and coefficients (PIFA, Zhao, Zhang and Cannistraci, ICML 2025,
arXiv 2501.19090).

{facts}

## Loading

The package `pifa-compiler` has to be installed **and imported before** `from_pretrained`:

```python
import pifa_compiler
from transformers import {name}

model = {name}.from_pretrained("path/to/this/folder")
```

or, without naming the class, `pifa_compiler.load_pretrained("path/to/this/folder")`.

Without the import transformers refuses the folder; it would otherwise build dense layers with random weights.
"""

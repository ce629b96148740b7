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

import json
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic_folder import atomic_folder, check_destination
from .checkpoint_files import CONFIG, QUANT_METHOD, REPORT, check_folder
from .errors import CheckpointError
from .exchange import Exchange
from .linear import PifaLinear
from .pairs import split_pairs
from .report import Report

_IMPORT_FIRST = (
    "none: this is a PIFA model, `pip install pifa-compiler` and `import pifa_compiler` before from_pretrained"
)


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
        config = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
        config["transformers_weights"] = _IMPORT_FIRST
        _write_json(partial / CONFIG, config)
        if report is not None:
            _write_json(partial / REPORT, report.to_dict())
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
        check_folder(Path(where))
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


def describe(model: Any, report: Report | None = None, exchange: Exchange | None = None) -> dict[str, Any]:
    """Writes what a loader has to know into `model.config.quantization_config`, and returns it as plain values.

    After it, `model.save_pretrained(folder)` gives a folder that loads, or refuses. Ranks, pairs and versions are taken
    from the model and the installed packages; method and densities from `report`, or else as they were.

    Args:
        model: a `PreTrainedModel` with `PifaLinear` layers; it shares its config with models built from the same one.
        report: what was done to it.
        exchange: a block in which the model is being changed: what is written here is undone with the rest.

    Raises:
        CheckpointError: it is no Hugging Face model, has no layer in PIFA form, or is quantized otherwise.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"wanted a Hugging Face model, got {type(model).__name__}; save its state_dict() with safetensors.torch"
        )
    import transformers

    from .hf_quantizer import PifaConfig, attach

    pairs = split_pairs(model)
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
        format_version=2 if pairs else 1,
        pairs=pairs,
    )
    with Exchange() if exchange is None else nullcontext(exchange) as block:
        attach(model, config, block)
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


def describe_if_pretrained(model: Any, report: Report, exchange: Exchange) -> None:
    """Calls `describe` where there is something to describe: a Hugging Face model with layers in PIFA form."""
    pretrained = hasattr(model, "config") and hasattr(model, "save_pretrained")
    if pretrained and any(isinstance(layer, PifaLinear) for layer in model.modules()):
        describe(model, report, exchange)


def add_guard(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """`state_dict` and one number named like a dense weight, so that a loader of dense layers finds a mismatch."""
    name, layer = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, PifaLinear))
    return {**state_dict, f"{name}.weight": torch.zeros(1, dtype=layer.w_pivot.dtype)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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

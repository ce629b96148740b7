"""Saving and loading compressed Hugging Face models: safetensors only, whole folders only, checked before use.

The folder is what transformers writes, plus:

    config.json          `quantization_config` says method, densities, ranks and versions (see `quantizer.describe`)
    model.safetensors    each layer in PIFA form as `w_pivot`, `coeff`, `pivots` and, if there is one, `bias`
    pifa_report.json     the report, if one was given
    pifa_checksums.json  a checksum for each tensor
    README.md            what it is, and how to load it

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis_linear import BasisLinear
from ..drafts import delete_abandoned
from ..errors import CheckpointError
from ..exchange.atomic import Exchange
from ..files import atomic_folder, check_destination
from ..linear import WithRowOrder
from ..report import Report
from .checksums import verify_checksums, write_checksums
from .format import CONFIG, REPORT, all_ranks, check_folder, few_modules, is_pifa, loading_errors, refuse_plain_module

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
        model: a `PreTrainedModel` with layers in PIFA form.
        folder: where to; parents are made.
        tokenizer: a tokenizer or processor to put beside it.
        report: what `compress` returned; goes into the config and whole into pifa_report.json.
        overwrite: whether a saved model that is there already may be replaced, once the new one is complete.

    Raises:
        CheckpointError: nothing to save, the folder exists, or it cannot be written (permissions, no space left).
    """
    from safetensors import SafetensorError

    refuse_plain_module(model)
    from .quantizer import describe

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
        write_beside(partial, model, settings, report)


def write_beside(folder: Path, model: Any, settings: Mapping[str, Any], report: Report | None) -> None:
    """Finishes a folder that holds a model's config and weights: what stops other loaders, report, checksums, card."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["transformers_weights"] = _IMPORT_FIRST
    _write_json(folder / CONFIG, config)
    if report is not None:
        _write_json(folder / REPORT, report.to_dict())
    write_checksums(folder)
    (folder / "README.md").write_text(_model_card(model, settings), encoding="utf-8")


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    verify: bool = False,
) -> Any:
    """Loads a compressed model that any `save_pretrained` has written; dense weights are never built.

    The class is the one that was saved. Code that comes with a model is not run: load such a model with transformers'
    own `from_pretrained(folder, trust_remote_code=True)`, after `import pifa_compiler`.

    Args:
        folder: the folder, or "owner/name" of a model on the Hugging Face Hub.
        dtype: of the floating-point weights; None keeps what was saved.
        device: where to; None is the CPU.
        verify: whether to read all tensors first and compare them with the checksums saved with them; of a folder only.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the folder is missing, damaged, not a PIFA model, of a newer format, or holds pickles only;
            with `verify`, a tensor is not what was saved, or there are no checksums.
    """
    import transformers

    from .registration import register

    register()
    where = os.fspath(folder)
    delete_abandoned(Path(where).parent)
    tensors = None
    elsewhere = device is not None and torch.device(device).type != "cpu"
    try:
        if os.path.lexists(where) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where):
            tensors = check_folder(Path(where))
        if verify:
            verify_checksums(Path(where))
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if not is_pifa(config):
            raise CheckpointError(f"{where} is not a PIFA model; load it with transformers and compress() it")
        config.transformers_weights = None  # for releases of transformers that show the quantizer no config in time
        with nullcontext() if tensors is None else few_modules(len(tensors)):
            model, found = _saved_class(config, where).from_pretrained(
                where,
                config=config,
                dtype="auto" if dtype is None else dtype,
                device_map={"": device} if elsewhere else None,
                output_loading_info=True,
            )
    except loading_errors() as error:
        raise CheckpointError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]} first; "
            "it is damaged or incomplete: copy or save it again"
        )
    return model


def describe_if_pretrained(model: Any, report: Report, exchange: Exchange) -> None:
    """Calls `describe` where there is something to describe: a Hugging Face model with layers in PIFA form."""
    pretrained = hasattr(model, "config") and hasattr(model, "save_pretrained")
    if pretrained and any(isinstance(layer, WithRowOrder | BasisLinear) for layer in model.modules()):
        from .quantizer import describe

        describe(model, report, exchange)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _saved_class(config: Any, where: str) -> Any:
    """The model class named in the config: one of transformers', or one registered with its Auto classes."""
    import transformers

    named = config.architectures
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
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
        f"- layers in PIFA form: {len(all_ranks(settings))}",
        *([f"- layers with heads in a basis of inputs: {len(settings['bases'])}"] if "bases" in settings else []),
        f"- made by: {settings['method'] or 'unknown'}",
        ("- density: unknown" if reached is None else f"- density: {reached:.4f}")
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

"""Dense models and tokenizers from a local folder, a GGUF file or the Hugging Face Hub.

Weights are read from safetensors or GGUF only: both hold tensors and nothing that runs. Pickles are refused.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.format import (
    CONFIG,
    check_layers,
    few_modules,
    loading_errors,
    open_tensors,
    quant_method,
    read_json,
    refuse_fetched_code,
)
from ..drafts import delete_abandoned
from ..errors import CheckpointError, ConfigError
from ..files import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Loads a model with its weights, in evaluation mode.

    Args:
        name: a folder with config.json and *.safetensors, a GGUF file (ending in .gguf; its weights are dequantized),
            or a name on the Hugging Face Hub. A folder that holds a PIFA model is loaded as one.
        dtype: "float32", "bfloat16" or "float16". None and "auto" take the dtype that the weights are stored in, and
            "float32" for a GGUF file, whose weights are stored as integers.
        device: where the model is moved.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        CheckpointError: there is no such model, it cannot be reached, it is damaged or incomplete, or it is a pickle.
        ConfigError: `dtype` is not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    wanted: torch.dtype | None = None if dtype in (None, "auto") else getattr(torch, str(dtype))
    model = _load_any(_locate(name), wanted, trust_remote_code)
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def _load_any(source: Path | str, wanted: torch.dtype | None, trust_remote_code: bool) -> "PreTrainedModel":
    if isinstance(source, Path) and source.suffix == ".gguf":
        return _load_gguf(source, wanted or torch.float32)
    if isinstance(source, Path):
        if _quant_method(source) == "pifa":
            from ..checkpoint import load_pretrained

            compressed: PreTrainedModel = load_pretrained(source, dtype=wanted)
            return compressed
        tensors = _count_tensors(source)
        check_layers(source / CONFIG, tensors)
        with few_modules(tensors):
            return _load(source, wanted or "auto", trust_remote_code)
    return _load(source, wanted or "auto", trust_remote_code)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that lies beside a model.

    Args:
        name: a folder, a GGUF file or a name on the Hugging Face Hub, as in `load_model`.
        trust_remote_code: whether Python code that comes with the tokenizer may run.

    Raises:
        CheckpointError: there is none, it cannot be reached, or it is damaged.
    """
    source = _locate(name)
    where, options = _arguments(source)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        # The library below raises plain exceptions for a file that it cannot read.
        if type(error) is not Exception and not isinstance(error, loading_errors()):
            raise
        raise explain_failure(source, error, "a tokenizer") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) == 0:
        raise CheckpointError(f"{source} holds no tokenizer; copy the model's tokenizer files there")
    return tokenizer


def check_vocabulary(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer that can emit ids which the model has no embedding row for.

    More rows than ids are fine: many models pad their vocabulary.

    Raises:
        ConfigError: the largest id is not below the number of embedding rows.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows, largest = int(embedding.weight.shape[0]), max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ConfigError(
            f"the tokenizer's largest id is {largest}, but the model has {rows} embedding rows; "
            "give the tokenizer that belongs to this model"
        )


def _locate(name: str | Path) -> Path | str:
    """The folder or GGUF file that `name` is, or the Hub name as it came."""
    path = expand_home(name, CheckpointError)
    delete_abandoned(path.parent)
    if path.is_dir() and name != "":
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when read; safetensors only: convert it first"
            )
        raise CheckpointError(f"{path} is not a model; give a .gguf file, or the folder that holds config.json")
    if isinstance(name, Path) or path.suffix in (".gguf", *_PICKLES) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"there is no model at {str(name)!r}; give a folder, a .gguf file or a Hugging Face Hub name"
        )
    return name


def find_folder(name: str | Path) -> Path:
    """The folder that a model lies in; one on the Hub is fetched into the hub's cache first, safetensors only.

    Raises:
        CheckpointError: it is no folder with safetensors files, or cannot be reached.
    """
    source = _locate(name)
    if isinstance(source, str):
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.py", "*.jinja"]
        try:
            with quietly():
                source = Path(snapshot_download(source, allow_patterns=patterns))
        except (OSError, ValueError) as error:  # of which the hub's own errors are children
            raise explain_failure(source, error, "a model in safetensors form") from error
    if source.suffix == ".gguf":
        raise CheckpointError(
            f"{source} is a GGUF file, whose weights are dequantized in memory; save it as safetensors first"
        )
    if _quant_method(source) == "pifa":
        raise CheckpointError(f"{source} is in PIFA form already; wanted a dense model")
    _count_tensors(source)
    return source


def _arguments(source: Path | str) -> tuple[str, dict[str, str]]:
    """How `from_pretrained` wants to be asked for `source`: a folder or Hub name, and the GGUF file in it if any."""
    if isinstance(source, Path) and source.suffix == ".gguf":
        return str(source.parent), {"gguf_file": source.name}
    return str(source), {}


def _quant_method(folder: Path) -> object:
    """`quantization_config.quant_method` of the folder's config.json, or None."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        if ggufs:
            raise CheckpointError(f"{folder} has no config.json but GGUF files; name one of them: {', '.join(ggufs)}")
        raise CheckpointError(f"{folder} is not a model: it has no config.json")
    return quant_method(read_json(file))


def _count_tensors(folder: Path) -> int:
    """How many tensors the safetensors files of a folder hold; reads their headers."""
    files = sorted(folder.glob("*.safetensors"))
    count = 0
    for file in files:
        with open_tensors(file) as tensors:
            count += len(tensors.keys())
    if files:
        return count
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when read; "
            "safetensors only: convert it first"
        )
    raise CheckpointError(f"{folder} holds no *.safetensors file; fetch the model again")


def read_config(where: str, *, trust_remote_code: bool = False, **gguf: str) -> Any:
    """A model's config, which asks for no code to be fetched unless that is allowed.

    Raises:
        CheckpointError: it does.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **gguf)
    if not trust_remote_code:
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            refuse_fetched_code({"_attn_implementation": getattr(part, "_attn_implementation", None)}, where)
    return config


def _load(source: Path | str, dtype: Any, trust_remote_code: bool = False) -> "PreTrainedModel":
    """`from_pretrained` of the class that the config names, with every failure explained and no missing weight."""
    where, gguf = _arguments(source)
    try:
        with quietly():
            config = read_config(where, trust_remote_code=trust_remote_code, **gguf)
            auto = model_class(config)
            remote = {"trust_remote_code": trust_remote_code} if auto.__name__.startswith("Auto") else {}
            model, info = auto.from_pretrained(
                where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **gguf, **remote
            )
    except loading_errors() as error:
        raise explain_failure(source, error, "a model in safetensors or GGUF form") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "they would be random: fetch the model again"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def model_class(config: Any) -> Any:
    """The class that the config names if this transformers has it, else the causal language model."""
    import transformers

    found = getattr(config, "architectures", None)
    named = found[0] if isinstance(found, list) and found else ""
    if hasattr(config, "auto_map") or not isinstance(named, str) or not hasattr(transformers, named):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, named)


def _load_gguf(path: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """A plain model with a GGUF file's weights, dequantized.

    What transformers returns counts as quantized and refuses to be saved, so its tensors move into a fresh model of the
    same class. That is built on the meta device: nothing is held twice.
    """
    loaded = _load(path, dtype)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for module_name, module in loaded.named_modules():  # rotary tables and the like are in no state dict
        model.get_submodule(module_name)._buffers.update(module._buffers)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if loaded.generation_config is not None:
        model.generation_config = loaded.generation_config
    model.eval()
    return model


def explain_failure(source: Path | str, error: Exception, wanted: str) -> CheckpointError:
    """What a failure inside transformers means for somebody who asked for `source`."""
    text = str(error)
    if "trust_remote_code" in text:
        return CheckpointError(f"{source} comes with its own Python code; pass trust_remote_code=True if you trust it")
    if isinstance(source, Path):
        return CheckpointError(
            f"{source} holds no {wanted.removeprefix('a ')} that can be read; copy the model's files there again. "
            f"What transformers says: {_first_line(text)}"
        )
    offline = "connect to" in text or "offline" in text.lower() or "LocalEntryNotFound" in type(error).__name__
    if offline:
        return CheckpointError(
            f"cannot reach the Hugging Face Hub for {source!r}, and it is not in the local cache: this machine is "
            f"offline; fetch the model elsewhere and give its folder (there is no folder {source!r} here)"
        )
    return CheckpointError(
        f"found neither a folder {source!r} nor {wanted} of that name on the Hugging Face Hub: {_first_line(text)}"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(":") if text.strip() else "no reason given"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers' progress bars and warnings away, and whatever else prints off stdout."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

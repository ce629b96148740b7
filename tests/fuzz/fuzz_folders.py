"""Damages saved models at random and opens them: whatever is wrong with a folder is a `PifaError`, within seconds.

    python tests/fuzz/fuzz_folders.py 5000 [SEED]

prints the seed, and a line for each folder that was answered by anything else. `... 1 SEED` opens the first folder of a
seed again; the n-th folder of seed s is the first one of seed s + n.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzzing import asked, limit_memory

from pifa_compiler import PifaError, load_pretrained
from pifa_compiler.checkpoint import save_pretrained
from pifa_compiler.checkpoint.inspect import inspect
from pifa_compiler.cli import tables
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear
from pifa_compiler.report import LayerReport, Report

SECONDS = 10
MEMORY = 256 << 20
"""Beyond what the process has once it has opened every sound folder."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 10**9, 10**12, 10**30, -(10**9), 0.0, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "none", "../x", "/dev/zero", "owner/kernel", "auto", "float16", "int8", "float8_e4m3fn", "\ud800",
    "é" * 300, "[/red]", [], [0], [None], ["x", 1], [[[]]], {}, {"x": 1}, {"": None},
    {"rope_type": "dynamic"}, {"factor": 0},
)  # fmt: skip

EXTRA = (
    "_attn_implementation", "attn_implementation", "architectures", "auto_map", "attention_chunk_size",
    "base_model_pp_plan", "base_model_tp_plan", "chunk_size_feed_forward", "dtype", "experts_implementation",
    "head_dim", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "layer_types", "name_or_path", "num_labels",
    "output_attentions", "problem_type", "return_dict", "rope_parameters", "rope_scaling", "sliding_window",
    "text_config", "torch_dtype", "transformers_weights", "vision_config", "pairs", "versions", "metadata",
    "weight_map", "notes", "layers",
)  # fmt: skip

Damage = Callable[[Path, random.Random], str]


def build(root: Path) -> list[Path]:
    """Folders to damage: two classes of models, in one file and in shards."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    llama = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, **sizes)
    qwen = transformers.Qwen2Config(hidden_size=32, intermediate_size=48, num_key_value_heads=2, **sizes)
    opt = transformers.OPTConfig(hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, **sizes)
    folders = []
    for config in (llama, qwen, opt):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        report = Report("svd", 0.5)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                factors = factorize(module.weight.data, rank=7)
                model.set_submodule(name, PifaLinear.from_factors(factors, bias=module.bias))
                shape = (module.out_features, module.in_features)
                report.layers.append(LayerReport.of_factors(name, shape, 7, factors.quality, notes=("a note",)))
        for kind, limit in (("whole", "1GB"), ("shards", "20KB")):
            folder = root / f"{config.model_type}-{kind}"
            save_pretrained(model, folder, report=report)
            if kind == "shards":
                (folder / "model.safetensors").unlink()
                model.save_pretrained(folder, max_shard_size=limit)
            folders.append(folder)
    return folders


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    if place:
        yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places_in(value[key], (*place, key))


def edit_json(folder: Path, rng: random.Random) -> str:
    """Sets, drops or adds entries of a JSON file."""
    path = rng.choice([path for path in sorted(folder.glob("*.json")) if path.is_file()])
    content = json.loads(path.read_text())
    said = [path.name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.choice(list(places_in(content)) or [("x",)])
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        what = rng.choice(("set", "set", "set", "drop", "add"))
        if what == "add":
            place = (rng.choice(EXTRA),)
            inner = content.get("quantization_config")
            holder = inner if rng.random() < 0.5 and isinstance(inner, dict) else content
        if what == "drop":
            holder.pop(place[-1])
        else:
            holder[place[-1]] = copy.deepcopy(rng.choice(ODD))
        said.append(f"{what} {place} {'' if what == 'drop' else repr(holder[place[-1]])[:40]}")
        if not isinstance(content, dict) or not content:
            break
    path.write_text(json.dumps(content))
    return " ".join(said)


def replace_json(folder: Path, rng: random.Random) -> str:
    """Other text in the place of a JSON file."""
    path = rng.choice([path for path in sorted(folder.glob("*.json")) if path.is_file()])
    contents = {
        "deep list": "[" * 100_000,
        "deep entry": path.read_text().rstrip().removesuffix("}") + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "empty": "",
        "list": "[]",
        "null": "null",
        "long number": path.read_text().replace("32", "9" * 5000),
        "twice": path.read_text() * 2,
        "not UTF-8": None,
    }
    what = rng.choice(list(contents))
    content = contents[what]
    path.write_bytes(b"\xff\xfe{" if content is None else content.encode())
    return f"{path.name} {what}"


def edit_bytes(folder: Path, rng: random.Random) -> str:
    """Flips, cuts, repeats or inserts bytes of any file, mostly near its start."""
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    content = bytearray(path.read_bytes())
    near = min(len(content), rng.choice((8, 200, 4000, len(content))))
    at, what = rng.randrange(max(near, 1)), rng.choice(("flip", "cut", "insert", "drop"))
    if what == "flip" and content:
        content[at] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[at:]
    elif what == "insert":
        content[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    else:
        del content[at : at + rng.choice((1, 8, 1000))]
    path.write_bytes(bytes(content))
    return f"{path.name} {what} at {at}"


def edit_tensors(folder: Path, rng: random.Random) -> str:
    """Drops, renames, reshapes or converts a tensor."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    found = tensors[name]
    dtypes = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64)
    changes: dict[str, Callable[[], Any]] = {
        "drop": lambda: None,
        "flatten": lambda: found.flatten(),
        "empty": lambda: found[:0] if found.ndim else found,
        "shorter": lambda: found[1:] if found.ndim else found,
        "longer": lambda: torch.cat((found, found)) if found.ndim else found,
        "transposed": lambda: found.t() if found.ndim == 2 else found,
        "not finite": lambda: torch.full(found.shape, torch.nan) if found.is_floating_point() else found,
        "negative": lambda: -found,
        **{str(dtype): lambda dtype=dtype: found.to(dtype) for dtype in dtypes},
        "renamed": lambda: None,
    }
    what = rng.choice(list(changes))
    changed = changes[what]()
    del tensors[name]
    if what == "renamed":
        tensors[rng.choice((name + "x", name.rpartition(".")[0], "x", f"model.{name}"))] = found
    elif changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name} {name} {what}"


def edit_header(folder: Path, rng: random.Random) -> str:
    """Odd values in the header of a safetensors file, whose length is put right."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    place = rng.choice(list(places_in(header)))
    holder = header
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = rng.choice((*ODD, "F16", "I8", "F8_E4M3", [2, 2], [10**9, 10**9], [0, 0]))
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
    return f"{path.name} header {place} {holder[place[-1]]!r:.40}"


def other_kind(folder: Path, rng: random.Random) -> str:
    """A pipe, folder, device, link or nothing in the place of a file."""
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    what = rng.choice(("nothing", "pipe", "folder", "/dev/zero", "/dev/null", "no-such-file", path.name, "huge"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # holes take no room on the disk
    elif what != "nothing":
        path.symlink_to(what)
    return f"{path.name} is {what}"


DAMAGES: tuple[Damage, ...] = (
    edit_json, edit_json, edit_json, replace_json, edit_bytes, edit_bytes, edit_tensors, edit_header, other_kind,
)  # fmt: skip


def attempt(folder: Path) -> str | None:
    """What is wrong with the answers to this folder; None if nothing is."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    for open_it in (load_pretrained, lambda folder: tables.layers(inspect(folder), folder)):
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                open_it(folder)
        except PifaError:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 -- a panic in Rust is no Exception
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"
        finally:
            signal.alarm(0)
    return None


def attack(count: int, seed: int, *, limited: bool = False) -> list[str]:
    """Opens `count` damaged folders; says which were answered by anything but a `PifaError`."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        sound = build(Path(scratch))
        for folder in sound:
            assert attempt(folder) is None, folder
        if limited:
            limit_memory(MEMORY)
        for each in range(seed, seed + count):
            rng = random.Random(each)
            folder = Path(shutil.copytree(rng.choice(sound), Path(scratch, "damaged")))
            damage = rng.choice(DAMAGES)
            said = damage(folder, rng)
            found = attempt(folder)
            if found is not None:
                wrong.append(f"seed {each}: {damage.__name__}: {said}: {found}")
                print(wrong[-1], flush=True)  # noqa: T201
            shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, first = asked()
    faults = attack(number, first, limited=True)
    print(f"{len(faults)} of {number}")  # noqa: T201
    sys.exit(bool(faults))

"""What compressing a model that lies in files takes: memory as the kernel counts it, and time.

    python benchmarks/large_model.py write FOLDER --layers 30           # a Llama of random weights, bf16, in shards
    python benchmarks/large_model.py run FOLDER OUTPUT --memory 4GiB    # `pifa compress` in a process of its own
    python benchmarks/large_model.py kill FOLDER OUTPUT --kills 20      # the same, killed at random moments
    python benchmarks/large_model.py plan 7B --memory 24GiB             # by arithmetic, for Llama-2's 7B, 13B or 70B

`write` makes hidden 2048, MLP 5632, 32 heads of which 4 for keys and values, the vocabulary of SmolLM2, whose tokenizer
it takes; 30 layers are 1.5 billion parameters. Nothing of it is in memory for longer than it takes to write. `run`
prints a row as JSON: what was planned, what the kernel saw (the largest resident set of the process), seconds. `kill`
resumes after each kill, starts again until there were enough of them, and compares each result with that of a run that
was left alone, byte for byte.
"""

import argparse
import filecmp
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pifa_compiler import CompressConfig
from pifa_compiler.bench.rows import provenance
from pifa_compiler.graph.capture import capture
from pifa_compiler.hf.loading import load_tokenizer
from pifa_compiler.hf.smollm2 import fetch_smollm2
from pifa_compiler.hf.stored_model import WeightsInFiles
from pifa_compiler.memory import parse_bytes
from pifa_compiler.reconstruction.needs import fit_blocks
from pifa_compiler.reconstruction.selection import select_linears


def write(folder: Path, layers: int) -> None:
    """Writes a Llama of random weights, a layer a shard."""
    folder.mkdir(parents=True)
    hidden, mlp, heads, kv_heads = 2048, 5632, 32, 4
    tokenizer = load_tokenizer(fetch_smollm2())
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokenizer),
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    width = hidden // heads * kv_heads
    shapes = {"q": (hidden, hidden), "k": (width, hidden), "v": (width, hidden), "o": (hidden, hidden)}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    size = 0

    def random_matrix(d_out: int, d_in: int) -> torch.Tensor:
        return (torch.randn(d_out, d_in, generator=generator) / d_in**0.5).bfloat16()

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal size
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors = {f"{name}.self_attn.{key}_proj.weight": random_matrix(*shape) for key, shape in shapes.items()}
        tensors |= {f"{name}.mlp.{key}_proj.weight": random_matrix(mlp, hidden) for key in ("gate", "up")}
        tensors[f"{name}.mlp.down_proj.weight"] = random_matrix(hidden, mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        shard(layer + 1, tensors)
    ends = {"model.embed_tokens.weight": random_matrix(len(tokenizer), hidden)}
    ends["lm_head.weight"] = random_matrix(len(tokenizer), hidden)
    ends["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    shard(layers + 1, ends)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Of Llama 2."""


def plan(shape: str, memory: str, samples: int, seqlen: int) -> dict[str, object]:
    """What compressing a model of this shape, in bfloat16, would take; no weight of it is made."""
    given = parse_bytes(memory)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16).eval()
    batches = [torch.zeros(1, seqlen, dtype=torch.int64)] * samples
    none = WeightsInFiles({}, {}, {}, torch.device("cpu"))
    captured = capture(model, batches, weights=none)
    selection = select_linears(model, captured.graph, in_files=True)
    needs, _ = fit_blocks(captured, selection.found, CompressConfig(), given)
    return {"shape": shape, "memory": given, "least": needs.least, "windows": f"{samples} x {seqlen}", **asdict(needs)}


def command(options: argparse.Namespace, output: Path, *more: str) -> list[str]:
    """The command line of one compression."""
    arguments = [sys.executable, "-m", "pifa_compiler", "compress", str(options.folder), "-o", str(output), "--json"]
    for name in ("density", "data", "samples", "seqlen", "seed", "memory"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    return [*arguments, "--rank-multiple", "1", *more]


def run(options: argparse.Namespace) -> dict[str, object]:
    """One compression; what it took."""
    plan = {}
    if options.memory is not None:
        told = subprocess.run(command(options, options.output, "--dry-run"), capture_output=True, text=True, check=True)
        plan = json.loads(told.stdout)
    started = time.perf_counter()
    done = subprocess.run(command(options, options.output), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    report = json.loads(done.stdout)
    # The largest resident set of any child so far: the compression's, as the dry run does less of the same.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        **provenance(),
        "threads": torch.get_num_threads(),
        "setting": {name: str(value) for name, value in vars(options).items()},
        "plan": plan,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
        "density": report["density"],
        "parameters": report["params_before"],
    }


def kill(options: argparse.Namespace) -> dict[str, object]:
    """Runs that are killed again and again until there were enough kills, and one that is not."""
    whole = options.output.with_name(f"{options.output.name}-whole")
    started = time.perf_counter()
    subprocess.run(command(options, whole), capture_output=True, check=True)
    alone, generator, kills, runs = time.perf_counter() - started, random.Random(options.seed), 0, 0
    while kills < options.kills:
        kills += killed_run(options, (generator.uniform(0.1, 1) * alone / 2 for _ in range(options.kills - kills)))
        runs += 1
        files = sorted(path.name for path in whole.iterdir())
        same, other, missing = filecmp.cmpfiles(whole, options.output, files, shallow=False)
        strays = [path.name for path in options.output.parent.iterdir() if path.name.startswith(".")]
        assert set(other) <= {"pifa_report.json"}, other  # it tells how long it took
        assert not missing, missing
        assert not strays, strays
        shutil.rmtree(options.output)
    return {**provenance(), "kills": kills, "runs": runs, "seconds_alone": round(alone, 1), "same": same}


def killed_run(options: argparse.Namespace, patience: Iterator[float]) -> int:
    """One run to its end, killed after each of so many seconds and gone on with; how often it was killed."""
    kills, more = 0, ()
    while True:
        process = subprocess.Popen(command(options, options.output, *more), stdout=subprocess.DEVNULL)
        try:
            if process.wait(timeout=next(patience, None)) == 0:
                return kills
            sys.exit(f"failed with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        begun = options.output.with_name(f".{options.output.name}.run") / "run.json"
        more = ("--resume",) if begun.exists() else ()


def main() -> None:
    """Parses, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writes = verbs.add_parser("write")
    writes.add_argument("folder", type=Path)
    writes.add_argument("--layers", type=int, default=30)
    for verb in ("run", "kill"):
        each = verbs.add_parser(verb)
        each.add_argument("folder", type=Path)
        each.add_argument("output", type=Path)
        each.add_argument("--memory", help="without it the model is loaded")
        each.add_argument("--density", type=float, default=0.5)
        each.add_argument("--data", default="pydoc")
        each.add_argument("--samples", type=int, default=2)
        each.add_argument("--seqlen", type=int, default=512)
        each.add_argument("--seed", type=int, default=3)
        each.add_argument("--kills", type=int, default=20)
    plans = verbs.add_parser("plan")
    plans.add_argument("shape", choices=list(SHAPES))
    plans.add_argument("--memory", default="24GiB")
    plans.add_argument("--samples", type=int, default=128)
    plans.add_argument("--seqlen", type=int, default=2048)
    options = parser.parse_args()
    if options.verb == "write":
        write(options.folder, options.layers)
    elif options.verb == "plan":
        print(json.dumps(plan(options.shape, options.memory, options.samples, options.seqlen)))
    else:
        print(json.dumps(run(options) if options.verb == "run" else kill(options)))


if __name__ == "__main__":
    main()

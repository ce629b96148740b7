"""Opens exports of a Llama-shaped model in onnxruntime on a GPU: providers, values, and times beside the dense export.

    python benchmarks/onnx_gpu.py [--model llama-8x4096] [--layers 2] [--dtypes fp32,fp16] [--providers CUDA,CPU]

For each dtype: PIFA and the dense model of the same weights are exported with a cache, and opened by
`export.session(path, providers=[...])`. It stops with exit code 1 where a node with floating-point results runs on
another provider than the first, or copies them to the host or back; or where logits differ from PyTorch's. Then it
prints medians of a prefill and of a decoded token, inputs bound on the device. `--providers CPU` runs the same without
a GPU; on one it has not been run yet.

onnxruntime-gpu takes the place of onnxruntime: `pip install 'pifa-compiler[onnx-gpu]'` in an environment of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pifa_compiler.export import session, to_onnx
from torch import Tensor

from pifa_compiler.bench.model import ModelPlan, model_variants, open_model
from pifa_compiler.bench.timing import DTYPES

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest difference of logits over the largest logit; a wrong layer is off by about 1."""


def inputs_of(model: Any, tokens: int, past: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A call of an export with a cache, of one sequence."""
    torch.manual_seed(tokens)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, past, size)
    cache = {
        f"past_key_values.{layer}.{part}": torch.randn(shape).to(dtype)
        for layer in range(config.num_hidden_layers)
        for part in ("key", "value")
    }
    ids = torch.randint(config.vocab_size, (1, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones(1, past + tokens, dtype=torch.int64), **cache}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """PyTorch's."""
    from transformers import DynamicCache

    ids, mask, *past = inputs.values()
    cache = DynamicCache(ddp_cache_data=list(zip(past[::2], past[1::2], strict=True)))
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return logits


def elsewhere(profile: Path, provider: str) -> list[str]:
    """Nodes with floating-point results that ran on another provider than `provider`, or copied between devices."""
    found: Counter[str] = Counter()
    for event in json.loads(profile.read_text()):
        about = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in about:
            continue
        types = {name for each in about.get("output_type_shape", []) for name in each}
        copies = about["op_name"].startswith("Memcpy")
        if types & {"float", "float16"} and (copies or about["provider"] != provider):
            found[f"{about['op_name']} on {about['provider']}"] += 1
    return [f"{count} times {what}" for what, count in found.items()]


def milliseconds(opened: Any, inputs: dict[str, Tensor], device: str, rounds: int) -> float:
    """Median of a call, inputs and results on the device."""
    import onnxruntime

    binding = opened.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy(), device, 0))
    for output in opened.get_outputs():
        binding.bind_output(output.name, device)
    times = []
    for _ in range(rounds + 2):
        before = time.perf_counter()
        opened.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times[2:])


def measure(options: argparse.Namespace, dtype: str, providers: list[str], folder: Path) -> list[str]:
    """Exports, checks and times in one dtype; returns what is wrong."""
    import onnxruntime

    plan = ModelPlan(dtype=dtype, layers=options.layers)
    models = model_variants(open_model(options.model, plan))
    phases = {
        "prefill": inputs_of(models["pifa"], options.prompt_tokens, 0, DTYPES[dtype]),
        "decode": inputs_of(models["pifa"], 1, options.decode_context, DTYPES[dtype]),
    }
    wrong, times = [], {}
    for variant in ("dense", "pifa"):
        path = folder / f"{variant}-{dtype}.onnx"
        to_onnx(models[variant], path, kv_cache=True)
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling = True
        settings.profile_file_prefix = str(folder / f"{variant}-{dtype}")
        checked = session(path, providers=providers, options=settings)
        for phase, inputs in phases.items():
            (got,) = checked.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
            wanted = logits_of(models[variant], inputs).double().numpy()
            error = float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())
            if not error <= TOLERANCE[dtype]:
                wrong.append(f"{dtype} {variant} {phase}: logits are off by {error:.2g}")
        wrong += [f"{dtype} {variant}: {what}" for what in elsewhere(Path(checked.end_profiling()), providers[0])]
        opened = session(path, providers=providers)
        device = "cuda" if providers[0].startswith("CUDA") else "cpu"
        for phase, inputs in phases.items():
            times[variant, phase] = milliseconds(opened, inputs, device, options.rounds)
    for phase in phases:
        dense, pifa = times["dense", phase], times["pifa", phase]
        print(f"{dtype} {phase}: dense {dense:.3f} ms, PIFA {pifa:.3f} ms, {pifa / dense:.3f}", flush=True)
    return wrong


def main() -> None:
    """Parses the options, measures, exits with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8x4096", help="as `pifa bench model` takes it, of random weights")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtypes", default="fp32,fp16")
    parser.add_argument("--providers", default="CUDA,CPU", help="of onnxruntime, without ExecutionProvider")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    providers = [f"{name}ExecutionProvider" for name in options.providers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        wrong = [
            line for dtype in options.dtypes.split(",") for line in measure(options, dtype, providers, Path(folder))
        ]
    if wrong:
        sys.exit("\n".join(wrong))
    print("values are PyTorch's, and all floating-point nodes run on", providers[0])


if __name__ == "__main__":
    main()

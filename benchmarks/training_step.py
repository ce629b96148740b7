"""Times a step of training: the dense model beside the same in PIFA form, eager and compiled.

    python benchmarks/training_step.py MODEL [--density 0.5] [--tokens 512] [--threads 1] [--csv FILE]

A step is a forward and a backward pass over one window and an AdamW update of all linears that `compress` takes, in
float32 with products in bfloat16 where the device has units for it: of the dense model their weights, of the other
their factors. The loss is a mean over the logits, so that no teacher is in the times. Ranks are those of one density
for all layers, factors random: no time depends on their values.
"""

import argparse
import copy
import csv
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pifa_compiler import factorize, rank_for_density
from pifa_compiler.bench.rows import provenance
from pifa_compiler.device import find_device, has_bfloat16_units
from pifa_compiler.distillation.student import trained_names
from pifa_compiler.hf.loading import load_model
from pifa_compiler.modules import is_plain_linear, replace_linear


def in_pifa_form(model: nn.Module, density: float, multiple: int = 16) -> list[str]:
    """Replaces all linears but the head, in place; their names."""
    names = [name for name, layer in model.named_modules() if is_plain_linear(layer) and "head" not in name]
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        rank = rank_for_density(*weight.shape, density) // multiple * multiple
        left, right = torch.randn(len(weight), rank), torch.randn(rank, weight.shape[1])
        replace_linear(model, name, factorize(left @ right * weight.std() / rank**0.5, rank=rank))
    return names


def stepper(model: nn.Module, names: list[str], ids: Tensor, *, backend: str | None) -> Callable[[], None]:
    """One step of training the parameters `names`."""
    model.requires_grad_(False)
    parameters = [parameter.requires_grad_() for name, parameter in model.named_parameters() if name in set(names)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    run = model if backend is None else torch.compile(model, backend=backend)
    device = ids.device
    autocast = (
        functools.partial(torch.autocast, device.type, torch.bfloat16) if has_bfloat16_units(device) else nullcontext
    )

    def step() -> None:
        with autocast():
            loss = run(ids, use_cache=False).logits.float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def main() -> None:
    """Parses the options, measures by turns and prints a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = find_device()
    dense = load_model(options.model, dtype="float32")
    pifa = copy.deepcopy(dense)
    linears = in_pifa_form(pifa, options.density)
    ids = torch.randint(0, 1000, (1, options.tokens), device=device)
    weights, factors = [f"{name}.weight" for name in linears], trained_names(pifa, ("factors",))
    dense, pifa = dense.to(device), pifa.to(device)
    steps = {
        "dense_ms": stepper(dense, weights, ids, backend=None),
        "pifa_ms": stepper(pifa, factors, ids, backend=None),
    }
    if not options.eager_only:
        steps["dense_compiled_ms"] = stepper(dense, weights, ids, backend="inductor")
        steps["pifa_compiled_ms"] = stepper(pifa, factors, ids, backend="pifa")
        steps["pifa_inductor_ms"] = stepper(pifa, factors, ids, backend="inductor")
    # On a machine that others use too, the processor's time says what the wall clock does not.
    clock = time.process_time if device.type == "cpu" and options.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-1, options.rounds):  # the first compiles
        for name, step in steps.items():
            started = clock()
            step()
            if round_ >= 0:
                times[name].append(1000 * (clock() - started))
    found = {name: round(statistics.median(each), 1) for name, each in times.items()}
    row = {**provenance(), "model": Path(options.model).name, "density": options.density, "tokens": options.tokens}
    row |= {"threads": options.threads, "rounds": options.rounds, "clock": clock.__name__}
    row |= found
    for name, (above, below) in {
        "pifa_over_dense": ("pifa_ms", "dense_ms"),
        "compiled_over_dense": ("pifa_compiled_ms", "dense_compiled_ms"),
        "compiled_over_inductor": ("pifa_compiled_ms", "pifa_inductor_ms"),
    }.items():
        if above in found and below in found:
            row[name] = round(found[above] / found[below], 3)
    print(row)
    if options.csv is not None:
        new = not options.csv.exists()
        with options.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()

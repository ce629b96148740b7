"""Time that `torch.compile` takes with backend "pifa" beside Inductor, on one model, dense and in PIFA form.

    python benchmarks/compile_time.py llama-16x2048 --layers 4
    python benchmarks/compile_time.py DIR_OR_CONFIG --dtype fp32

A compilation is the first call of a prefill, less a call of the compiled code, all caches off; both backends by turns.
The native code of `pifa::linear_cpu`, which is built once for a machine, is there already. On the dense model backend
"pifa" looks for weights of deficient rank, and finds none: its weights are random numbers here, not the products of the
other's factors.
"""

import argparse
from statistics import median
from time import perf_counter

import torch
from pifa_compiler.kernels import linear_cpu
from torch import Tensor, nn

from pifa_compiler.bench.model import ModelPlan, model_variants, open_model
from pifa_compiler.bench.rows import provenance


def main() -> None:
    """Compiles by turns and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as in `pifa bench model`")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    print(provenance())
    print("native code:", linear_cpu.load() or "built")
    models = model_variants(open_model(options.model, ModelPlan(dtype=options.dtype, layers=options.layers)))
    with torch.no_grad():
        for parameter in models["dense"].parameters():
            parameter.normal_(std=0.02)
    x = torch.zeros(1, options.tokens, dtype=torch.int64)
    for form in ("pifa", "dense"):
        seconds: dict[str, list[float]] = {"inductor": [], "pifa": []}
        for repeat in range(options.repeats + 1):
            for backend, taken in seconds.items():
                found = compile_seconds(models[form], backend, x)
                if repeat > 0:  # the first loads the compiler
                    taken.append(found)
        ours, inductor = median(seconds["pifa"]), median(seconds["inductor"])
        print(f"{form:6} model: inductor {inductor:.1f} s, pifa {ours:.1f} s, ratio {ours / inductor:.3f}")


@torch.no_grad()
def compile_seconds(model: nn.Module, backend: str, x: Tensor) -> float:
    """Seconds of one compilation."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    times = []
    for _ in range(2):
        before = perf_counter()
        compiled(x, use_cache=False)
        times.append(perf_counter() - before)
    return times[0] - times[1]


if __name__ == "__main__":
    main()

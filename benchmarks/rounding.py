"""Rounding errors in bfloat16 of the fused PIFA form beside the pair U V, on a real model's weights.

    python benchmarks/rounding.py MODEL --density 0.5

Every linear's weight is truncated to the rank of the density by its SVD, in float64. The pair U S^1/2, S^1/2 V^T and
the PIFA form are then rounded to the dtype and applied to random inputs, the pair by two GEMMs and PIFA by the code
that `torch.compile(backend="pifa")` runs. An error is that of the outputs against float64, its largest over the largest
output ("max"), or as root mean squares ("rms").
"""

import argparse
import math

import torch
from pifa_compiler.kernels import linear_cpu
from torch import Tensor

from pifa_compiler.bench.rows import provenance
from pifa_compiler.bench.timing import DTYPES
from pifa_compiler.factors import factorize, rank_for_density
from pifa_compiler.hf.loading import load_model
from pifa_compiler.modules import is_plain_linear, weight_of


def main() -> None:
    """Prints the errors of every kind of layer, and the ratio of the largest and of the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=64, help="more than 16, or y_p is kept in float32")
    parser.add_argument("--every", type=int, default=6, help="take every n-th decoder layer")
    options = parser.parse_args()
    if (reason := linear_cpu.load()) is not None:
        raise SystemExit(reason)
    torch.manual_seed(0)
    print(provenance())
    model = load_model(options.model)
    names = [name for name, module in model.named_modules() if is_plain_linear(module) and name != "lm_head"]
    chosen = [name for name in names if int(name.split(".layers.")[1].split(".")[0]) % options.every == 0]
    errors = []
    for name in chosen:
        weight = weight_of(model.get_submodule(name)).detach().double()
        found = errors_of(weight, options.density, DTYPES[options.dtype], options.tokens)
        errors.append(found)
        print(f"{name:40} pair max {found[0]:.4f} rms {found[1]:.4f}   PIFA max {found[2]:.4f} rms {found[3]:.4f}")
    pair_max, pair_rms, pifa_max, pifa_rms = torch.tensor(errors).T
    for kind, pair, pifa in (("largest", pair_max, pifa_max), ("rms", pair_rms, pifa_rms)):
        print(
            f"{kind:8} mean over layers: pair {pair.mean():.4f}, PIFA {pifa.mean():.4f}, "
            f"{pifa.mean() / pair.mean():.2f}x; worst layer {(pifa / pair).max():.2f}x"
        )


def errors_of(weight: Tensor, density: float, dtype: torch.dtype, tokens: int) -> tuple[float, float, float, float]:
    """(pair's max, pair's rms, PIFA's max, PIFA's rms) of a weight [out, in]."""
    rank = rank_for_density(*weight.shape, density)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    root = singular[:rank].sqrt()
    u, v = left[:, :rank] * root, root[:, None] * right[:rank]
    x = torch.randn(tokens, weight.shape[1]).to(dtype)
    exact = x.double() @ v.T @ u.T
    pair = (x @ v.to(dtype).T) @ u.to(dtype).T
    factors = factorize((u, v), rank=rank, dtype=dtype)
    pifa = torch.ops.pifa.linear_cpu(x, factors.w_pivot, factors.coeff, factors.order())
    return *_errors(pair, exact), *_errors(pifa, exact)


def _errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = found.double() - exact
    largest = float(difference.abs().max() / exact.abs().max())
    return largest, math.sqrt(float(difference.square().mean() / exact.square().mean()))


if __name__ == "__main__":
    main()

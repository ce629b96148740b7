"""Perplexity of the methods that look at the dense model only (svd-llm, asvd, svd), from one shared sweep.

    python benchmarks/quality_dense_methods.py MODEL CALIBRATION_TEXT TEST_TEXT --densities 0.8,0.5

Gives the figures of quality.py for these methods in a third of its time: their statistics do not depend on the density.
"""

import argparse
import time

import torch
from quality import record
from torch import Tensor

import pifa_compiler as pc
from pifa_compiler.calibration import calibration_batches, evaluation_batches
from pifa_compiler.capture import capture
from pifa_compiler.linears import count_numbers, embedding_storages, replace_linear, weight_name, weight_of
from pifa_compiler.perplexity import perplexity
from pifa_compiler.pretrained import load_model, load_tokenizer
from pifa_compiler.reconstruct import METHODS, Settings, Statistics
from pifa_compiler.sweep import Group, Sweep


def main() -> None:
    """Sums the statistics once, then solves, replaces and measures for every method and density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--densities", default="0.8,0.5")
    parser.add_argument("--methods", default="svd-llm,asvd,svd")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    options.rank_multiple, options.mix, options.damping, options.ranks = 1, 0.25, 1e-3, ""

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    batches = calibration_batches(options.calibration, model, tokenizer, samples=options.samples, seed=3)
    windows = evaluation_batches(options.test, model, tokenizer, limit=options.windows)
    captured = capture(model, batches)
    gathered: list[tuple[list[str], Statistics]] = []

    def keep(group: Group, statistics: Statistics) -> dict[object, object]:
        gathered.append(([weight_name(node).removesuffix(".weight") for node in group.members], statistics))
        return {}

    linears = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    tied = embedding_storages(model)
    weights = dict(captured.graph.named_parameters(remove_duplicate=False))
    targets = [n for n in linears if weights[weight_name(n)].untyped_storage().data_ptr() not in tied]
    sweep = Sweep(captured, targets, two_flows=False)
    sweep.run(keep)
    for density in (float(text) for text in options.densities.split(",")):
        for name in options.methods.split(","):
            started = time.perf_counter()
            model = load_model(options.model)
            dense = stored = 0
            for layers, statistics in gathered:
                solve = METHODS[name].prepare(statistics, Settings())
                for layer in layers:
                    weight: Tensor = weight_of(model.get_submodule(layer))
                    rank = pc.rank_for_density(*weight.shape, density)
                    low_rank = solve(weight.double(), rank)
                    pair = (low_rank.u, low_rank.v)
                    dense += weight.numel()
                    before = count_numbers(model)
                    factors = pc.factorize(pair, rank=rank, gram=statistics.gram, dtype=weight.dtype)
                    replace_linear(model, layer, factors)
                    stored += weight.numel() + count_numbers(model) - before
            seconds = time.perf_counter() - started
            result = perplexity(model, windows).perplexity
            record(options, name, density, stored / dense, result, seconds, sweep.peak_bytes)


if __name__ == "__main__":
    main()

"""What it would bring if siblings shared one set of pivot rows: the least loss that ranks can reach, apart and shared.

    python benchmarks/shared_bases.py MODEL --data TEXT --density 0.5

Siblings read one input. Shared, [W_1; W_2] is one weight of one rank (concatenated bases, arXiv 2601.11626); apart,
each has its own. A loss is what `two-sided` minimises, in closed form: the tail of the squared singular values of
G^1/2 W A^1/2. Ranks are chosen over the whole model, as the allocator `global` does, and with one rank from the density
for each weight, as `uniform` does. Which siblings share is chosen group by group, at the price that a number has when
all are apart.
"""

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pifa_compiler.bench.rows import provenance
from pifa_compiler.compress import measure
from pifa_compiler.factors import rank_for_density
from pifa_compiler.hf.loading import load_model, load_tokenizer
from pifa_compiler.hf.text import calibration_batches
from pifa_compiler.reconstruction.config import CompressConfig
from pifa_compiler.reconstruction.knapsack import Choices, choices, minimise
from pifa_compiler.reconstruction.roots import damped_root, gram_root
from pifa_compiler.reconstruction.spectra import mean_diagonal

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"))


def main() -> None:
    """Prints the loss of each kind of group shared over that of it apart, and of the whole model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    print(provenance())
    model, tokenizer = load_model(options.model, dtype="float32"), load_tokenizer(options.model)
    batches = calibration_batches(
        options.data, model, tokenizer, samples=options.samples, seqlen=options.seqlen, seed=0
    )
    weighted = _weighted(model, batches)
    tails = {name: _tails(each) for name, each in weighted.items()}
    shapes = {name: tuple(each.shape) for name, each in weighted.items()}
    dense = sum(out * width for out, width in shapes.values())
    budget = int(options.density * dense)
    apart = {name: choices([shapes[name]], tails[name]) for name in tails}
    chosen = dict(zip(apart, minimise(list(apart.values()), budget), strict=True))
    least = sum(float(apart[name].losses[index]) for name, index in chosen.items())
    price = _price(apart, chosen, budget)
    for kinds in SIBLINGS:
        at_one_density, pay = list[float](), 0
        sets = dict(apart)
        for names in _groups(shapes, kinds):
            joint = torch.cat([weighted[name] for name in names])
            curve, shape = _tails(joint), (len(joint), joint.shape[1])
            shared = choices([shape], curve)
            rank = rank_for_density(*shape, options.density)
            ranks = [rank_for_density(*shapes[name], options.density) for name in names]
            uniform = sum(float(tails[name][own]) for name, own in zip(names, ranks, strict=True))
            at_one_density.append(float(curve[rank]) / uniform)
            if _cost(shared, price) < sum(_cost(apart[name], price) for name in names):
                pay += 1
                for name in names:
                    del sets[name]
                sets["+".join(names)] = shared
        found = dict(zip(sets, minimise(list(sets.values()), budget), strict=True))
        saved = sum(float(sets[name].losses[index]) for name, index in found.items()) / least
        mean = torch.tensor(at_one_density).log().mean().exp()
        print(
            f"{'+'.join(kinds):24} shared over apart, each at density {options.density}: {mean:.3f}; ranks chosen over "
            f"the model: {pay} of {len(at_one_density)} groups share, loss of the whole model {saved:.4f}"
        )


def _weighted(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """G^1/2 W A^1/2 of every linear, by the name of its weight."""
    statistics, config = measure(model, batches), CompressConfig()
    found = {}
    for name, parameter in model.named_parameters():
        if name in statistics.gradient_gram:
            inputs = gram_root(statistics.gram[name].double(), statistics.tokens[name])
            gradients = statistics.gradient_gram[name].double()
            outputs = damped_root(gradients, config.gradient_damping * mean_diagonal(gradients))
            found[name] = outputs.matrix().T @ parameter.detach().double() @ inputs.matrix()
    return found


def _tails(weighted: Tensor) -> Tensor:
    """What is lost at rank 0, 1, ..., full."""
    squared = torch.linalg.svdvals(weighted).square()
    return torch.cat((squared.flip(0).cumsum(0).flip(0), squared.new_zeros(1)))


def _groups(names: Mapping[str, object], kinds: Sequence[str]) -> list[list[str]]:
    """Weights of one layer whose names end so, all of them there."""
    stems = [name.removesuffix(f"{kinds[0]}.weight") for name in names if name.endswith(f"{kinds[0]}.weight")]
    groups = [[f"{stem}{kind}.weight" for kind in kinds] for stem in stems]
    return [group for group in groups if all(name in names for name in group)]


def _price(sets: Mapping[str, Choices], chosen: Mapping[str, int], budget: int) -> float:
    """What a number is worth: the loss that one in a thousand more of them saves."""
    more = minimise(list(sets.values()), budget + budget // 1000)
    before = sum(float(sets[name].losses[index]) for name, index in chosen.items())
    after = sum(float(each.losses[index]) for each, index in zip(sets.values(), more, strict=True))
    return (before - after) / (budget // 1000)


def _cost(each: Choices, price: float) -> float:
    return float((each.losses + price * each.costs).min())


if __name__ == "__main__":
    main()

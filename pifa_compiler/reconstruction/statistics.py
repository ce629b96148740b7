"""What is summed over calibration tokens: at the inputs of linears for M, in the dense model to weigh errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import CalibrationError
from ..graph.linears import weight_name


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens at the input of a linear, as float64 tensors.

    Each batch's products are taken in float32, where a sum over n tokens is exact to some sqrt(n) 2^-24 of it, and
    added up in float64: directions of an input that have less than that of the largest are noise in these sums.

    Attributes:
        gram: A = sum x_u x_u^T, [in, in].
        cross: B = sum x_o x_u^T, [in, in]; None where `output_cross` stands in for it at all linears.
        dense_gram: sum x_o x_o^T, [in, in]; the same as `gram` unless the method asked for both.
        mean_abs: mean |x_o| of every channel, [in].
        tokens: how many tokens were summed.
        output_cross: of linears whose output is added to a value h (the residual stream), by the name of their weights:
            sum (W x_o + h_o - h_u) x_u^T, [out, in], h_o in the dense model and h_u in the compressed one. Without the
            drift h_o - h_u it would be W B, and takes fewer products where out < in.
    """

    gram: Tensor
    cross: Tensor | None
    dense_gram: Tensor
    mean_abs: Tensor
    tokens: int
    output_cross: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DenseSums:
    """Sums over the calibration tokens at one linear of the dense model, in float32.

    Attributes:
        gram: sum x x^T of its inputs, [in, in].
        gradient_gram: sum g g^T of the gradients at its outputs, [out, out] (see `gradients`); None if nothing that the
            model predicts depends on them, or they were not asked for.
        sum_abs: sum |x| of every channel, [in].
        tokens: how many tokens were summed; a pooler sees fewer than the layers before it.
    """

    gram: Tensor
    gradient_gram: Tensor | None
    sum_abs: Tensor
    tokens: int

    def plus(self, other: "DenseSums") -> "DenseSums":
        """The sums over the tokens of both."""
        grams = [gram for gram in (self.gradient_gram, other.gradient_gram) if gram is not None]
        gradient_gram = grams[0] + grams[1] if len(grams) == 2 else next(iter(grams), None)
        tokens = self.tokens + other.tokens
        return DenseSums(self.gram + other.gram, gradient_gram, self.sum_abs + other.sum_abs, tokens)

    def statistics(self) -> Statistics:
        """The same at the input alone, as methods of one flow take them."""
        gram = self.gram.double()
        return Statistics(gram, gram, gram, self.sum_abs.double() / max(self.tokens, 1), self.tokens)


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of all experts of a layer in the dense model, where all have a linear, in float32.

    Attributes:
        total: by what is summed: "gram", [n, n], and "sum_abs", [n]; none if there were no gradients to sum.
        tokens: of each expert, by the name of its weight.
    """

    total: Mapping[str, Tensor]
    tokens: Mapping[str, int]

    def of(self, tokens: int) -> dict[str, Tensor]:
        """The sums of so many average tokens, in float64."""
        return {name: total.double() * (tokens / sum(self.tokens.values())) for name, total in self.total.items()}


class SumsOfShared:
    """Adds up the sums of linears that read one weight, of one walk over the dense model.

    Args:
        uses: for the first linear of each such weight, all that read it.
    """

    def __init__(self, uses: Mapping[Node, Sequence[Node]]) -> None:
        self._uses = uses
        self._first = {use: first for first, nodes in uses.items() for use in nodes}
        self._seen: dict[Node, dict[Node, None]] = {}
        self._total: dict[Node, DenseSums] = {}

    def complete(self, linears: Mapping[Node, DenseSums]) -> dict[Node, DenseSums]:
        """The sums of linears by themselves, and of shared weights, by their first linears, once all were added."""
        done = {}
        for linear, sums in linears.items():
            first = self._first.get(linear)
            if first is None:
                done[linear] = sums
                continue
            seen = self._seen.setdefault(first, {})
            if linear in seen:  # the walk began again, in another precision
                seen.clear()
            self._total[first] = self._total[first].plus(sums) if seen else sums
            seen[linear] = None
            if len(seen) == len(self._uses[first]):
                done[first] = self._total.pop(first)
                seen.clear()
        return done


@dataclass
class DenseStatistics:
    """Sums over the calibration tokens in the dense model, by the names of the linears' weights, in float32.

    Attributes:
        gram: sum x x^T, [in, in]; linears on one input share one tensor.
        gradient_gram: sum g g^T, [out, out]; see the module's docstring. The random signs are the same in every run.
        sum_abs: sum |x| of every channel, [in].
        tokens: how many tokens were summed at the input of each; a pooler sees fewer than the layers before it.
        no_gradients: why `gradient_gram` is empty; None if it is not.
        notes: what was out of the ordinary, such as padding that was not known as such.
    """

    gram: dict[str, Tensor] = field(default_factory=dict)
    gradient_gram: dict[str, Tensor] = field(default_factory=dict)
    sum_abs: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    no_gradients: str | None = None
    notes: tuple[str, ...] = ()

    def add(self, linears: Mapping[Node, DenseSums]) -> None:
        """Keeps the sums of linears; what several on one input share is kept once."""
        for linear, sums in linears.items():
            name = weight_name(linear)
            self.gram[name], self.sum_abs[name], self.tokens[name] = sums.gram, sums.sum_abs, sums.tokens
            if sums.gradient_gram is not None:
                self.gradient_gram[name] = sums.gradient_gram

    def forget(self) -> None:
        """Drops all sums."""
        for sums in (self.gram, self.gradient_gram, self.sum_abs, self.tokens):
            sums.clear()

    def of_input(self, name: str) -> Statistics:
        """The sums at the input of the linear with the weight `name`, as methods of one flow take them.

        Raises:
            CalibrationError: nothing is known of this linear.
        """
        return self.sums(name).statistics()

    def sums(self, name: str) -> DenseSums:
        """The sums at the linear with the weight `name`.

        Raises:
            CalibrationError: nothing is known of this linear.
        """
        if name not in self.gram:
            raise CalibrationError(
                f"the statistics know nothing of {name}; measure them on the same model with batches that reach it"
            )
        return DenseSums(self.gram[name], self.gradient_gram.get(name), self.sum_abs[name], self.tokens[name])


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """||(W - W') X|| / ||W X|| on the inputs whose Gram matrix is `gram`; weights [out, in], any dtype."""
    weight = weight.float()
    lost, total = (_energy(each, gram) for each in (weight - approximation.float(), weight))
    return (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor, block: int = 512) -> float:
    """||W X||^2 on the inputs whose Gram matrix is `gram`, by its mean diagonal; W [out, in] in float32.

    Gram matrices are symmetric: of their upper triangle, and half of the diagonal blocks, comes half of the sum.
    """
    size = float(gram.diagonal().double().mean())
    if not size > 0:
        return 0.0
    half = 0.0
    for start in range(0, len(gram), block):
        columns = slice(start, start + block)
        part = (gram[columns, start:].double() / size).float()
        part[:, :block].mul_(0.5)
        half += float(((weight[:, columns] @ part) * weight[:, start:]).sum(dtype=torch.float64))
    return 2 * half

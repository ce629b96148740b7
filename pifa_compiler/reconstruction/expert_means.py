"""Statistics of experts that few tokens were routed to, completed by the mean of all experts of their layer.

The Gram matrix of n tokens says little about directions in which the n tokens hardly are, and nothing beyond n of them:
for n tokens of d channels that all vary alike, its eigenvalues spread over (1 +- sqrt(d / n))^2 (Marchenko and Pastur,
1967). So an expert is taken to have seen `TOKENS_A_CHANNEL` d tokens at the least, those that it lacks being average
tokens of the layer's experts, which both models compute alike. Their inputs have the channels of the residual stream in
common. Channels between an expert's own linears mean nothing to another: there the mean of many is about a multiple of
the identity, which is the damping that is wanted. An expert without any token is left with the mean.

Gradients at what experts add to the residual stream hardly depend on the expert: there the mean is taken for all, which
loses nothing that could be measured and spares a matrix [hidden, hidden] for each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import Node

from ..errors import CalibrationError
from ..graph.linears import weight_name
from .results import Results
from .selection import FoundLinear
from .statistics import DenseSums, ExpertSums, Statistics

TOKENS_A_CHANNEL = 4
"""Of these eigenvalues the least is then a quarter of what it should be, and the largest 2.25 times."""

FEW_TOKENS = f"fewer than {TOKENS_A_CHANNEL} tokens a channel, completed by the mean of all experts"


@dataclass
class _OpenSum:
    """A sum over tokens of several experts, in float64, which leaves no trace of their order."""

    total: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    linears: set[Node] = field(default_factory=set)

    def add(self, linear: Node, tokens: int, parts: Mapping[str, Tensor | None]) -> None:
        if linear in self.linears:  # the walk began again, in another precision
            self.total, self.tokens, self.linears = {}, {}, set()
        self.linears.add(linear)
        self.tokens[weight_name(linear)] = tokens
        for name, part in parts.items():
            if part is not None:
                self.total[name] = self.total[name] + part if name in self.total else part.double()

    def finish(self) -> ExpertSums:
        return ExpertSums({name: total.float() for name, total in self.total.items()}, self.tokens)


class ExpertMeans:
    """Sums over the tokens of all experts of a layer, in the dense model.

    Args:
        found: the linears to compress; those of no experts are passed over.
        results: where sums are kept once those of all experts were added.
    """

    def __init__(self, found: Mapping[Node, FoundLinear], results: Results) -> None:
        self._results = results
        self._shapes: dict[Node, tuple[int, int]] = {}
        self._inputs: dict[Node, str] = {}
        self._outputs: dict[Node, str] = {}
        self._residual: set[Node] = set()
        self._wanted: dict[str, set[Node]] = {}
        self._open: dict[str, _OpenSum] = {}
        self._last: tuple[str, ExpertSums | None] = ("", None)
        for node, linear in found.items():
            if linear.projection is not None:
                self._shapes[node] = linear.shape
                first, path = linear.projection.together[0], linear.projection.path
                self._inputs[node] = f"{first} inputs"  # gate and up read the same
                self._outputs[node] = f"{path} outputs"
                if path == first:
                    self._wanted.setdefault(self._inputs[node], set()).add(node)
                self._wanted.setdefault(self._outputs[node], set()).add(node)
                if linear.projection.is_residual:
                    self._residual.add(node)

    def __bool__(self) -> bool:
        return bool(self._shapes)

    @property
    def are_whole(self) -> bool:
        """Whether of every layer all experts were added, or none."""
        return not self._open

    def begin(self) -> None:
        """Forgets what a walk over the dense model has added of layers that it did not come to the end of."""
        self._open.clear()

    def add(self, linears: Mapping[Node, DenseSums]) -> None:
        """Adds what the dense model gives single experts."""
        for node, sums in linears.items():
            for name, parts in (
                (self._inputs.get(node), {"gram": sums.gram, "sum_abs": sums.sum_abs}),
                (self._outputs.get(node), {"gram": sums.gradient_gram}),
            ):
                if name is not None and node in self._wanted[name]:
                    self._add(name, node, sums.tokens, parts)

    def _add(self, name: str, node: Node, tokens: int, parts: Mapping[str, Tensor | None]) -> None:
        total = self._open.setdefault(name, _OpenSum())
        total.add(node, tokens, parts)
        if total.linears == self._wanted[name]:
            self._results.add_expert_sums(name, self._open.pop(name).finish())
            self._last = ("", None)

    def knows(self, node: Node) -> bool:
        """Whether all sums are there that may be asked for; of a linear of no experts they are."""
        names = [places[node] for places in (self._inputs, self._outputs) if node in places]
        return self._results.known_expert_sums >= set(names)

    def completed(self, node: Node, statistics: Statistics) -> Statistics:
        """Statistics at the input of a linear; of an expert with few tokens together with average ones.

        Raises:
            CalibrationError: no expert of the layer has seen a token.
        """
        lacking = self._lacking(node, statistics.tokens, of_inputs=True)
        if lacking == 0:
            return statistics
        mean = self._sums(self._inputs[node])
        if mean is None or not any(mean.tokens.values()):
            raise CalibrationError(
                f"no token reaches the experts around {weight_name(node)}: the masks leave none in any calibration "
                "batch, or the batches are empty; an attention_mask is 1 at the tokens that count"
            )
        more, tokens = mean.of(lacking), statistics.tokens + lacking
        return replace(
            statistics,
            gram=statistics.gram + more["gram"],
            cross=None if statistics.cross is None else statistics.cross + more["gram"],
            dense_gram=statistics.dense_gram + more["gram"],
            mean_abs=(statistics.mean_abs * statistics.tokens + more["sum_abs"]) / tokens,
            tokens=tokens,
        )

    def own_gradients(self, node: Node, gram: Tensor | None) -> Tensor | None:
        """The Gram matrix of the gradients at the output of a linear, or None where the mean is taken for all."""
        return None if node in self._residual else gram

    def gradients(self, grams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`grams`, by the names of weights, with those of experts completed."""
        return _CompletedGradients(grams, self, {weight_name(node): node for node in self._shapes})

    def gradient(self, node: Node, gram: Tensor | None) -> Tensor | None:
        """The Gram matrix of the gradients at an expert's output, from its own; None if there is none."""
        mean = self._sums(self._outputs[node])
        if mean is None or not mean.total or not any(mean.tokens.values()):
            return gram
        if node in self._residual:
            return mean.of(1)["gram"].float()
        lacking = self._lacking(node, mean.tokens[weight_name(node)], of_inputs=False)
        if gram is None or lacking == 0:
            return gram
        return (gram.double() + mean.of(lacking)["gram"].to(gram.device)).to(gram.dtype)

    def _sums(self, name: str) -> ExpertSums | None:
        if self._last[0] != name:
            self._last = name, self._results.expert_sums(name)
        return self._last[1]

    def _lacking(self, node: Node, tokens: int, *, of_inputs: bool) -> int:
        """How many tokens an expert lacks; 0 of other linears."""
        if node not in self._shapes:
            return 0
        d_out, d_in = self._shapes[node]
        return max(TOKENS_A_CHANNEL * (d_in if of_inputs else d_out) - tokens, 0)


class _CompletedGradients(Mapping[str, Tensor]):
    """Gram matrices of gradients, completed when they are asked for."""

    def __init__(self, own: Mapping[str, Tensor], means: ExpertMeans, experts: Mapping[str, Node]) -> None:
        self._own, self._means, self._experts = own, means, experts

    def __getitem__(self, name: str) -> Tensor:
        node = self._experts.get(name)
        if node is None:
            return self._own[name]
        found = self._means.gradient(node, self._own.get(name))
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in {**dict.fromkeys(self._own), **dict.fromkeys(self._experts)} if name in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import Node

from ..errors import CalibrationError
from ..graph.linears import weight_name
from .selection import FoundLinear
from .statistics import DenseSums, Statistics

TOKENS_A_CHANNEL = 4
"""Of these eigenvalues the least is then a quarter of what it should be, and the largest 2.25 times."""

FEW_TOKENS = f"fewer than {TOKENS_A_CHANNEL} tokens a channel, completed by the mean of all experts"


@dataclass
class _Sum:
    """A sum over tokens of several experts, and of which linears."""

    total: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    linears: set[Node] = field(default_factory=set)

    def add(self, linear: Node, tokens: int, parts: Mapping[str, Tensor]) -> None:
        if linear in self.linears:  # the walk began again, in another precision
            self.total, self.tokens, self.linears = {}, 0, set()
        self.linears.add(linear)
        self.tokens += tokens
        for name, part in parts.items():
            self.total[name] = self.total[name] + part if name in self.total else part

    def of(self, tokens: int) -> dict[str, Tensor]:
        """The sums of so many average tokens."""
        return {name: total.double() * (tokens / self.tokens) for name, total in self.total.items()}


class ExpertMeans:
    """Sums over the tokens of all experts of a layer, in the dense model.

    Args:
        found: the linears to compress; those of no experts are passed over.
    """

    def __init__(self, found: Mapping[Node, FoundLinear]) -> None:
        self._shapes: dict[Node, tuple[int, int]] = {}
        self._inputs: dict[Node, _Sum] = {}
        self._outputs: dict[Node, _Sum] = {}
        self._residual: set[Node] = set()
        sums: dict[object, _Sum] = {}
        for node, linear in found.items():
            if linear.projection is not None:
                self._shapes[node] = linear.shape
                self._inputs[node] = sums.setdefault(linear.projection.together, _Sum())  # gate and up read the same
                self._outputs[node] = sums.setdefault((linear.projection.path, "outputs"), _Sum())
                if linear.projection.path.endswith(".down_proj"):
                    self._residual.add(node)
        self._tokens: dict[Node, int] = {}

    def __bool__(self) -> bool:
        return bool(self._shapes)

    def add(self, linears: Mapping[Node, DenseSums]) -> None:
        """Adds what the dense model gives single experts."""
        for node, sums in linears.items():
            if node in self._shapes:
                self._tokens[node] = sums.tokens
                self._inputs[node].add(node, sums.tokens, {"gram": sums.gram, "sum_abs": sums.sum_abs})
                if sums.gradient_gram is not None:
                    self._outputs[node].add(node, sums.tokens, {"gram": sums.gradient_gram})

    def completed(self, node: Node, statistics: Statistics) -> Statistics:
        """Statistics at the input of a linear; of an expert with few tokens together with average ones.

        Raises:
            CalibrationError: no expert of the layer has seen a token.
        """
        lacking = self._lacking(node, statistics.tokens, of_inputs=True)
        if lacking == 0:
            return statistics
        mean = self._inputs[node]
        if mean.tokens == 0:
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

    def gradients(self, grams: Mapping[str, Tensor]) -> dict[Node, Tensor]:
        """The Gram matrices of gradients of experts where they are others than their own.

        Args:
            grams: their own, by the names of weights.
        """
        found: dict[Node, Tensor] = {}
        means: dict[int, Tensor] = {}
        for node, tokens in self._tokens.items():
            outputs, gram = self._outputs[node], grams.get(weight_name(node))
            lacking = self._lacking(node, tokens, of_inputs=False)
            if outputs.tokens == 0:
                continue
            if node in self._residual:
                found[node] = means.setdefault(id(outputs), outputs.of(1)["gram"].float())
            elif gram is not None and lacking > 0:
                found[node] = (gram.double() + outputs.of(lacking)["gram"]).to(gram.dtype)
        return found

    def _lacking(self, node: Node, tokens: int, *, of_inputs: bool) -> int:
        """How many tokens an expert lacks; 0 of other linears."""
        if node not in self._shapes:
            return 0
        d_out, d_in = self._shapes[node]
        return max(TOKENS_A_CHANNEL * (d_in if of_inputs else d_out) - tokens, 0)

"""Output gradients: how much a language model's predictions feel an error at the output of each linear.

Replacing the weight W [out, in] of a linear by W' moves the model's predictions p, by their Kullback-Leibler divergence
to second order and with the Kronecker factors of K-FAC (Martens and Grosse, arXiv 1503.05671), by a multiple of

    || G^1/2 (W - W') A^1/2 ||_F^2        A = sum x x^T, [in, in]        G = sum g g^T, [out, out]

over the calibration tokens, x the linear's input and g, at its output, the gradient of sum_i 2 z_i sqrt(p_i) with
random signs z for every token: the mean of g g^T over z is Fisher's matrix. The usual g, the gradient of the cross
entropy of a token drawn from p, has the same mean but varies more, as a sure prediction rarely draws another token and
then makes a large gradient. Of the token that really follows in the text, g g^T has another mean, which says less about
curvature (Kunstner et al., arXiv 1905.12558). `dense_statistics` sums both in one forward and one backward pass of the
dense model over every batch.

No gradient of a weight is ever made. The graph runs in blocks, one batch at a time. Of the last blocks everything is
kept that going back needs, as long as it fits `_KEPT_BYTES`; of the others only the values that cross from one to the
next, from which they are computed again. Memory holds the sums, what is kept, and one block.

Where the device has units for bfloat16, products and attention run in it (by autocast): the sums weigh errors and say
where ranks are worth most, for which three digits are plenty. The sums themselves are taken in float32.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, DerivativeError
from ..graph.capture import Captured
from ..graph.linears import weight_name
from ..graph.predictions import Predictions
from ..graph.run import Block, Values, cut_into_blocks, run_block
from .statistics import DenseStatistics
from .sweep import Progress, gram_matrix, tokens_as_rows

_ROWS = 32
"""Tokens whose probabilities are computed at once, in float32: few enough for a cache."""

_TOKENS_FOR_RANKS = 16
"""Tokens for every channel of the widest input: sums of more hardly change the ranks."""

_KEPT_BYTES = 3 << 30
"""What going back may hold of a batch rather than have computed again."""


def dense_statistics(
    captured: Captured,
    targets: Sequence[Node],
    predictions: Predictions,
    progress: Progress | None = None,
    *,
    for_ranks: bool = False,
) -> DenseStatistics:
    """Sums `DenseStatistics` for the linears `targets` over all batches.

    Linears that the logits do not depend on are left out, and those whose output they do not depend on have no sum of
    gradients.

    Args:
        captured: the model's graph and its calibration batches; padding, by the masks, is left out.
        targets: `aten.linear.default` nodes.
        predictions: as `find_predictions` found it.
        progress: called after each batch.
        for_ranks: whether the inputs' sums are for choosing ranks only, so that those of a part of the tokens will do.

    Raises:
        DerivativeError: the graph holds an operation that has no derivative, or cannot be computed so as to have one.
        CalibrationError: a gradient is not finite.
    """
    device = _tokens_of(captured, predictions)[0].device
    bfloat16, notes = has_bfloat16_units(device), []
    try:
        runner = _run(captured, targets, predictions, progress, for_ranks, bfloat16)
    except DerivativeError:
        raise
    except CalibrationError as error:
        if not bfloat16:
            raise DerivativeError(f"{error}; pass gradients=False (--no-gradients)") from error
        notes.append(f"output gradients were computed in float32, not bfloat16: {error}")
        runner = _run(captured, targets, predictions, progress, for_ranks, bfloat16=False)
    for node, gram in runner.gradient_gram.items():
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError(
                f"the gradient at the output of {weight_name(node)} is not finite; calibrate in float32, "
                "or pass gradients=False (--no-gradients)"
            )
    inputs = {weight_name(node): node.all_input_nodes[0] for node in targets}
    inputs = {name: source for name, source in inputs.items() if source in runner.gram}
    return DenseStatistics(
        {name: runner.gram[source] for name, source in inputs.items()},
        {weight_name(node): gram for node, gram in runner.gradient_gram.items()},
        {name: runner.sum_abs[source] for name, source in inputs.items()},
        {name: runner.tokens[source] for name, source in inputs.items()},
        notes=tuple(notes),
    )


def _run(
    captured: Captured,
    targets: Sequence[Node],
    predictions: Predictions,
    progress: Progress | None,
    for_ranks: bool,
    bfloat16: bool,
) -> "_Backward":
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    stride = _stride(captured, targets, predictions) if for_ranks else 1
    runner = _Backward(captured, targets, predictions, stride, bfloat16)
    for index, values in enumerate(captured.inputs):
        runner.add(dict(zip(placeholders, values, strict=True)), index)
        if progress is not None:
            progress(index + 1, len(captured.inputs), "output gradients")
    return runner


def _tokens_of(captured: Captured, predictions: Predictions) -> list[Tensor]:
    """The token ids of every batch."""
    at = captured.graph.graph.find_nodes(op="placeholder").index(predictions.tokens)
    return [values[at] for values in captured.inputs]


def _stride(captured: Captured, targets: Sequence[Node], predictions: Predictions) -> int:
    """One token in so many is enough for `_TOKENS_FOR_RANKS`."""
    tokens = 0
    for index, ids in enumerate(_tokens_of(captured, predictions)):
        mask = captured.masks.rows(predictions.tokens, index, ids.shape)
        tokens += ids.numel() if mask is None else int(mask.sum())
    widest = max(int(node.all_input_nodes[0].meta["val"].shape[-1]) for node in targets)
    return max(tokens // (_TOKENS_FOR_RANKS * widest), 1)


@dataclass(frozen=True)
class _Record:
    """A block that was computed with all that going back through it needs.

    Attributes:
        block: the block.
        leaves: values that crossed into it.
        met: outputs of the linears that gradients are wanted of.
        outputs: values that cross out of it.
        bytes: what it holds, weights left out.
    """

    block: Block
    leaves: dict[Node, Tensor]
    met: dict[Node, Tensor]
    outputs: Values
    bytes: int


def _detached(values: Values) -> Values:
    return {node: pytree.tree_map_only(Tensor, Tensor.detach, value) for node, value in values.items()}


class _Backward:
    """Forward and backward passes over a graph, batch by batch, and their running sums."""

    def __init__(
        self, captured: Captured, targets: Sequence[Node], predictions: Predictions, stride: int, bfloat16: bool
    ) -> None:
        self.bfloat16 = bfloat16
        self.gm = gm = captured.graph
        self.masks, self.predictions, self.targets, self.stride = (
            captured.masks,
            predictions,
            frozenset(targets),
            stride,
        )
        self._summed: set[Node] = set()  # inputs of the batch at hand
        self.blocks = cut_into_blocks(gm, predictions.logits, max(math.isqrt(len(targets)), 1))
        self.gram: dict[Node, Tensor] = {}
        self.gradient_gram: dict[Node, Tensor] = {}
        self.sum_abs: dict[Node, Tensor] = {}
        self.tokens: dict[Node, int] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._weights = {weight.untyped_storage().data_ptr() for weight in gm.parameters()}

    def add(self, inputs: Values, batch: int) -> None:
        """Adds one batch, whose index is `batch`."""
        device = inputs[self.predictions.tokens].device
        self._summed.clear()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            values, crossing, records = inputs, [], deque[_Record]()
            for block in self.blocks:
                crossing.append(values)
                records.append(self._record(block, values, batch))
                while sum(record.bytes for record in records) > _KEPT_BYTES and len(records) > 1:
                    records.popleft()
                values = _detached(records[-1].outputs)
            logits = values.pop(self.predictions.logits)
            counts = self.masks.rows(self.predictions.logits, batch, logits.shape[:2])
            mask = None if counts is None else counts.view(logits.shape[:2])
            gradients = {self.predictions.logits: _logits_gradient(logits, mask, self._generator)}
            del values, logits
            for block in reversed(self.blocks):
                inputs = crossing.pop()
                record = records.pop() if records else self._record(block, inputs, batch)
                gradients = self._back(record, gradients, batch)

    def _sum_inputs(self, source: Node, values: Values, batch: int) -> None:
        if source in self._summed:
            return
        self._summed.add(source)
        readers = [weight_name(user).removesuffix(".weight") for user in source.users if user in self.targets]
        mask = self.masks.rows(source, batch, values[source].shape[:-1], readers)
        rows = tokens_as_rows(values[source].detach(), mask, self.stride)
        self.tokens[source] = self.tokens.get(source, 0) + len(rows)
        _add(self.gram, source, _gram_matrix(rows))
        _add(self.sum_abs, source, rows.abs().sum(dim=0))

    def _record(self, block: Block, inputs: Values, batch: int) -> _Record:
        """Computes a block from the values that cross into it, and sums the inputs of its linears."""
        inputs = _detached(inputs)
        leaves = {
            node: value.requires_grad_()
            for node, value in inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        met: dict[Node, Tensor] = {}
        held: dict[int, int] = {}

        def note(node: Node, values: Values) -> None:
            if node in self.targets:
                met[node] = values[node] if values[node].requires_grad else values[node].requires_grad_()
                self._sum_inputs(node.all_input_nodes[0], values, batch)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output that held itself would never be freed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run_block(self.gm, block, inputs, note)
        return _Record(block, leaves, met, outputs, sum(size for at, size in held.items() if at not in self._weights))

    def _back(self, record: _Record, gradients: Mapping[Node, Tensor], batch: int) -> dict[Node, Tensor]:
        """Gradients at the values that cross into a block, from those at the values that cross out of it."""
        outputs = record.outputs
        ends = [node for node in gradients if node in outputs and outputs[node].requires_grad]
        wanted = [*record.leaves, *record.met]
        if not (ends and wanted):
            return {}
        at, along = [outputs[node] for node in ends], [gradients[node] for node in ends]
        inputs = [*record.leaves.values(), *record.met.values()]
        try:
            found = torch.autograd.grad(at, inputs, along, allow_unused=True)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError as well, and none about the model
        except RuntimeError as error:  # autograd has no narrower one; its NotImplementedError is one
            nodes = record.block.nodes
            raise DerivativeError(
                f"the model has no gradients at {nodes[0].name}..{nodes[-1].name}: {error}; "
                "pass gradients=False (--no-gradients)"
            ) from error
        back = {node: gradient for node, gradient in zip(wanted, found, strict=True) if gradient is not None}
        for node in record.met:
            if node in back:
                mask = self.masks.rows(node.all_input_nodes[0], batch, back[node].shape[:-1])
                rows = tokens_as_rows(back[node], mask)
                _add(self.gradient_gram, node, _gram_matrix(rows))
        return {node: gradient for node, gradient in back.items() if node in record.leaves}


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a device."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _gram_matrix(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return gram_matrix(rows)


def _add(sums: dict[Node, Tensor], node: Node, term: Tensor) -> None:
    if node in sums:
        sums[node] += term
    else:
        sums[node] = term


def _logits_gradient(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gradient of sum_i 2 z_i sqrt(p_i) of every token, [batch, tokens, vocabulary]; 0 where padding is.

    With p = softmax(logits) it is sqrt(p) * (z - sqrt(p) (sqrt(p) . z)). The signs z of a token are those of the token
    before it, moved on by one, times one of its own: no entry of the vocabulary has the same ones at two tokens, and
    few random numbers are drawn.
    """
    gradient = torch.empty_like(logits)
    count, vocabulary = logits.shape[1:]
    for row in range(logits.shape[0]):
        signs = _signs(count + vocabulary - 1, generator).to(logits.device, torch.float32)
        own = _signs(count, generator).to(signs)
        if mask is not None:
            own *= mask[row].bool()
        for start in range(0, count, _ROWS):
            tokens = slice(start, start + _ROWS)
            root = logits[row, tokens].float().log_softmax(dim=1).mul_(0.5).exp_()  # sqrt(p)
            z = signs[start : start + len(root) + vocabulary - 1].unfold(0, vocabulary, 1)
            along = (root * z).sum(dim=1, keepdim=True)
            gradient[row, tokens] = torch.addcmul(z, root, along, value=-1).mul_(root).mul_(own[tokens, None])
    return gradient


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers -1 and 1, [count], int64."""
    return torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1)

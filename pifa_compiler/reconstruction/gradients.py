"""Output gradients: how much a language model's predictions feel an error at the output of each linear.

Replacing the weight W [out, in] of a linear by W' moves the model's predictions p, by their Kullback-Leibler divergence
to second order and with the Kronecker factors of K-FAC (Martens and Grosse, arXiv 1503.05671), by a multiple of

    || G^1/2 (W - W') A^1/2 ||_F^2        A = sum x x^T, [in, in]        G = sum g g^T, [out, out]

over the calibration tokens, x the linear's input and g, at its output, the gradient of sum_i 2 z_i sqrt(p_i) with
random signs z for every token: the mean of g g^T over z is Fisher's matrix. The usual g, the gradient of the cross
entropy of a token drawn from p, has the same mean but varies more, as a sure prediction rarely draws another token and
then makes a large gradient. Of the token that really follows in the text, g g^T has another mean, which says less about
curvature (Kunstner et al., arXiv 1905.12558). `sum_dense` sums both in one forward and one backward pass of the dense
model over every batch.

No gradient of a weight is ever made. The graph runs in blocks, each over all batches before the next: forward, where
only the values that cross from one block to another are kept, and back from the last, where each block is computed once
more, for one batch at a time, with all that going back through it needs. When a block is done its sums are complete and
are handed over. Memory holds the crossing values, the sums of one block, and one block of one batch.

Where the device has units for bfloat16, products and attention run in it (by autocast): the sums weigh errors and say
where ranks are worth most, for which three digits are plenty. The sums of a batch are taken in float32 and added up in
float64, which leaves no trace of their order: several processes find what one does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..device import has_bfloat16_units
from ..errors import CalibrationError, DerivativeError
from ..graph.capture import Captured
from ..graph.linears import weight_name
from ..graph.predictions import Predictions
from ..graph.run import Block, Values, one_by_one, run_block
from ..processes import Processes
from .statistics import DenseSums
from .sweep import Progress, gram_matrix, tokens_as_rows
from .value_store import Room, ValueStore

_ROWS = 32
"""Tokens whose probabilities are computed at once, in float32: few enough for a cache."""

_TOKENS_FOR_RANKS = 16
"""Tokens for every channel of the widest input: sums of more hardly change the ranks."""

Keep = Callable[[Mapping[Node, DenseSums]], None]
"""Called with linears and their sums once they are complete; what it does not keep is forgotten."""


@dataclass(frozen=True)
class BlockDone:
    """What is left to do after a block, so that a run that was stopped can go on behind it.

    Attributes:
        block: its number, counted from the first of the graph.
        gradients: for each of the process's batches, the gradients at the values that cross into it.
        bfloat16: whether they were computed in bfloat16.
    """

    block: int
    gradients: Sequence[Mapping[Node, Tensor]]
    bfloat16: bool


def sum_dense(
    captured: Captured,
    linears: Sequence[Node],
    predictions: Predictions,
    keep: Keep,
    progress: Progress | None = None,
    *,
    for_ranks: bool = False,
    room: Room | None = None,
    done: BlockDone | None = None,
    save: Callable[[BlockDone], None] | None = None,
    processes: Processes | None = None,
) -> list[str]:
    """Sums over all batches, for the linears given, what `DenseSums` holds.

    Linears that the logits do not depend on are left out, and those whose output they do not depend on have no sum of
    gradients.

    Args:
        captured: the model's graph and its calibration batches; padding, by the masks, is left out.
        linears: `aten.linear.default` nodes.
        predictions: as `find_predictions` found it.
        keep: takes the sums.
        progress: called after each block of the way there and back.
        for_ranks: whether the inputs' sums are for choosing ranks only, so that those of a part of the tokens will do.
        room: where the values that cross between blocks may lie.
        done: where an earlier run came to, which has kept the sums of this block and all behind it.
        save: called after each block on the way back, before the next.
        processes: those that share the batches; None is this one alone.

    Returns:
        What was out of the ordinary.

    Raises:
        DerivativeError: the graph holds an operation that has no derivative, or cannot be computed so as to have one.
        CalibrationError: a gradient is not finite.
        OffloadError: values that cross between blocks cannot be written.
    """
    device = _tokens_of(captured, predictions)[0].device
    bfloat16, notes = has_bfloat16_units(device), list[str]()
    if done is not None and bfloat16 and not done.bfloat16:  # it was tried then, and sums of float32 are kept
        bfloat16 = False
        notes.append("output gradients were computed in float32, as a run before this one found that they have to be")
    stride = _stride(captured, linears, predictions) if for_ranks else 1
    while True:
        walk = _Walk(captured, linears, predictions, stride, bfloat16, keep, room or Room(), processes or Processes())
        try:
            walk.run(progress, done if done is not None and done.bfloat16 == bfloat16 else None, save)
            return notes
        except (DerivativeError, _NotFiniteError):
            raise
        except CalibrationError as error:
            if not bfloat16:
                raise DerivativeError(f"{error}; pass gradients=False (--no-gradients)") from error
            notes.append(f"output gradients were computed in float32, not bfloat16: {error}")
            bfloat16 = False
        finally:
            walk.values.clear()
            walk.gradients.clear()


def _tokens_of(captured: Captured, predictions: Predictions) -> list[Tensor]:
    """The token ids of every batch."""
    at = captured.graph.graph.find_nodes(op="placeholder").index(predictions.tokens)
    return [values[at] for values in captured.inputs]


def _stride(captured: Captured, linears: Sequence[Node], predictions: Predictions) -> int:
    """One token in so many is enough for `_TOKENS_FOR_RANKS`."""
    tokens = 0
    for index, ids in enumerate(_tokens_of(captured, predictions)):
        mask = captured.masks.rows(predictions.tokens, index, ids.shape)
        tokens += ids.numel() if mask is None else int(mask.sum())
    widest = max(int(node.all_input_nodes[0].meta["val"].shape[-1]) for node in linears)
    return max(tokens // (_TOKENS_FOR_RANKS * widest), 1)


@dataclass(frozen=True)
class _Record:
    """A block that was computed with all that going back through it needs.

    Attributes:
        block: the block.
        leaves: values that crossed into it.
        met: outputs of the linears that gradients are wanted of.
        outputs: values that cross out of it.
        masks: which tokens count, by what the linears read.
    """

    block: Block
    leaves: dict[Node, Tensor]
    met: dict[Node, Tensor]
    outputs: Values
    masks: dict[Node, Tensor | None]


def _detached(values: Values) -> Values:
    return {node: pytree.tree_map_only(Tensor, Tensor.detach, value) for node, value in values.items()}


@dataclass
class _Sums:
    """Running sums of one block: of the inputs that its linears read, by their nodes, and of its linears' outputs."""

    gram: dict[Node, Tensor] = field(default_factory=dict)
    sum_abs: dict[Node, Tensor] = field(default_factory=dict)
    tokens: dict[Node, int] = field(default_factory=dict)
    gradient_gram: dict[Node, Tensor] = field(default_factory=dict)

    def finish(self, processes: Processes) -> None:
        """Makes the sums those of all processes, in float32; one after the other, as they take much of the memory."""
        if processes.size > 1:
            self._add_those_of_others(processes)
        for sums in (self.gram, self.sum_abs, self.gradient_gram):
            for node in sums:
                sums[node] = sums[node].float()

    def _add_those_of_others(self, processes: Processes) -> None:
        nodes = {node.name: node for node in (*self.gram, *self.gradient_gram)}
        own = {f"tokens {node.name}": torch.tensor(count) for node, count in self.tokens.items()}
        for part in ("gram", "sum_abs", "gradient_gram"):
            own |= {f"{part} {node.name}": tensor for node, tensor in getattr(self, part).items()}
        for key, total in processes.sum(own).items():
            part, _, name = key.partition(" ")
            getattr(self, part)[nodes[name]] = int(total) if part == "tokens" else total


class _NotFiniteError(CalibrationError):
    """A gradient is NaN or infinite."""


class _Walk:
    """The forward and backward pass over a graph, block by block, and the sums of the block at hand."""

    def __init__(
        self,
        captured: Captured,
        linears: Sequence[Node],
        predictions: Predictions,
        stride: int,
        bfloat16: bool,
        keep: Keep,
        room: Room,
        processes: Processes,
    ) -> None:
        self.captured, self.predictions, self.linears = captured, predictions, frozenset(linears)
        self.stride, self.bfloat16, self.keep = stride, bfloat16, keep
        self.processes, self.own = processes, processes.own(len(captured.inputs))
        self.blocks = captured.blocks(predictions.logits)
        self.device = _tokens_of(captured, predictions)[0].device
        self.placeholders = captured.graph.graph.find_nodes(op="placeholder")
        self.values = ValueStore(room)  # by batch: what crosses between blocks
        self.gradients = ValueStore(room)  # by batch: the gradients at what crosses into the block done last

    def run(self, progress: Progress | None, done: BlockDone | None, save: Callable[[BlockDone], None] | None) -> None:
        steps, behind = 2 * len(self.blocks) - 1, len(self.blocks) if done is None else done.block

        def tell(step: int) -> None:
            if progress is not None:
                progress(step, steps, "output gradients")

        if behind == 0:
            return
        for batch in self.own:
            self.values.put(batch, dict(zip(self.placeholders, self.captured.inputs[batch], strict=True)))
        weights = self.captured.weights
        for index, block in enumerate(one_by_one(weights, self.blocks[: behind - 1])):
            self._forward(block)
            tell(index + 1)
        if done is not None:
            for batch, gradients in zip(self.own, done.gradients, strict=True):
                self.gradients.put(batch, {node: gradient.to(self.device) for node, gradient in gradients.items()})
        index = behind
        for block in one_by_one(weights, self.blocks[:behind][::-1]):
            index -= 1
            self._backward(block, index)
            tell(steps - index)
            if save is not None:
                crossing = [self.gradients.get(batch) for batch in self.own]
                save(BlockDone(index, crossing, self.bfloat16))
        self.gradients.clear()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @torch.no_grad()
    def _forward(self, block: Block) -> None:
        for batch in self.own:
            with self._autocast():
                self.values.add(batch, run_block(self.captured.weights, block, self._crossing(block, batch)))

    def _backward(self, block: Block, index: int) -> None:
        sums = _Sums()
        before = self.blocks[index - 1].nodes if index else self.placeholders
        for batch in self.own:
            with self._autocast():
                record = self._record(block, batch, sums)
                if index == len(self.blocks) - 1:
                    logits = record.outputs[self.predictions.logits].detach()
                    gradients: Values = {self.predictions.logits: self._gradient_of(logits, batch)}
                    del logits
                else:
                    gradients = self.gradients.get(batch)
                gradients = self._back(record, gradients, batch, sums)
                self.gradients.put(batch, {})  # what this block adds to has another value now
                self.gradients.put(batch, gradients)
            self.values.drop(batch, set(before))  # going back through the block before makes them anew
        self.captured.weights.give_back()  # what is done with sums takes room
        sums.finish(self.processes)
        self.keep({node: _complete(node, sums) for node in block.nodes if node in self.linears})

    def _crossing(self, block: Block, batch: int) -> Values:
        read = {parent for node in block.nodes for parent in node.all_input_nodes}
        picks = self.captured.masks.picks
        read |= {picks[source].tokens for source in read if source in picks}
        return _detached(self.values.select(batch, read))

    def _gradient_of(self, logits: Tensor, batch: int) -> Tensor:
        counts = self.captured.masks.rows(self.predictions.logits, batch, logits.shape[:2])
        mask = None if counts is None else counts.view(logits.shape[:2])
        return _logits_gradient(logits, mask, torch.Generator().manual_seed(batch))

    def _sum_inputs(self, source: Node, values: Values, batch: int, sums: _Sums) -> Tensor | None:
        """Sums what linears read; returns which of its tokens count."""
        readers = [weight_name(user).removesuffix(".weight") for user in source.users if user in self.linears]
        masks, pick = self.captured.masks, self.captured.masks.picks.get(source)
        picked = None if pick is None else values[pick.tokens]
        mask = masks.rows(source, batch, values[source].shape[:-1], readers, picked)
        # Of tokens that were picked there are few already.
        rows = tokens_as_rows(values[source].detach(), mask, self.stride if pick is None else 1)
        sums.tokens[source] = sums.tokens.get(source, 0) + len(rows)
        _add(sums.gram, source, _gram_matrix(rows))
        _add(sums.sum_abs, source, rows.abs().sum(dim=0))
        return mask

    def _record(self, block: Block, batch: int, sums: _Sums) -> _Record:
        """Computes a block from the values that cross into it, and sums the inputs of its linears."""
        inputs = self._crossing(block, batch)
        leaves = {
            node: value.requires_grad_()
            for node, value in inputs.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        met: dict[Node, Tensor] = {}
        masks: dict[Node, Tensor | None] = {}

        def note(node: Node, values: Values) -> None:
            if node in self.linears:
                met[node] = values[node] if values[node].requires_grad else values[node].requires_grad_()
                source = node.all_input_nodes[0]
                if source not in masks:
                    masks[source] = self._sum_inputs(source, values, batch, sums)

        with torch.enable_grad():
            outputs = run_block(self.captured.weights, block, inputs, note)
        made = set(block.nodes)
        return _Record(block, leaves, met, {node: value for node, value in outputs.items() if node in made}, masks)

    def _back(self, record: _Record, gradients: Values, batch: int, sums: _Sums) -> Values:
        """Gradients at the values that cross into a block, from those at the values that cross out of it."""
        outputs = record.outputs
        before = {node: gradient for node, gradient in gradients.items() if node not in record.block.nodes}
        ends = [node for node in gradients if node in outputs and outputs[node].requires_grad]
        wanted = [*record.leaves, *record.met]
        if not (ends and wanted):
            return before
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
        for node, gradient in zip(wanted, found, strict=True):
            if gradient is not None and node in record.leaves:
                before[node] = before[node] + gradient if node in before else gradient
            elif gradient is not None:
                rows = tokens_as_rows(gradient, record.masks[node.all_input_nodes[0]])
                _add(sums.gradient_gram, node, _gram_matrix(rows))
        return before


def _complete(linear: Node, sums: _Sums) -> DenseSums:
    source, gram = linear.all_input_nodes[0], sums.gradient_gram.get(linear)
    if gram is not None and not bool(torch.isfinite(gram).all()):
        raise _NotFiniteError(
            f"the gradient at the output of {weight_name(linear)} is not finite; calibrate in float32, "
            "or pass gradients=False (--no-gradients)"
        )
    return DenseSums(sums.gram[source], gram, sums.sum_abs[source], sums.tokens[source])


def _gram_matrix(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return gram_matrix(rows)


def _add(sums: dict[Node, Tensor], node: Node, term: Tensor) -> None:
    if node in sums:
        sums[node] += term
    else:
        sums[node] = term.double()


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

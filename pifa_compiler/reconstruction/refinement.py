"""Block refinement: the factors of a residual block are trained together, until it computes what the dense one does.

The closed form brings the output of one linear at a time close to the dense model's. What lies between two sums of
the residual stream is more than that: the key may make up for an error of the query, and the output linear for one of
both. So once the linears of a block are solved, their factors take some steps of AdamW on

    sum of (y - y_o)^T G (y - y_o)

over tokens, y the sum that ends the block on inputs of the compressed model, y_o the dense model's, G the Gram matrix
of the gradients there (see `gradients`), damped as in the closed form. The last of the calibration batches are held
out, and say which state is kept: the one to start with, if none is better. AA-SVD refines blocks so, without G.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import CalibrationError, DerivativeError
from ..factors import PifaFactors
from ..graph.linears import read_weight, weight_name
from ..graph.weights import Weights
from ..processes import Processes
from ..schedule import learning_rate
from .results import Results, factors_of
from .solver import Solved
from .spectra import mean_diagonal
from .statistics import Statistics, relative_error
from .sweep import BlockValues, Group, ResidualBlock, Segment

LEAST_BATCHES = 2
"""One to train on, one held out."""

_HELD_OUT = 8
"""One in so many batches is held out, the last ones."""

_STEPS_A_PASS = 8
"""Steps that go over the other batches once."""

_EVALUATIONS = 10
"""Of the held-out batches, in the course of all steps."""

_RATE, _WARMUP, _CLIP = 3e-4, 0.1, 1.0
"""The highest learning rate, the share of steps until then, and the largest norm of a gradient."""


def passes_of(steps: int) -> float:
    """How often so many steps compute a block on all batches, about; there and back counts three times."""
    return 3 * steps / _STEPS_A_PASS + (_EVALUATIONS + 1) / _HELD_OUT


@dataclass(frozen=True)
class Trained:
    """What became of the factors of a block.

    Attributes:
        factors: in the state that was kept.
        error: of that state on the held-out batches, over the error at the start.
        step: after which it was reached; 0 at the start.
        note: what ended the training early; None if nothing did.
    """

    factors: dict[Node, PifaFactors]
    error: float
    step: int
    note: str | None = None

    def __str__(self) -> str:
        if self.step == 0:
            said = "no step made its block better on the held-out batches"
        else:
            said = f"refined: error of its block on the held-out batches times {self.error:.3f} (step {self.step})"
        return said if self.note is None else f"{said}; {self.note}"


def train_block(
    values: BlockValues,
    factors: Mapping[Node, PifaFactors],
    gradient_gram: Tensor | None,
    *,
    steps: int,
    damping: float,
    processes: Processes,
) -> Trained:
    """Trains factors of a block; see the module's docstring.

    They are trained in float32 and computed with in their own dtype, so that errors are those of what is stored.

    Args:
        values: the block on the calibration batches, of which `LEAST_BATCHES` are needed.
        factors: of the block's linears.
        gradient_gram: G [out, out], any scale; None is the identity.
        steps: of AdamW.
        damping: multiple of G's mean diagonal that is added to it.
        processes: those that share the batches.

    Raises:
        DerivativeError: the block holds an operation that has no derivative.
    """
    parameters = {
        (node, part): nn.Parameter(getattr(each, part).float().clone())
        for node, each in factors.items()
        for part in ("w_pivot", "coeff")
    }

    def rounded() -> dict[Node, PifaFactors]:
        return {
            node: replace(
                each,
                w_pivot=parameters[node, "w_pivot"].to(each.w_pivot.dtype),
                coeff=parameters[node, "coeff"].to(each.coeff.dtype),
            )
            for node, each in factors.items()
        }

    def error_of(batch: int) -> Tensor:
        difference = values.output(batch, rounded()) - values.wanted(batch)
        return (difference @ weighting * difference).sum() if weighting is not None else difference.square().sum()

    def error_held_out() -> float:
        own = [error_of(batch).double() for batch in held_out if batch in values.own]
        return float(processes.sum({"error": sum(own, torch.zeros((), dtype=torch.float64, device=device))})["error"])

    device = next(iter(factors.values())).w_pivot.device
    weighting = None if gradient_gram is None else _damped(gradient_gram.to(device), damping)
    first_held_out = values.count - max(values.count // _HELD_OUT, 1)
    held_out = range(first_held_out, values.count)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start = best = error_held_out()
    kept, best_step = dict(factors), 0
    if not start > 0:  # nothing to gain
        return Trained(kept, 1.0, 0)
    for step, batches in enumerate(_batches_of_steps(first_held_out, steps), start=1):
        scale = len(held_out) / (start * len(batches))
        for batch in batches:
            if batch in values.own:
                _add_gradients(partial(error_of, batch), scale)
        _sum_gradients(parameters, processes)
        norm = float(nn.utils.clip_grad_norm_(parameters.values(), _CLIP))
        if not math.isfinite(norm):
            return Trained(kept, best / start, best_step, f"step {step} had a gradient that is not finite")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(_RATE, (step - 0.5) / steps, _WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        if step == steps or step * _EVALUATIONS // steps > (step - 1) * _EVALUATIONS // steps:
            error = error_held_out()
            if error < best:
                best, best_step = error, step
                kept = {
                    node: replace(each, w_pivot=each.w_pivot.detach().clone(), coeff=each.coeff.detach().clone())
                    for node, each in rounded().items()
                }
    return Trained(kept, best / start, best_step)


def _damped(gram: Tensor, damping: float) -> Tensor:
    """G of mean diagonal 1, damped, in float32."""
    weighting = gram.double() / mean_diagonal(gram)
    weighting.diagonal().add_(damping)
    return weighting.float()


def _batches_of_steps(count: int, steps: int) -> Iterator[list[int]]:
    """The batches of every step: all of them in turn, in another order every time."""
    generator, size = torch.Generator().manual_seed(0), math.ceil(count / _STEPS_A_PASS)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        del order[:size]


def _add_gradients(error: Callable[[], Tensor], scale: float) -> None:
    try:
        with torch.enable_grad():
            (scale * error()).backward()
    except torch.OutOfMemoryError:
        raise  # a RuntimeError as well, and none about the model
    except (RuntimeError, CalibrationError) as found:  # autograd has none that is narrower than the first
        raise DerivativeError(f"a block has no gradients: {found}") from found


def _sum_gradients(parameters: Mapping[tuple[Node, str], nn.Parameter], processes: Processes) -> None:
    if processes.size == 1:
        return
    names = {f"{node.name} {part}": parameter for (node, part), parameter in parameters.items()}
    own = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in names.items()}
    for name, gradient in processes.sum(own).items():
        names[name].grad = gradient


class Refinement:
    """Refines the blocks of one sweep, and hands on what groups were solved to: those of a block together, after it.

    So a run that was stopped goes on with whole blocks. Groups that no block ends after are handed on at once.

    Args:
        segments: of the sweep.
        steps: for each block.
        damping: of the Gram matrices of gradients.
        results: where findings are kept.
        weights: where the dense weights are read.
        shared: linears whose weights are used elsewhere too; their blocks are left as they are.
        processes: those that share the run.
        device: where factors are wanted.
    """

    def __init__(
        self,
        segments: Iterable[Segment],
        *,
        steps: int,
        damping: float,
        results: Results,
        weights: Weights,
        shared: Iterable[Node],
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._blocks = {group: each.block for each in segments if each.block is not None for group in each.block.groups}
        self._steps, self._damping, self._results, self._weights = steps, damping, results, weights
        self._shared, self._processes, self._device = frozenset(shared), processes, device
        self._open: dict[Group, tuple[Mapping[Node, Solved], Tensor]] = {}
        self._known: dict[ResidualBlock, bool] = {}

    def known(self, group: Group) -> dict[Node, PifaFactors] | None:
        """What an earlier run made of a group, if it has done the group's whole block."""
        block = self._blocks.get(group)
        if block is not None and block not in self._known:
            self._known[block] = all(self._results.solved(each) is not None for each in block.groups)
        if block is not None and not self._known[block]:
            return None
        return factors_of(self._results.solved(group), self._device)

    def add(self, group: Group, statistics: Statistics, solved: Mapping[Node, Solved]) -> None:
        """Takes what a group was solved to."""
        if group in self._blocks:
            self._open[group] = solved, statistics.gram.float()
        elif self._steps:
            note = "not refined: in no residual block"
            self._results.add_group(group, {node: _noted(each, note) for node, each in solved.items()})
        else:
            self._results.add_group(group, solved)

    def refine(self, block: ResidualBlock, values: BlockValues) -> dict[Node, PifaFactors]:
        """Trains a block whose groups were added, and hands them on; its factors if they changed."""
        before = {node: each.factors for group in block.groups for node, each in self._open[group][0].items()}
        refined: dict[Node, PifaFactors] = {}
        if not self._shared.isdisjoint(before):
            note = "not refined: a weight of its block is used elsewhere too"
        else:
            gram = self._results.gradient_grams.get(weight_name(block.last))
            try:
                trained = train_block(
                    values, before, gram, steps=self._steps, damping=self._damping, processes=self._processes
                )
                refined, note = trained.factors if trained.step else {}, str(trained)
            except DerivativeError as error:
                note = f"not refined: {error}"
        for group in block.groups:
            solved, inputs = self._open.pop(group)
            self._results.add_group(
                group, {node: self._of(node, each, refined.get(node), inputs, note) for node, each in solved.items()}
            )
        return refined

    def _of(self, node: Node, solved: Solved, factors: PifaFactors | None, gram: Tensor, note: str) -> Solved:
        if factors is None:
            return _noted(solved, note)
        error = relative_error(read_weight(self._weights, node), factors.dense(), gram)
        return _noted(Solved(factors, replace(solved.report, error=error)), note)


def _noted(solved: Solved, note: str) -> Solved:
    return replace(solved, report=replace(solved.report, notes=(*solved.report.notes, note)))


def check_batches(count: int) -> None:
    """Refuses to refine with fewer than `LEAST_BATCHES` calibration batches.

    Raises:
        CalibrationError: there are fewer.
    """
    if count < LEAST_BATCHES:
        raise CalibrationError(
            f"refine holds out a part of the calibration batches and needs {LEAST_BATCHES} or more, got {count}; give "
            "more, shorter ones, or leave refine out"
        )

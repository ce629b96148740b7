"""What a run of `Reconstruction` will take of memory, disk and time, by arithmetic over the captured graph."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.capture import Captured
from ..graph.picked_tokens import Pick, choices
from ..graph.run import Block, weights_of
from ..memory import format_bytes, resident_bytes
from .config import CompressConfig
from .methods import METHODS
from .refinement import passes_of
from .selection import FoundLinear
from .sweep import ResidualBlock, groups, plan

_SOLVE_COPIES = 4
"""Matrices of the size of a linear's larger Gram matrix in float64 that its solution holds at once; measured, 3.2."""

_SOLVE_PRODUCTS = 12
"""Products of such matrices that its decompositions and roots take, about; a measured figure of one model."""

_WIDER = 4
"""Within a block more values live at once than at its border, about so many times (query, key, value, gate, up)."""

_OF_SUMS = 8
"""Bytes of an entry of a sum."""

_OF_TRAINED = 24
"""Bytes of a number that is trained: its value, gradient, two moments, best state, and what an update makes."""

_WRITTEN_COPIES = 3
"""Of a tensor of all experts while it is put together: its parts, the whole, and the whole that is written."""

SHARES = (8, 16, 32, 64)
"""The weights of a block take at most this part of the memory: the first, or the next where more does not fit."""

_MARGIN = 1.1
"""For what allocators hold beyond what is asked of them."""


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    Attributes:
        process: bytes that are held already: libraries, the graph, the batches.
        block: bytes of weights, values and sums of the step that takes most, for one batch.
        solve: bytes of the solution of the widest linear.
        written: bytes of the largest tensor of experts while it is put together.
        values: bytes of what is kept of all batches between two steps; in memory or in files.
        kept: bytes of results on disk.
        share: of the model's weights, that of the linears to compress.
        products: multiplications and additions in the model's own precision.
        solving: the same of solutions.
    """

    process: int
    block: int
    solve: int
    written: int
    values: int
    kept: int
    share: float
    products: float
    solving: float

    @property
    def least(self) -> int:
        """Bytes of memory without which nothing works."""
        return int(self.process + _MARGIN * max(self.block, self.solve, self.written))

    @property
    def in_memory(self) -> int:
        """Bytes of memory if nothing is kept in files: values of all windows, and results, beside the least."""
        return self.least + self.values + self.kept

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.process)} are held already, the largest block takes {format_bytes(self.block)}, the "
            f"widest linear {format_bytes(self.solve)}"
            + (f", a tensor of all experts {format_bytes(self.written)}" if self.written else "")
        )

    def seconds(self, device: torch.device) -> float:
        """About how long it will take, by the speed of a product measured now."""
        return self.products / _speed(device, torch.float32) + self.solving / _speed(device, torch.float64)


def needs_of(captured: Captured, found: Mapping[Node, FoundLinear], config: CompressConfig) -> Needs:
    """What compressing these linears of a captured model will take.

    Args:
        captured: the model, and the batches.
        found: the linears to compress.
        config: what is to be done.
    """
    (output,) = captured.graph.graph.find_nodes(op="output")
    linears = list(found)
    last = [node for node in output.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    blocks = captured.blocks(last[0] if last else linears[-1])
    gradients = METHODS[config.method].gradients and config.gradients
    sizes = dict(captured.graph.named_parameters(remove_duplicate=False))
    batches = len(captured.inputs)
    picks = captured.masks.picks
    largest = max(_block_bytes(block, sizes, found, picks, gradients=gradients) for block in blocks)
    borders = [set(block.outputs) for block in blocks[:-1]]
    border = batches * max((sum(map(_bytes, nodes)) for nodes in borders), default=0)
    # All borders and the gradients at one; or, in the sweep, both flows of what lies between two of its segments.
    values = max(batches * sum(map(_bytes, set().union(*borders))) + border, 2 * _WIDER * border)
    tokens = batches * max(_rows(node) for node in linears)
    shapes = [linear.shape for linear in found.values()]
    numbers = sum(d_out * d_in for d_out, d_in in shapes)
    widest = max(max(shape) for shape in shapes)
    element = next(iter(sizes.values())).element_size()
    kept = int(numbers * config.density * element)
    together = groups(captured.graph.graph, linears)
    shares = _shares_of_tokens(linears, picks)  # of experts a small part
    computed = sum(shares[node] * math.prod(linear.shape) for node, linear in found.items())
    squares = sum(shares[group.members[0]] * found[group.members[0]].shape[1] ** 2 for group in together)
    projections = {linear.projection: linear.shape for linear in found.values() if linear.projection is not None}
    kept += sum(4 * (d_out**2 + d_in**2) for d_out, d_in in projections.values())
    passes = 2.0
    if gradients:
        own = [linear for linear in found.values() if linear.projection is None or not linear.projection.is_residual]
        kept += sum(4 * linear.shape[0] ** 2 for linear in own) + 2 * border
        passes = 7.0
        squares += sum(shares[node] * linear.shape[0] ** 2 for node, linear in found.items())
    if config.refine:
        ends = [segment.block for segment in plan(captured.graph.graph, linears, blocks=True, picks=picks.keys())]
        trained = [_trained_bytes(block, sizes, found, picks) for block in ends if block is not None]
        largest, passes = max(largest, *trained, 0), passes + passes_of(config.refine)
    return Needs(
        process=resident_bytes(),
        block=largest,
        solve=_SOLVE_COPIES * 8 * widest**2,
        written=_WRITTEN_COPIES
        * element
        * max((len(of.together) * of.experts * math.prod(shape) for of, shape in projections.items()), default=0),
        values=values,
        kept=kept,
        share=numbers / max(sum(parameter.numel() for parameter in captured.graph.parameters()), 1),
        products=2.0 * tokens * (passes * computed + 2 * squares),
        solving=2.0 * _SOLVE_PRODUCTS * sum(float(min(shape)) ** 2 * max(shape) for shape in shapes),
    )


def fit_blocks(
    captured: Captured, found: Mapping[Node, FoundLinear], config: CompressConfig, memory: int
) -> tuple[Needs, Captured]:
    """What is needed with the largest blocks that fit into `memory`, or the smallest, and the graph so cut.

    Args:
        captured, found, config: as in `needs_of`.
        memory: bytes.
    """
    for share in SHARES:
        captured = replace(captured, block_bytes=max(memory // share, 1))
        needs = needs_of(captured, found, config)
        if needs.least <= memory:
            break
    return needs, captured


def _block_bytes(
    block: Block,
    sizes: Mapping[str, Tensor],
    found: Mapping[Node, FoundLinear],
    picks: Mapping[Node, Pick],
    *,
    gradients: bool,
) -> int:
    read = weights_of(block.nodes) & sizes.keys()
    weights = sum(sizes[name].numel() * sizes[name].element_size() for name in read)
    made = _made_bytes(block, picks) * (2 if gradients else 1)
    own = [node for node in block.nodes if node in found]
    widths = {node.all_input_nodes[0]: found[node].shape[1] for node in own}
    sums = sum(_OF_SUMS * width**2 for width in widths.values())
    if gradients:
        sums += sum(_OF_SUMS * found[node].shape[0] ** 2 for node in own)
    return weights + made + sums


def _made_bytes(block: Block, picks: Mapping[Node, Pick]) -> int:
    """What a block makes of one batch; of experts the most that tokens can make, each of which goes to a few."""
    made = sum(_bytes(node) for node in block.nodes if node not in picks)
    of_experts: dict[Node, dict[Node, int]] = {}
    for node in block.nodes:
        if node in picks:
            pick = picks[node]
            rows = of_experts.setdefault(pick.source, {})
            rows[pick.tokens] = rows.get(pick.tokens, 0) + _bytes(node)  # of one token
    for source, rows in of_experts.items():
        chosen = min(choices(next(iter(rows))) or len(rows), len(rows))
        made += chosen * _count(source.meta["val"].shape[:-1]) * max(rows.values())
    return made


def _shares_of_tokens(linears: Iterable[Node], picks: Mapping[Node, Pick]) -> dict[Node, float]:
    """Which part of the tokens reaches each linear: of experts, one alike."""
    experts: dict[Node, set[Node]] = {}
    for pick in picks.values():
        experts.setdefault(pick.source, set()).add(pick.tokens)
    shares = {}
    for node in linears:
        shares[node] = 1.0
        if node in picks:
            count = len(experts[picks[node].source])
            shares[node] = min((choices(picks[node].tokens) or count) / count, 1.0)
    return shares


def _trained_bytes(
    block: ResidualBlock, sizes: Mapping[str, Tensor], found: Mapping[Node, FoundLinear], picks: Mapping[Node, Pick]
) -> int:
    """Of a residual block while it is refined: what `_block_bytes` counts of a block, and what is trained."""
    made = _block_bytes(Block(block.nodes, (), {}), sizes, found, picks, gradients=True)
    return made + _OF_TRAINED * sum(d_out * d_in for d_out, d_in in (found[node].shape for node in block.linears))


def _rows(node: Node) -> int:
    value = node.all_input_nodes[0].meta.get("val")
    return _count(value.shape[:-1]) if isinstance(value, Tensor) else 1


def _bytes(node: Node) -> int:
    leaves: Iterable[object] = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return sum(_count(leaf.shape) * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _count(sizes: Iterable[int | torch.SymInt]) -> int:
    """A number of elements; sizes that vary are those of the batch that was captured."""
    number = 1
    for size in sizes:
        if not isinstance(size, torch.SymInt):
            number *= size
        elif size.node.has_hint():
            number *= int(size.node.hint)
    return number


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a product of two matrices, the best of a few."""
    x = torch.ones(768, 768, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        y = x @ x
        float(y[0, 0])  # waits for it
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best

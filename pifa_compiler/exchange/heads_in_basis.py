"""`put_heads_in_basis`: linears that make heads of attention become `BasisLinear` layers.

The modules' side of `passes.BasisAttention`: eager and saved models are smaller too. The captured graph shows that one
call may have the change; `AttentionEnclosure` reads in the code that any other may.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..basis_linear import BasisLinear
from ..errors import RankError
from ..factors import FactorQuality
from ..graph.capture import Captured
from ..graph.linears import uses_of_weights, weight_name
from ..graph.run import Values, cut_into_blocks, run_block
from ..head_basis import HeadBasis, change_columns, change_rows, find_bases, in_basis
from ..linear import PifaLinear
from ..modules import bias_of, is_plain_linear, module_at, weight_of
from ..passes import Skip
from ..passes.attention_heads import Heads, find_heads
from ..passes.basis_attention import Layout, layout_of
from ..report import LayerReport
from .absorb import copy_of
from .allowed import Exchangeable, caller_of_layer
from .attention_code import AttentionEnclosure


@dataclass
class HeadsInBasis:
    """What was done.

    Attributes:
        made: entries of the layers whose heads are in a basis, by name.
        notes: for other layers near attention, what they take up, or why they stay as they are.
    """

    made: dict[str, LayerReport] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, name: str, what: str, reason: Skip) -> None:
        """Notes why heads of a layer stay as they are."""
        self.notes.setdefault(name, []).append(f"{what} not in a basis of inputs: {reason.reason}")


def put_heads_in_basis(
    model: nn.Module, captured: Captured, exchangeable: Exchangeable, layers: dict[str, nn.Module]
) -> HeadsInBasis:
    """Puts the heads of every attention of a model into a basis of inputs, where that is safe and loses no precision.

    The model is not touched: new layers are made, to be exchanged for those it has.

    Args:
        model, captured: the model, and the same captured, for a call that shows how large its values are.
        exchangeable: of the model.
        layers: layers to be put into the model, by name; those made here are added, and count instead of the model's.
    """
    enclosure, uses, result = AttentionEnclosure(model), uses_of_weights(captured.graph), HeadsInBasis()
    heads, layouts = find_heads(captured.graph), dict[Node, Layout]()
    for node, found in heads.items():
        layout = _layout(model, node, found, exchangeable, layers, enclosure, uses)
        if isinstance(layout, Skip):
            result.leave(_layer_name(node), "heads", layout)
        else:
            layouts[node] = layout
    sizes = _input_sizes(captured, layouts)
    for node, layout in layouts.items():
        name, found = _layer_name(node), heads[node]
        weight = weight_of(layers.get(name) or model.get_submodule(name))
        try:
            bases = find_bases(layout.rows_of(weight), sizes[node])
        except RankError as error:
            result.leave(name, "heads", Skip(str(error)))
            continue
        result.made[name] = _exchange(model, name, layout, bases, layers)
        for role, reason in found.left.items():
            result.leave(name, role, reason)
        readers = {_layer_name(reader.node) for head in layout.heads for reader in head.readers} - {name}
        for reader in sorted(readers):
            result.notes.setdefault(reader, []).append(f"has taken up the change of basis of {name}")
    return result


def _input_sizes(captured: Captured, linears: Collection[Node]) -> dict[Node, Tensor]:
    """Root mean squares of the inputs of linears, [in], in the first call that the model was captured for."""
    given = dict(zip(captured.graph.graph.find_nodes(op="placeholder"), captured.inputs[0], strict=True))
    inputs = {node for linear in linears if isinstance(node := linear.args[0], Node)}
    sizes: dict[Node, Tensor] = {}

    def see(node: Node, values: Values) -> None:
        if node in inputs:
            sizes[node] = values[node].detach().double().flatten(0, -2).square().mean(0).sqrt()

    for node in given:
        see(node, given)
    with torch.no_grad():
        while left := [node for node in captured.graph.graph.nodes if node in inputs and node not in sizes]:
            values: Values = given  # the last of most models needs all others
            for block in cut_into_blocks(captured.graph, left[-1], 1):
                values = run_block(captured.weights, block, values, see)
    return {linear: sizes[node] for linear in linears if isinstance(node := linear.args[0], Node)}


def _layer_name(node: Node) -> str:
    return weight_name(node).rpartition(".")[0]


def _layout(
    model: nn.Module,
    node: Node,
    found: Heads,
    exchangeable: Exchangeable,
    layers: Mapping[str, nn.Module],
    enclosure: AttentionEnclosure,
    uses: Mapping[str, int],
) -> Layout | Skip:
    name = _layer_name(node)
    layer = layers.get(name) or module_at(model, name)
    if isinstance(layer, PifaLinear):
        return Skip("the layer is in PIFA form")
    reason = None if name in layers else exchangeable.why_not(name)
    if reason is not None or layer is None or not is_plain_linear(layer):
        return Skip(reason or "it is no linear layer")
    d_out, d_in = weight_of(layer).shape
    layout = layout_of(found, d_out, d_in)
    if isinstance(layout, Skip):
        return layout
    reads = [reader for head in layout.heads for reader in head.readers]
    nodes = {reader.node: reader.kind for reader in reads} | {node: "rows"}
    for other in nodes:
        reader_name = _layer_name(other)
        reader = layers.get(reader_name) or module_at(model, reader_name)
        reason = None if reader_name in layers else exchangeable.why_not(reader_name)
        if uses[weight_name(other)] > 1:
            reason = f"{weight_name(other)} is used {uses[weight_name(other)]} times"
        elif isinstance(reader, PifaLinear) and nodes[other] == "rows":
            reason = f"{reader_name}, which makes the queries, is in PIFA form"
        elif reader is None or not (isinstance(reader, PifaLinear) or is_plain_linear(reader)):
            reason = reason or f"{reader_name} is no linear layer"
        if reason is not None:
            return Skip(reason)
    makers = [_layer_name(other) for other, kind in nodes.items() if kind == "rows"]
    readers = [_layer_name(other) for other, kind in nodes.items() if kind == "columns"]
    called_by = {caller_of_layer(other, _layer_name(other)) for other in nodes}
    reason = enclosure.why_heads_open(sorted(makers), sorted(readers), called_by)
    return layout if reason is None else Skip(reason)


def _exchange(
    model: nn.Module, name: str, layout: Layout, bases: Sequence[HeadBasis], layers: dict[str, nn.Module]
) -> LayerReport:
    """Makes the layer in a basis and those that take up the change, and says what was done."""
    changes = torch.cat([basis.change for basis in bases])
    for head, change in zip(layout.heads, changes, strict=True):
        for reader in head.readers:
            changed = _layer_name(reader.node)
            layer = layers.get(changed) or model.get_submodule(changed)
            if changed not in layers:
                layers[changed] = layer = copy_of(layer)
            exact, bias = _exact(layer)
            if reader.kind == "columns":
                change_columns(exact, reader.places, change)
            else:
                change_rows(exact, bias, reader.places, change)
            _store(layer, exact, bias)
    dense = layers.get(name) or model.get_submodule(name)
    weight, (exact, bias) = weight_of(dense), _exact(dense)
    new = _layer_of(dense, layout, *in_basis(exact, bias, layout.plain, bases))
    layers[name] = new
    rows = torch.cat([basis.rest for basis in bases])
    lost = changes @ (new.w_rest.detach().double().view_as(rows) - rows)
    quality = FactorQuality(
        max(basis.largest for basis in bases),
        max(basis.condition for basis in bases),
        float(lost.norm() / layout.rows_of(weight).double().norm()),
    )
    stored = sum(part.numel() for part in (new.w_rest, new.w_plain, new.order) if part is not None)
    shape = (weight.shape[0], weight.shape[1])
    note = f"{new.heads} heads of {new.head_features} in {new.groups} {'basis' if new.groups == 1 else 'bases'}"
    return LayerReport(name, shape, None, None, True, weight.numel(), stored, None, quality, (note,), new.heads)


def _exact(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Copies in float64 of a layer's weight, or of the pivot rows of one in PIFA form, and of its bias."""
    weight = layer.w_pivot.detach() if isinstance(layer, PifaLinear) else weight_of(layer)
    bias = bias_of(layer)
    return weight.double().clone(), None if bias is None else bias.detach().double().clone()


def _store(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a layer of its own other values, in the dtypes and the layout that it has."""
    key = "w_pivot" if isinstance(layer, PifaLinear) else "weight"
    kept = layer._parameters[key]
    assert kept is not None  # noqa: S101  it was read
    stored = weight if weight.shape == kept.shape and type(layer).__name__ != "Conv1D" else weight.T.contiguous()
    layer._parameters[key] = nn.Parameter(stored.to(kept.dtype), kept.requires_grad)
    held = layer._parameters.get("bias")
    if held is not None and bias is not None:
        layer._parameters["bias"] = nn.Parameter(bias.to(held.dtype), held.requires_grad)


def _layer_of(
    dense: nn.Module, layout: Layout, plain: Tensor, rest: Tensor, order: Tensor, bias: Tensor | None
) -> BasisLinear:
    weight, held = weight_of(dense), bias_of(dense)
    d_out, d_in = weight.shape
    heads, kept = len(layout.heads), dense._parameters["weight"]
    width, trains = len(layout.heads[0].rows), kept is not None and kept.requires_grad
    layer = BasisLinear(d_in, d_out, width, heads, len(order), bias is not None, "meta", weight.dtype)
    layer.w_rest = nn.Parameter(rest.to(weight.dtype), trains)
    layer.w_plain = nn.Parameter(plain.to(weight.dtype).contiguous(), trains) if len(plain) else None
    if bias is not None and held is not None:
        layer.bias = nn.Parameter(bias.to(held.dtype), held.requires_grad)
    layer.order = order
    return layer.train(dense.training)

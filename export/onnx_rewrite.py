"""`rewrite_onnx`: low-rank pairs of any ONNX file become PIFA layers, without loss.

    MatMul(MatMul(x, V), U)   Gemm(Gemm(x, V), U, c)   and mixtures of both   ->   PifaLinear(x, w_pivot, coeff, order)

V is [in, r] and U [r, out], constants of the file, Gemm's transposes included. A bias behind the pair, as an Add or as
Gemm's own, stays an Add. A V that feeds several U (q, k, v of one attention) becomes one PIFA layer and a Split.
"""

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ExportError, RankError
from ..factors import PifaFactors, factorize_losslessly, stored_numbers
from ..files import atomic_files, expand_home
from . import onnx_ops
from .onnx_file import check_model, check_target, data_file, read_model

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_OPSET, OLDEST_IR_VERSION = 14, 8
"""Of the standard operators, whose Reshape has `allowzero` from there on, and of the file, for functions."""

_DTYPES = ("FLOAT", "FLOAT16", "DOUBLE")


@dataclass(frozen=True)
class PairRecord:
    """One pair of products, one feeding the other.

    Attributes:
        node: name of the second product, or of its result.
        shape: (out, in) of the weight.
        width: between the two.
        rank: of its PIFA form; None if it was left as it was.
        skipped: why it was; None if it is in PIFA form.
    """

    node: str
    shape: tuple[int, int]
    width: int
    rank: int | None
    skipped: str | None


@dataclass(frozen=True)
class OnnxRewrite:
    """What `rewrite_onnx` wrote.

    Attributes:
        path: the file.
        pairs: one record for every pair of constant products that was found.
        stored_before, stored_after: numbers stored for the rewritten pairs, row orders included, a shared V once.
        seconds: wall time.
    """

    path: str
    pairs: list[PairRecord]
    stored_before: int
    stored_after: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def rewrite_onnx(
    path_in: str | os.PathLike[str], path_out: str | os.PathLike[str], *, overwrite: bool = False
) -> OnnxRewrite:
    """Writes an ONNX file anew with its low-rank pairs in PIFA form; everything else stays as it is.

    Args:
        path_in: any ONNX file; its external data has to lie in its own folder.
        path_out: the file to write, named *.onnx. Weights are external if those of `path_in` are.
        overwrite: whether a file at `path_out` may be replaced; `path_in` itself never is.

    Raises:
        ExportError: a path is refused, the file is damaged or too old, or there is nothing to rewrite: then nothing is
            written, and the text says what was looked at.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    started = time.perf_counter()
    source = expand_home(path_in, ExportError)
    final = check_target(path_out, overwrite=overwrite)
    if source.resolve() == final:
        raise ExportError(f"{path_in} cannot be rewritten in its own place; give another output file")
    read_model(source)  # refuses what is not to be trusted, external data above all
    check_model(source)
    try:
        model = ir.load(source)
    except ir.serde.SerdeError as error:
        raise ExportError(f"{path_in} cannot be read: {error}; copy it again") from error
    external = any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())
    version = model.opset_imports.get("", 0)
    if version < OLDEST_OPSET:
        raise ExportError(
            f"{path_in} has opset {version}, too old; convert it to {OLDEST_OPSET} or newer (onnx.version_converter)"
        )
    if any(name == onnx_ops.LINEAR for domain, name, _ in model.functions if domain == onnx_ops.DOMAIN):
        raise ExportError(f"{path_in} holds PIFA layers already: nothing to rewrite, nothing written")
    records, before, after = _rewrite_pairs(model)
    done = [record for record in records if record.skipped is None]
    if not done:
        raise ExportError(f"{path_in} has nothing to rewrite, nothing written: {_why(records)}")
    RemoveUnusedNodesPass()(model)  # the products that were replaced, and their weights
    model.ir_version = max(model.ir_version or 0, OLDEST_IR_VERSION)
    onnx_ops.attach_functions(model)
    with atomic_files(final, data_file(final), ExportError, overwrite=overwrite) as partial:
        try:
            ir.save(model, partial, external_data=data_file(partial).name if external else None)
        except ir.serde.SerdeError as error:  # a name, say, that is no text
            raise ExportError(f"{path_in} cannot be written anew: {error}; copy it again") from error
        check_model(partial)
    return OnnxRewrite(str(final), records, before, after, time.perf_counter() - started)


def _why(records: list[PairRecord]) -> str:
    if not records:
        return "no product of constants feeds another one"
    return "; ".join(dict.fromkeys(f"{record.skipped} ({record.node})" for record in records[:3]))


@dataclass(frozen=True)
class _Product:
    """A node that computes x W + c for a constant W."""

    node: "ir.Node"
    weight: "ir.Value"
    transposed: bool
    bias: "ir.Value | None"

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of W, from what the file says of it: no data is read."""
        rows, columns = self.weight.const_value.shape.numpy()  # type: ignore[union-attr]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> str:
        """ONNX's name for the dtype of W; no data is read."""
        return str(self.weight.const_value.dtype.name)  # type: ignore[union-attr]

    def matrix(self) -> Tensor:
        """W [in, out], read and copied."""
        tensor = torch.from_numpy(self.weight.const_value.numpy().copy())  # type: ignore[union-attr]
        return tensor.T if self.transposed else tensor


def _product(node: "ir.Node | None") -> _Product | None:
    """The node as a product with a constant matrix, if it is one."""
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    found = _matrix(node.inputs[1])
    if found is None:
        return None
    weight, transposed = found
    if node.op_type == "MatMul":
        return _Product(node, weight, transposed, None)
    numbers = {name: node.attributes[name].value for name in node.attributes}
    plain = numbers.get("alpha", 1.0) == 1.0 and numbers.get("beta", 1.0) == 1.0 and not numbers.get("transA", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Product(node, weight, transposed != bool(numbers.get("transB", 0)), bias) if plain else None


def _matrix(value: "ir.Value | None") -> "tuple[ir.Value, bool] | None":
    """The constant matrix that a value is, and whether it is read through a Transpose, as PyTorch exports linears."""
    node = None if value is None else value.producer()
    if node is not None and node.domain == "" and node.op_type == "Transpose":
        found = _matrix(node.inputs[0])
        return None if found is None else (found[0], not found[1])
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return (value, False) if len(value.const_value.shape) == 2 else None


def _rewrite_pairs(model: "ir.Model") -> tuple[list[PairRecord], int, int]:
    records: list[PairRecord] = []
    before = after = 0
    for node in list(model.graph.all_nodes()):
        if node.graph is None or (inner := _product(node)) is None:
            continue
        middle = node.outputs[0]
        users = [user for user, place in middle.uses() if place == 0]
        outers = [outer for user in users if (outer := _product(user)) is not None]
        if not outers:
            continue
        found = _judge(inner, outers)
        rank, reason = (None, found) if isinstance(found, str) else (found.rank, None)
        records += [_record(inner, outer, rank, reason) for outer in outers]
        if not isinstance(found, str):
            d_in, width = inner.shape
            before += width * (d_in + found.shape[0])
            after += stored_numbers(*found.shape, found.rank)
            _replace(model, inner, outers, found)
    return records, before, after


def _record(inner: _Product, outer: _Product, rank: int | None, reason: str | None) -> PairRecord:
    name = outer.node.name or str(outer.node.outputs[0].name)
    d_in, width = inner.shape
    return PairRecord(name, (outer.shape[1], d_in), width, rank, reason)


def _judge(inner: _Product, outers: list[_Product]) -> PifaFactors | str:
    """The weight that the products have together, all outputs of a shared V below each other; or why it stays.

    Weights are read last, and only those of a pair that nothing else speaks against.
    """
    middle = inner.node.outputs[0]
    if inner.bias is not None:
        return "there is a bias between the two products"
    if middle.is_graph_output():
        return "the value between the two products is an output of the graph"
    if len(middle.uses()) > len(outers):
        return "the value between the two products has another user"
    if any(outer.bias is not None and outer.bias.producer() is not None for outer in outers):
        return "its bias is computed in the graph"
    if any(outer.node.graph is not inner.node.graph for outer in outers):
        return "the two products lie in different graphs"
    if len(dtypes := {product.dtype for product in (inner, *outers)}) > 1 or inner.dtype not in _DTYPES:
        return f"weights of {', '.join(sorted(dtypes))} are not of one floating dtype that is known"
    (d_in, width), d_out = inner.shape, sum(outer.shape[1] for outer in outers)
    if any(outer.shape[0] != width for outer in outers):
        return "the two products do not fit together"
    if width >= min(d_out, d_in):
        return f"the pair is not low-rank: width {width} between {d_in} inputs and {d_out} outputs"
    try:
        factors = factorize_losslessly((torch.cat([outer.matrix().T for outer in outers]), inner.matrix().T))
    except RankError as error:
        return str(error)
    pair, pifa = width * (d_out + d_in), stored_numbers(d_out, d_in, factors.rank)
    return factors if pifa < pair else f"PIFA would store {pifa} numbers at rank {factors.rank}, the pair stores {pair}"


def _replace(model: "ir.Model", inner: _Product, outers: list[_Product], factors: PifaFactors) -> None:
    """Puts a PIFA node in the place of the products, behind it a Split for several outer ones, and Adds of biases."""
    import onnx_ir as ir

    stem = str(outers[0].weight.name)
    parts = {
        "w_pivot": factors.w_pivot.T.contiguous(),
        "coeff": factors.coeff.T.contiguous(),
        "order": factors.order(),
    }
    weights = [_constant(model, f"{stem}.{part}", tensor) for part, tensor in parts.items()]
    old = [outer.node.outputs[0] for outer in outers]
    layer = ir.Node(onnx_ops.DOMAIN, onnx_ops.LINEAR, [inner.node.inputs[0], *weights], name=f"{old[0].name}.pifa")
    layer.outputs[0].name = f"{old[0].name}.pifa"
    nodes, values = [layer], list(layer.outputs)
    if len(outers) > 1:
        sizes = _constant(model, f"{stem}.sizes", torch.tensor([outer.shape[1] for outer in outers]))
        attributes = [ir.AttrInt64("axis", -1)]
        nodes.append(ir.Node("", "Split", [layer.outputs[0], sizes], attributes, num_outputs=len(outers)))
        values = list(nodes[-1].outputs)
    for i, outer in enumerate(outers):
        values[i].name = f"{old[i].name}.pifa"
        if outer.bias is not None:
            nodes.append(ir.Node("", "Add", [values[i], outer.bias]))
            values[i] = nodes[-1].outputs[0]
    replaced = [outer.node for outer in outers]
    if inner.node.graph is None:
        raise ValueError(f"{inner.node.name} belongs to no graph")
    ir.convenience.replace_nodes_and_values(inner.node.graph, inner.node, replaced, nodes, old, values)


def _constant(model: "ir.Model", name: str, tensor: Tensor) -> "ir.Value":
    """A new initializer; its name grows if it is taken."""
    import onnx_ir as ir

    while name in model.graph.initializers:
        name += "_"
    stored = ir.tensor(tensor.numpy(), name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(stored.dtype), const_value=stored)
    model.graph.register_initializer(value)
    return value

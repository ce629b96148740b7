"""`rewrite_onnx`: low-rank pairs of any ONNX file become PIFA layers, without loss.

    MatMul(MatMul(x, V), U)   Gemm(Gemm(x, V), U, c)   and mixtures of both   ->   PifaLinear(x, w_pivot, coeff, order)

V is [in, r] and U [r, out], constants of the file, Gemm's transposes included. A bias behind the pair, as an Add or as
Gemm's own, stays an Add. One V may feed several U; each pair is judged alone, as U decides the pivots.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ExportError, RankError
from ..factors import PifaFactors, factorize, stored_numbers
from . import onnx_ops
from .onnx_file import atomic_files, check_model, check_target, data_file, read_model

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST_OPSET = 13
"""Of the standard operators; runtimes know functions from there on."""

_DTYPES = (torch.float32, torch.float16, torch.float64)


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

    started = time.perf_counter()
    source = Path(path_in).expanduser()
    final = check_target(path_out, overwrite=overwrite)
    if source.resolve() == final:
        raise ExportError(f"{path_in} cannot be rewritten in its own place; give another output file")
    proto = read_model(source)
    model = ir.serde.deserialize_model(proto)
    external = _bind_external(model, source.resolve().parent)
    version = model.opset_imports.get("", 0)
    if version < OLDEST_OPSET:
        raise ExportError(
            f"{path_in} has opset {version}; convert it to {OLDEST_OPSET} or newer (onnx.version_converter)"
        )
    if any(name == onnx_ops.LINEAR for domain, name, _ in model.functions if domain == onnx_ops.DOMAIN):
        raise ExportError(f"{path_in} holds PIFA layers already: nothing to rewrite, nothing written")
    records, before, after = _rewrite_pairs(model)
    done = [record for record in records if record.skipped is None]
    if not done:
        raise ExportError(f"{path_in} has nothing to rewrite, nothing written: {_why(records)}")
    onnx_ops.attach_functions(model)
    with atomic_files(final) as partial:
        ir.save(model, partial, external_data=data_file(partial).name if external else None)
        check_model(partial)
    return OnnxRewrite(str(final), records, before, after, time.perf_counter() - started)


def _why(records: list[PairRecord]) -> str:
    if not records:
        return "no product of constants feeds another one"
    return "; ".join(dict.fromkeys(f"{record.skipped} ({record.node})" for record in records[:3]))


def _bind_external(model: "ir.Model", folder: Path) -> bool:
    """Tells external tensors where their folder is; says whether there are any."""
    import onnx_ir as ir

    tensors = [
        value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    for tensor in tensors:
        tensor.base_dir = folder
    return bool(tensors)


@dataclass(frozen=True)
class _Product:
    """A node that computes x W + c for a constant W."""

    node: "ir.Node"
    weight: "ir.Value"
    transposed: bool
    bias: "ir.Value | None"

    def matrix(self) -> Tensor:
        """W [in, out]."""
        tensor = torch.from_numpy(self.weight.const_value.numpy().copy())  # type: ignore[union-attr]
        return tensor.T if self.transposed else tensor


def _product(node: "ir.Node | None") -> _Product | None:
    """The node as a product with a constant matrix, if it is one."""
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None or weight.is_graph_input():
        return None
    if len(weight.const_value.shape) != 2:
        return None
    if node.op_type == "MatMul":
        return _Product(node, weight, False, None)
    numbers = {name: node.attributes[name].value for name in node.attributes}
    plain = numbers.get("alpha", 1.0) == 1.0 and numbers.get("beta", 1.0) == 1.0 and not numbers.get("transA", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _Product(node, weight, bool(numbers.get("transB", 0)), bias) if plain else None


def _rewrite_pairs(model: "ir.Model") -> tuple[list[PairRecord], int, int]:
    records: list[PairRecord] = []
    before, after = {}, 0
    for node in list(model.graph.all_nodes()):
        outer = _product(node)
        inner = _product(node.inputs[0].producer()) if outer is not None and node.inputs[0] is not None else None
        if outer is None or inner is None:
            continue
        record, factors = _judge(inner, outer)
        records.append(record)
        if factors is None:
            continue
        _replace(model, inner, outer, factors)
        after += stored_numbers(*factors.shape, factors.rank)
        before[inner.weight] = inner.matrix().numel()
        before[outer.weight] = outer.matrix().numel()
    return records, sum(before.values()), after


def _judge(inner: _Product, outer: _Product) -> tuple[PairRecord, PifaFactors | None]:
    """What becomes of a pair; the factors if it is rewritten."""
    v, u = inner.matrix().T, outer.matrix().T  # [r, in], [out, r]
    name = outer.node.name or str(outer.node.outputs[0].name)
    shape, width = (u.shape[0], v.shape[1]), v.shape[0]

    def left(reason: str) -> tuple[PairRecord, None]:
        return PairRecord(name, shape, width, None, reason), None

    middle = inner.node.outputs[0]
    if inner.bias is not None:
        return left("there is a bias between the two products")
    if middle.is_graph_output():
        return left("the value between the two products is an output of the graph")
    users = [user for user, _ in middle.uses()]
    if any((other := _product(user)) is None or user.inputs[0] is not middle for user in users):
        return left("the value between the two products has another user")
    if len(users) > 1:
        shared = _shared_cost(v, users)
        if shared is not None:
            return left(shared)
    if v.dtype is not u.dtype or v.dtype not in _DTYPES:
        return left(f"weights of {v.dtype} and {u.dtype} are not of one floating dtype that is known")
    if width >= min(shape):
        return left(f"the pair is not low-rank: width {width} between {shape[1]} inputs and {shape[0]} outputs")
    try:
        factors = factorize((u, v))
    except RankError as error:
        return left(str(error))
    pair, pifa = width * sum(shape), stored_numbers(*shape, factors.rank)
    if pifa >= pair and len(users) == 1:
        return left(f"PIFA would store {pifa} numbers at rank {factors.rank}, the pair stores {pair}")
    return PairRecord(name, shape, width, factors.rank, None), factors


def _shared_cost(v: Tensor, users: "list[ir.Node]") -> str | None:
    """Why a V that several U read stays shared; None if a PIFA form for each of them stores less.

    The pivot rows of each pair hold V's part, so V is stored once for each of them.
    """
    width, d_in = v.shape
    outs = [int(product.matrix().shape[1]) for user in users if (product := _product(user)) is not None]
    shared = width * (d_in + sum(outs))
    apart = sum(stored_numbers(d_out, d_in, min(width, d_out, d_in)) for d_out in outs)
    return None if apart < shared else f"a shared first product stores {shared} numbers, PIFA for each would {apart}"


def _replace(model: "ir.Model", inner: _Product, outer: _Product, factors: PifaFactors) -> None:
    """Puts a PIFA node, and an Add if there is a bias, in the place of the outer product."""
    import onnx_ir as ir

    old, stem = outer.node.outputs[0], outer.weight.name
    parts = {
        "w_pivot": factors.w_pivot.T.contiguous(),
        "coeff": factors.coeff.T.contiguous(),
        "order": factors.order(),
    }
    values = []
    for part, tensor in parts.items():
        name = f"{stem}.{part}"
        taken = set(model.graph.initializers)
        while name in taken:
            name += "_"
        value = ir.Value(name=name, const_value=ir.tensor(tensor.numpy(), name=name))
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
        model.graph.register_initializer(value)
        values.append(value)
    new = [ir.Node(onnx_ops.DOMAIN, onnx_ops.LINEAR, [inner.node.inputs[0], *values], name=f"{old.name}.pifa")]
    if outer.bias is not None:
        new.append(ir.Node("", "Add", [new[0].outputs[0], outer.bias]))
        new[0].outputs[0].name = f"{old.name}.before_bias"
    graph = outer.node.graph
    ir.convenience.replace_nodes_and_values(graph, outer.node, [outer.node], new, [old], [new[-1].outputs[0]])
    for product in (inner, outer):
        _drop(model, product)


def _drop(model: "ir.Model", product: _Product) -> None:
    """Removes an unused product and its unused weight."""
    node = product.node
    if node.graph is not None and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        node.graph.remove(node, safe=True)
    if not product.weight.uses() and not product.weight.is_graph_output():
        model.graph.initializers.pop(str(product.weight.name), None)

"""The operators of the domain `ai.pifa`, as ONNX functions that any runtime can run.

    PifaLinear(x, w_pivot, coeff, order)      y_p = x w_pivot; y = PifaScatter(y_p, y_p coeff, order)
    PifaScatter(y_p, y_n, order)              Concat(y_p, y_n)[..., order], gathered as rows of the transposed matrix
    PifaLinearInOrder(x, w_pivot, coeff)      y_p = x w_pivot; y = Concat(y_p, y_p coeff)

The last one is for layers whose row order the next layer absorbed: nothing is gathered there. Weights are stored as
(in, r) and (r, out - r), as a MatMul reads them: onnxruntime would keep a second, transposed copy of anything else.
A bias is an Add behind the node. In a runtime that has a native operator of the same name, that one runs instead.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

DOMAIN = "ai.pifa"
VERSION = 1
LINEAR, LINEAR_IN_ORDER, SCATTER = "PifaLinear", "PifaLinearInOrder", "PifaScatter"

# What is called comes before what calls it: onnx.reference reads functions in their order.
_SIGNATURES = {
    SCATTER: (("y_p", "y_n", "order"), ("y",)),
    LINEAR: (("x", "w_pivot", "coeff", "order"), ("y",)),
    LINEAR_IN_ORDER: (("x", "w_pivot", "coeff"), ("y",)),
}


def register_schemas() -> None:
    """Registers the operators with the onnx package, as PyTorch's exporter demands of every operator that it emits."""
    from onnx import defs

    floats = ["tensor(float)", "tensor(float16)", "tensor(double)"]
    for name, (inputs, outputs) in _SIGNATURES.items():
        if defs.has(name, DOMAIN):
            continue
        kinds = {value: "I" if value == "order" else "T" for value in (*inputs, *outputs)}
        defs.register_schema(
            defs.OpSchema(
                name,
                DOMAIN,
                VERSION,
                inputs=[defs.OpSchema.FormalParameter(value, kinds[value]) for value in inputs],
                outputs=[defs.OpSchema.FormalParameter(value, kinds[value]) for value in outputs],
                type_constraints=[("T", floats, "")] + ([("I", ["tensor(int64)"], "")] if "order" in inputs else []),
            )
        )


def functions(opset: int, names: set[str]) -> "list[onnx.FunctionProto]":
    """The bodies of the operators in `names`, with those that they call.

    Args:
        opset: of the standard operators; runtimes demand that it is the model's.
        names: some of `LINEAR`, `LINEAR_IN_ORDER` and `SCATTER`.
    """
    from onnx import helper

    products = [
        helper.make_node("MatMul", ["x", "w_pivot"], ["y_p"]),
        helper.make_node("MatMul", ["y_p", "coeff"], ["y_n"]),
    ]
    # A Gather of columns copies one number at a time; transposed both ways, and of whole rows, it takes onnxruntime a
    # sixth of the time (2048 columns, 16 to 512 rows). With two dimensions only: others are not transposed fast.
    scatter = [
        helper.make_node("Concat", ["y_p", "y_n"], ["stored"], axis=-1),
        helper.make_node("Shape", ["stored"], ["shape"]),
        helper.make_node("Flatten", ["stored"], ["matrix"], axis=-1),
        helper.make_node("Transpose", ["matrix"], ["columns"]),
        helper.make_node("Gather", ["columns", "order"], ["ordered"], axis=0),
        helper.make_node("Transpose", ["ordered"], ["rows"]),
        helper.make_node("Reshape", ["rows", "shape"], ["y"], allowzero=1),
    ]
    bodies = {
        LINEAR: [*products, helper.make_node(SCATTER, ["y_p", "y_n", "order"], ["y"], domain=DOMAIN)],
        LINEAR_IN_ORDER: [*products, helper.make_node("Concat", ["y_p", "y_n"], ["y"], axis=-1)],
        SCATTER: scatter,
    }
    wanted = names | ({SCATTER} if LINEAR in names else set())
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return [
        helper.make_function(DOMAIN, name, *_SIGNATURES[name], bodies[name], imports)
        for name in _SIGNATURES
        if name in wanted
    ]


def attach_functions(model: "ir.Model") -> None:
    """Gives a model the functions that its nodes need, and the import of their domain."""
    import onnx_ir as ir

    names = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    if not names:
        return
    model.opset_imports[DOMAIN] = VERSION
    for proto in functions(model.opset_imports[""], names):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def translation() -> Callable[..., Any]:
    """What PyTorch's exporter calls for a `pifa::linear` node; weights keep their layout until `lay_out_weights`."""
    import onnx
    from onnxscript import opset18
    from onnxscript.values import Op, Opset

    register_schemas()
    domain = Opset(DOMAIN, VERSION)
    ordered, in_order = (Op(domain, name, onnx.defs.get_schema(name, DOMAIN)) for name in (LINEAR, LINEAR_IN_ORDER))

    def emit(x: Any, w_pivot: Any, coeff: Any, order: Any = None, bias: Any = None) -> Any:
        y = in_order(x, w_pivot, coeff) if order is None else ordered(x, w_pivot, coeff, order)
        return y if bias is None else opset18.Add(y, bias)

    return emit


def lay_out_weights(model: "ir.Model") -> int:
    """Transposes the weights of all PIFA nodes from PyTorch's layout to (in, r) and (r, out - r); counts the nodes.

    Values are transposed when they are written, one at a time.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN and node.op_type != SCATTER]
    transposed: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for place in (1, 2):
            weight = node.inputs[place]
            if weight is None:
                raise ValueError(f"{node.op_type} node {node.name} lacks input {place}")
            if weight not in transposed:
                transposed[weight] = _transposed(model, weight, node)
            node.replace_input_with(place, transposed[weight])
    for weight in transposed:
        if not weight.uses():
            model.graph.initializers.pop(str(weight.name), None)
    return len(nodes)


def _transposed(model: "ir.Model", weight: "ir.Value", before: "ir.Node") -> "ir.Value":
    import onnx_ir as ir

    name = f"{weight.name}.t"
    stored = weight.const_value
    if stored is None or weight.name not in model.graph.initializers:
        node = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        node.outputs[0].name = name
        model.graph.insert_before(before, node)
        return node.outputs[0]
    shape = ir.Shape(tuple(reversed(stored.shape.numpy())))
    lazy = ir.LazyTensor(lambda: _transpose_tensor(stored), dtype=stored.dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(stored.dtype), const_value=lazy)
    model.graph.register_initializer(value)
    return value


def _transpose_tensor(stored: "ir.TensorProtocol") -> "ir.TensorProtocol":
    import onnx_ir as ir

    raw = getattr(stored, "raw", None)
    array = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else stored.numpy()
    return ir.tensor(array.T.copy())

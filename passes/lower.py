"""Lower: pifa::linear -> the form that is fastest on the device and at the shape at hand.

`FORMS` names a choice for every device type that has forms of its own. The plain subgraph, which is the operator's own
body, is what every compiler sees where no other form is chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.fx import GraphModule, Node

from ..kernels import linear as _registers_the_operator  # noqa: F401
from ..kernels import linear_gemm
from .rewrite import Rewrite, Skip
from .weights import SUBCLASS, is_subclass, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """What a form is chosen by.

    Attributes:
        device: type of the device, such as "cpu".
        dtype: of the weights.
        d_in, d_out, rank: the shape of the linear.
        tokens: rows of x, or of the example that was traced where they vary; None if unknown.
        other_dtypes: those of x, bias and result that are known and differ from `dtype`, as under autocast.
    """

    device: str
    dtype: torch.dtype
    d_in: int
    d_out: int
    rank: int
    tokens: int | None
    other_dtypes: frozenset[torch.dtype] = frozenset()


Build = Callable[[GraphModule, Node], Node]
"""Builds a form in the graph from the arguments of the `pifa::linear` node and returns its result."""

_MIXED = Skip("plain subgraph: inputs, bias or result are of another dtype than the weights, as under autocast")


def choose_on_cpu(case: Case) -> Build | Skip:
    """On a CPU the native code of `kernels.linear_cpu`, where it can be built. Its docstring says why it is there."""
    from ..kernels import linear_cpu

    if case.dtype not in linear_cpu.DTYPES:
        return Skip(f"plain subgraph: there is no native code for {case.dtype}")
    if case.other_dtypes:
        return _MIXED
    reason = linear_cpu.load()
    return build_cpu if reason is None else Skip(f"plain subgraph: {reason}")


def build_cpu(gm: GraphModule, node: Node) -> Node:
    """The operator `pifa::linear_cpu`, and the bias behind it."""
    *operands, bias = node.args
    result = gm.graph.call_function(torch.ops.pifa.linear_cpu.default, tuple(operands))
    return result if bias is None else gm.graph.call_function(aten.add.Tensor, (result, bias))


def choose_on_gpu(case: Case) -> Build | Skip:
    """On a GPU, NVIDIA's or AMD's, the decode kernel for one token, and two library GEMMs for more or unknown many.

    By what an H200 measured (`docs/speed.md`): for one token the kernel is ahead of cuBLAS's dense product or even with
    it; for more the GEMMs are as fast as the best tile of ours or faster. Where `torch._inductor.config.max_autotune`
    is set the kernels are taken for any number of tokens, and their tiles timed.
    """
    from torch._inductor import config

    if case.dtype not in linear_gemm.DTYPES:
        return Skip(f"plain subgraph: there is no form for {case.dtype} on GPUs")
    if case.other_dtypes:
        return _MIXED
    if case.tokens != 1 and not config.max_autotune:
        return build_gemm
    if find_spec("triton") is None:
        return Skip("plain subgraph: Triton is not installed; pip install pifa-compiler[gpu]")
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return Skip("plain subgraph: the Triton kernels need compute capability 8.0")
    return build_triton


def build_triton(gm: GraphModule, node: Node) -> Node:
    """The operator `pifa::linear_triton`, which takes the same arguments."""
    from ..kernels import linear_triton as _registers_the_form  # noqa: F401  imports triton, so only here

    return gm.graph.call_function(torch.ops.pifa.linear_triton.default, node.args)


def build_gemm(gm: GraphModule, node: Node) -> Node:
    """The operator `pifa::linear_gemm`; behind it the order and the bias, which Inductor fuses into what follows.

    A kernel that stored its columns in order took far longer than its products (`benchmarks/results/gpu.csv`).
    """
    *operands, order, bias = node.args
    result = gm.graph.call_function(torch.ops.pifa.linear_gemm.default, tuple(operands))
    # Named by the form: the name of the last one is what the record says.
    if order is not None:
        select, name = aten.index_select.default, "linear_gemm_order"
        result = gm.graph.create_node("call_function", select, (result, -1, order), name=name)
    if bias is not None:
        result = gm.graph.create_node("call_function", aten.add.Tensor, (result, bias), name="linear_gemm_bias")
    return result


FORMS: Mapping[str, Callable[[Case], Build | Skip]] = {"cpu": choose_on_cpu, "cuda": choose_on_gpu}
"""By type of device; to torch AMD's GPUs are "cuda" as well."""


class Lower(Rewrite):
    """pifa::linear -> the form that `forms` chooses; a `Skip` says why it stays the plain subgraph.

    Args:
        gradients: whether the graph will be differentiated; only the plain subgraph can be.
        forms: by type of device, what chooses.
    """

    targets = (torch.ops.pifa.linear.default,)

    def __init__(self, *, gradients: bool = False, forms: Mapping[str, Callable[[Case], Build | Skip]] = FORMS) -> None:
        self.gradients = gradients
        self.forms = forms

    def match(self, gm: GraphModule, node: Node) -> Build | Skip:
        """The form to build."""
        if self.gradients:
            return Skip("plain subgraph: gradients are needed")
        if any(is_subclass(gm, operand) for operand in node.all_input_nodes):
            return SUBCLASS
        case = _case(gm, node)
        if case is None:
            return Skip("plain subgraph: the shapes of the factors are unknown")
        if case.device not in self.forms:
            return Skip(f"plain subgraph: there is no other form for {case.device}")
        return self.forms[case.device](case)

    def rewrite(self, gm: GraphModule, node: Node, found: Build) -> Node:
        """Builds it."""
        return found(gm, node)


def _case(gm: GraphModule, node: Node) -> Case | None:
    x, w_pivot, coeff, _, bias = (value_of(gm, operand) for operand in node.args)
    result = value_of(gm, node)
    if w_pivot is None or coeff is None:
        return None
    (rank, d_in), d_out = w_pivot.shape, w_pivot.shape[0] + coeff.shape[0]
    numbers = None if result is None else _hint(result.numel())
    others = {value.dtype for value in (x, coeff, bias, result) if value is not None} - {w_pivot.dtype}
    tokens = None if numbers is None else numbers // d_out
    return Case(w_pivot.device.type, w_pivot.dtype, d_in, d_out, rank, tokens, frozenset(others))


def _hint(number: int | torch.SymInt) -> int | None:
    """The number, or the example's where it varies; None where it depends on values (`nonzero`) and has none."""
    if not isinstance(number, torch.SymInt):
        return number
    return int(number.node.hint) if number.node.has_hint() else None

"""Lower: pifa::linear, and so its relatives -> the form that is fastest on the device and at the shape at hand.

`FORMS` lists the forms of every device type that has any, `GROUPED_FORMS` and `BASIS_FORMS` those of
`pifa::grouped_linear` and `pifa::basis_linear`. The plain subgraph, the operator's own body, is what every compiler
sees where no form is taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from ..kernels import (
    basis_linear_cpu,
    basis_linear_triton,
    grouped_linear_cpu,
    grouped_linear_triton,
    linear_cpu,
    linear_gemm,
    linear_triton,
)
from ..kernels import linear as _registers_the_operator  # noqa: F401
from ..kernels.form import Case, Form
from .rewrite import Rewrite, Skip
from .weights import SUBCLASS, is_subclass, value_of

FORMS: Mapping[str, Sequence[Form]] = {
    "cpu": (linear_cpu.FORM,),
    "cuda": (linear_triton.FORM, linear_gemm.FORM),
}
"""By type of device; to torch AMD's GPUs are "cuda" as well. The first form that has nothing against it is taken."""

GROUPED_FORMS: Mapping[str, Sequence[Form]] = {
    "cpu": (grouped_linear_cpu.FORM,),
    "cuda": (grouped_linear_triton.FORM,),
}
"""The same of `pifa::grouped_linear`."""

BASIS_FORMS: Mapping[str, Sequence[Form]] = {"cpu": (basis_linear_cpu.FORM,), "cuda": (basis_linear_triton.FORM,)}
"""The same of `pifa::basis_linear`."""


class Lower(Rewrite):
    """pifa::linear -> the first of `forms` that is for the case; a `Skip` says why it stays the plain subgraph.

    And so pifa::grouped_linear, of `grouped_forms`, and pifa::basis_linear, of `basis_forms`.

    Args:
        gradients: whether the graph will be differentiated; only the plain subgraph can be.
        forms, grouped_forms, basis_forms: by type of device, in the order in which they are asked.
    """

    targets = (
        torch.ops.pifa.linear.default,
        torch.ops.pifa.grouped_linear.default,
        torch.ops.pifa.basis_linear.default,
    )
    is_about_speed_only = True

    def __init__(
        self,
        *,
        gradients: bool = False,
        forms: Mapping[str, Sequence[Form]] = FORMS,
        grouped_forms: Mapping[str, Sequence[Form]] = GROUPED_FORMS,
        basis_forms: Mapping[str, Sequence[Form]] = BASIS_FORMS,
    ) -> None:
        self.gradients = gradients
        self.forms: dict[Any, Mapping[str, Sequence[Form]]] = dict(
            zip(self.targets, (forms, grouped_forms, basis_forms), strict=True)
        )

    def match(self, gm: GraphModule, node: Node) -> Form | Skip:
        """The form to take."""
        if self.gradients:
            return Skip("plain subgraph: gradients are needed")
        if any(is_subclass(gm, operand) for operand in node.all_input_nodes):
            return SUBCLASS
        case = _case(gm, node)
        if case is None:
            return Skip("plain subgraph: the shapes of the factors are unknown")
        return choose(case, self.forms[node.target].get(case.device, ()))

    def rewrite(self, gm: GraphModule, node: Node, found: Form) -> Node:
        """Traces the form into the graph."""
        tracer = GraphAppendingTracer(gm.graph)
        arguments: list[Any] = [Proxy(arg, tracer) if isinstance(arg, Node) else arg for arg in node.args]
        result: Any = found.linear(*arguments)
        new: Node = result.node
        if not new.name.startswith(found.name):  # an addition, say: records name what stands there by its form
            new._rename(found.name)
        return new


def choose(case: Case, forms: Sequence[Form]) -> Form | Skip:
    """The first of `forms` that is for the case, or why none is."""
    if not forms:
        return Skip(f"plain subgraph: there is no other form for {case.device}")
    if case.other_dtypes:
        return Skip("plain subgraph: inputs, bias or result are of another dtype than the weights, as under autocast")
    against = []
    for form in forms:
        reason = form.reason_against(case) if case.dtype in form.dtypes else f"it does not compute in {case.dtype}"
        if reason is None:
            return form
        against.append(f"no {form.name} ({reason})")
    return Skip(f"plain subgraph: {', '.join(against)}")


def _case(gm: GraphModule, node: Node) -> Case | None:
    operands: list[Any] = [value_of(gm, operand) for operand in node.args[:5]]
    result, groups = value_of(gm, node), 1
    if node.target is torch.ops.pifa.basis_linear.default:
        x, plain, weight, order, bias = operands
        if weight is None or order is None or (node.args[1] is not None and plain is None):
            return None
        (groups, d_in), others = order.shape, (plain, bias)
        d_out = weight.shape[0] + (0 if plain is None else plain.shape[0])
    else:
        x, weight, coeff, _, bias = operands
        if weight is None or coeff is None:
            return None
        d_in, d_out, others = weight.shape[-1], weight.shape[-2] + coeff.shape[-2], (coeff, bias)
    numbers = None if result is None else hint_of(result.numel())
    dtypes = {value.dtype for value in (x, *others, result) if value is not None} - {weight.dtype}
    tokens = None if numbers is None else numbers // d_out
    return Case(weight.device.type, weight.dtype, d_in, d_out, tokens, frozenset(dtypes), groups)


def hint_of(number: int | torch.SymInt) -> int | None:
    """The number, or the example's where it varies; None where it depends on values (`nonzero`) and has none."""
    if not isinstance(number, torch.SymInt):
        return number
    return int(number.node.hint) if number.node.has_hint() else None

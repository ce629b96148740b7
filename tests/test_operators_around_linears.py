"""Every operator of PyTorch's test suite between two low-rank linears, on the weight of one, and written to either.

The passes have to know which of them are elementwise, which transpose or conjugate, and which write. Whatever they
think, the graph has to compute what it computed.
"""

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from graphs import low_rank
from operator_samples import forms, operators
from pifa_compiler.passes import DEFAULT_PASSES, Record, run_passes
from programs import Outcome, Program, difference, quiet, rewrites
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

CHUNKS = 4
# Sums of a dozen products in float64, behind functions that magnify rounding at most a thousandfold: `programs_around`.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
PERTURBATION = 1e-13


class Around(nn.Module):
    """Two linears of deficient rank, and a call at one place around them.

    Args:
        function: what is called.
        rest: its arguments behind the first; "other" stands for a value of the same shape, "column" for one number a
            feature.
        place: "between" the linears, on the "weight" of the first, or a statement that is called for what it writes to
            the weight or the activation.
        dtype: of the weights.
    """

    def __init__(self, function: Callable[..., Any], rest: tuple[Any, ...], place: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.function, self.rest, self.place = function, rest, place
        phase = 1 + 0.5j * torch.rand(8, 8).double() if dtype.is_complex else 1
        weights = [low_rank(8, 8, rank, torch.float64) * phase for rank in (2, 3)]
        self.first, self.second = (nn.Parameter(weight.to(dtype), requires_grad=False) for weight in weights)
        self.bias = nn.Parameter(torch.randn(8, dtype=dtype), requires_grad=False)
        self.column = nn.Parameter((torch.rand(8) + 0.5).to(dtype), requires_grad=False)

    def call(self, value: Tensor, other: Tensor) -> Any:
        return self.function(value, *({"other": other, "column": self.column}.get(arg, arg) for arg in self.rest))

    def forward(self, x: Tensor) -> Any:
        if self.place == "weight":
            return F.linear(x, self.call(self.first, self.second), self.bias)
        if self.place == "written weight":
            self.call(self.first, self.second)
            return F.linear(x, self.first)
        hidden = F.linear(x, self.first, self.bias)
        if self.place == "written activation":
            self.call(hidden, x)
            return F.linear(hidden, self.second)
        return F.linear(self.call(hidden, F.linear(x, self.first)), self.second)


RESTS: tuple[tuple[Any, ...], ...] = ((), (2.0,), ("other",), ("column",), (0,), (-1,), (0, 1), (-1, True), ((1, 0),))


def run(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """The result of a copy of the model, and x afterwards."""
    model, x = deepcopy(model), x.clone()
    torch.manual_seed(0)
    return model(x), x


def attempt(model: nn.Module, x: Tensor) -> tuple[Any, Tensor] | None:
    """`run`, or None where torch refuses the model's arguments."""
    with contextlib.suppress(Exception):  # whatever torch raises
        return run(model, x)
    return None


def do_nothing(value: Tensor) -> None:
    """The statement to compare with: it writes nothing."""


def fits(function: Callable[..., Any], rest: tuple[Any, ...], place: str, x: Tensor) -> bool:
    """Whether the call by itself takes such values, and gives or writes what can stand at the place: a quick look."""
    value = x.clone()
    with contextlib.suppress(Exception):  # whatever torch raises
        result = function(value, *({"other": x + 1, "column": x[0]}.get(arg, arg) for arg in rest))
        if place.startswith("written"):
            return value.shape == x.shape and not torch.equal(value, x)
        return isinstance(result, Tensor) and result.dtype is x.dtype and result.shape[-1:] == x.shape[-1:]
    return False


def is_close(ours: Any, theirs: Any) -> bool:
    return difference(Program("", run, ()), Outcome(ours, [], []), Outcome(theirs, [], []), **CLOSE) is None


def programs_around(
    op: Any, place: str, dtype: torch.dtype, one_spelling: bool
) -> Iterator[tuple[str, Around, Tensor]]:
    """The forms of an operator at a place, each with the first two sets of further arguments that fit there.

    Left out is what the operator refuses, what is random or amplifies a last digit more than a thousandfold (no rewrite
    could keep that), and statements that write nothing.

    Args:
        one_spelling: leaves out methods and Python's operators: they become the ATen operators of the functions.
    """
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for form, function in forms(op).items():
        if one_spelling and form not in ("function", "in-place"):
            continue
        fitting = 0
        for rest in RESTS:
            if not fits(function, rest, place, x):
                continue
            model = Around(function, rest, place, dtype)
            want, again = attempt(model, x), attempt(model, x * (1 + PERTURBATION))
            if want is None or again is None or not want[0].isfinite().all() or not is_close(again, want):
                continue
            if place.startswith("written") and is_close(attempt(Around(do_nothing, (), place, dtype), x), want):
                continue
            yield f"{op.name} {form} {place} {rest} {dtype}", model, x
            fitting += 1
            if fitting == 2:
                break


class _Values(Interpreter):
    """Collects the value of every node, in order."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: list[Any] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.values.append(result.detach().clone() if isinstance(result, Tensor) else result)
        return result


def by_symbolic_trace(model: nn.Module, x: Tensor) -> GraphModule:
    """A graph of functions and methods, with the values that passes read shapes of."""
    gm = symbolic_trace(deepcopy(model))
    values = _Values(deepcopy(gm))
    values.run(x.clone())
    for node, value in zip(gm.graph.nodes, values.values, strict=True):
        node.meta["val"] = value
    return gm


def by_make_fx(model: nn.Module, x: Tensor) -> GraphModule:
    """A graph of ATen operators, as `torch.export` makes it."""
    gm: GraphModule = make_fx(deepcopy(model), pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    return gm


def differs(model: nn.Module, x: Tensor, capture: Callable[..., GraphModule], report: list[Record]) -> bool:
    """Whether the passes change what the captured model computes or leaves in x."""
    want = run(model, x)
    try:
        gm = capture(model, x)
        if not is_close(run(gm, x), want):
            return False  # the capture itself is of another program
    except Exception:  # noqa: BLE001  there is no such capture of it
        return False
    report += run_passes(gm, [rule() for rule in DEFAULT_PASSES])
    return not is_close(run(gm, x), want)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize(
    ("place", "capture", "dtype"),
    [
        ("between", by_symbolic_trace, torch.float64),
        ("between", by_make_fx, torch.float64),
        ("weight", by_symbolic_trace, torch.complex128),
        ("written weight", by_symbolic_trace, torch.float64),
        ("written activation", by_symbolic_trace, torch.float64),
        pytest.param("weight", by_symbolic_trace, torch.float64, marks=pytest.mark.slow),
        pytest.param("weight", by_make_fx, torch.float64, marks=pytest.mark.slow),
        pytest.param("written weight", by_make_fx, torch.float64, marks=pytest.mark.slow),
        pytest.param("written activation", by_make_fx, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_the_passes_know_what_an_operator_does(place: str, capture: Any, dtype: torch.dtype, chunk: int):
    report: list[Record] = []
    with quiet():
        found = [
            name
            for op in operators()[chunk::CHUNKS]
            for name, model, x in programs_around(op, place, dtype, one_spelling=capture is by_make_fx)
            if differs(model, x, capture, report)
        ]
    assert found == []
    if place in ("between", "written activation"):  # else it would say nothing about rewritten weights
        assert rewrites(report, "FactorizeLinear") > 0
    if place == "between":
        assert rewrites(report, "AbsorbOrder") > 0

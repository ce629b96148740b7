"""Programs that are run eagerly and compiled, and told apart by all that a caller can see of them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from pifa_compiler.passes import Record, Skip
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from pifa_compiler import backend

COMPILE_FX = "torch._inductor.compile_fx.compile_fx"


@dataclass(frozen=True)
class Program:
    """A function and what it is called with; its arguments, tensors and modules, are copied before every run.

    Attributes:
        name: says which program it is where it fails.
        run: the function.
        args, kwargs: its arguments.
        undefined: its values are whatever was in memory, such as `torch.empty`'s; shapes and dtypes are compared.
    """

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    undefined: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a caller sees of a run: the results, the arguments afterwards, and which results are arguments."""

    results: Any
    arguments: list[Any]
    identical: list[tuple[int, int]]


def copied(value: Any) -> Any:
    """The same structure with tensors and modules of its own; one that is passed twice stays one."""
    made: dict[int, Any] = {}

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return made.setdefault(id(leaf), deepcopy(leaf))
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            new = leaf.detach().clone()
            is_parameter = isinstance(leaf, nn.Parameter)
            made[id(leaf)] = nn.Parameter(new, leaf.requires_grad) if is_parameter else new
        return made[id(leaf)]

    return tree_map(copy, value)


def observe(program: Program, function: Callable[..., Any]) -> Outcome:
    """Runs `function` on copies of the program's arguments, from one state of torch's random numbers."""
    args, kwargs = copied((program.args, program.kwargs))
    inputs = tree_leaves((args, kwargs))
    torch.manual_seed(0)
    results = function(*args, **kwargs)
    pairs = [(i, j) for i, result in enumerate(tree_leaves(results)) for j, arg in enumerate(inputs) if result is arg]
    return Outcome(results, states(inputs), [(i, j) for i, j in pairs if isinstance(inputs[j], Tensor)])


def states(leaves: Sequence[Any]) -> list[Any]:
    """The leaves of a structure, for modules their parameters and buffers."""
    lists = [leaf.state_dict().values() if isinstance(leaf, nn.Module) else [leaf] for leaf in leaves]
    return [value for values in lists for value in values]


def difference(program: Program, got: Outcome, want: Outcome, **tolerances: float) -> str | None:
    """What differs between two outcomes, in one line; None if nothing does."""
    if got.identical != want.identical:
        return f"results that are arguments: {got.identical} instead of {want.identical}"
    for what, ours, theirs in (("results", got.results, want.results), ("arguments", got.arguments, want.arguments)):
        ours, our_structure = tree_flatten(ours)
        theirs, their_structure = tree_flatten(theirs)
        if our_structure != their_structure:
            return f"{what} are {our_structure} instead of {their_structure}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                if isinstance(a, Tensor) or isinstance(b, Tensor) or not (a == b or (a != a and b != b)):
                    return f"{what}[{i}] is {a!r} instead of {b!r}"
                continue
            if (a.shape, a.dtype, a.layout, a.is_conj()) != (b.shape, b.dtype, b.layout, b.is_conj()):
                return f"{what}[{i}] is {list(a.shape)} {a.dtype} instead of {list(b.shape)} {b.dtype}"
            if program.undefined:
                continue
            try:
                assert_close(a, b, equal_nan=True, **tolerances)
            except AssertionError as error:
                return f"{what}[{i}]: {' '.join(str(error).split())}"
    return None


def outcome_of(program: Program, backend: str, options: dict[str, Any] | None = None) -> Outcome | str:
    """The program run through `torch.compile`, or the error that it raised, in one line."""
    torch._dynamo.reset()
    compiled = torch.compile(program.run, backend=backend, options=options)
    try:
        return observe(program, compiled)
    except Exception as error:  # noqa: BLE001  whatever a compiler raises is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def finding(program: Program, want: Outcome, backend: str, report: list[Record] | None = None) -> str | None:
    """What compiling by `backend` does to the program: an error or a difference, in one line; None if nothing."""
    got = outcome_of(program, backend, None if report is None else {"report": report})
    if isinstance(got, str):
        return got
    return difference(program, got, want)


@contextlib.contextmanager
def passes_alone() -> Iterator[None]:
    """The backend with Inductor stood in for by the rewritten graph's own forward.

    Where no weight is rewritten the graph runs in its canonical form all the same, which the backend would not compile.
    """
    forward = mock.patch(COMPILE_FX, lambda gm, example_inputs, **_: gm.forward)
    with forward, mock.patch.object(backend._Compiled, "_unrewritten", lambda self: backend._copy_module(self._gm)):
        yield


@contextlib.contextmanager
def without_code_generation() -> Iterator[None]:
    """The backend with AOTAutograd and Inductor's decompositions, but without Inductor's code: `aot_eager`."""
    from torch._dynamo.backends.debugging import aot_eager

    with mock.patch(COMPILE_FX, lambda gm, example_inputs, **_: aot_eager(gm, example_inputs)):
        yield


def rewrites(report: Sequence[Record], *rules: str) -> int:
    """How many nodes the passes of these names rewrote."""
    return sum(record.rule in rules and not isinstance(record.outcome, Skip) for record in report)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: programs of torch's own test suite warn of what they do, and none of that is a finding."""
    with warnings.catch_warnings(action="ignore"):
        yield

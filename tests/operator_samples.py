"""Programs from PyTorch's operator and module databases, on the samples of torch's own tests."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from pifa_compiler.passes import Record
from programs import Outcome, Program, copied, finding, observe, quiet, states
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves, tree_map

# Their values are whatever was in memory.
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


@cache
def operators() -> list[Any]:
    """`op_db` of the installed torch."""
    with quiet():
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


@cache
def modules() -> list[Any]:
    """`module_db` of the installed torch."""
    with quiet():
        from torch.testing._internal.common_modules import module_db
    return list(module_db)


def programs_of(op: Any, dtype: torch.dtype, samples: int, one_kind: bool = False) -> Iterator[Program]:
    """The function, method, in-place, operator and `out=` forms of an operator, on its first samples.

    The first tensor is an activation, all others are frozen parameters, which passes see as weights. What writes to its
    arguments comes as a statement too, whose result nobody reads. Samples that the eager operator refuses are left out.

    Args:
        one_kind: the functions and in-place methods alone, and what writes to its arguments as a statement only.
    """
    if not op.supports_dtype(dtype, "cpu"):
        return
    torch.manual_seed(0)
    for i, sample in enumerate(islice(op.sample_inputs("cpu", dtype, requires_grad=False), samples)):
        args, kwargs = _as_weights(((sample.input, *sample.args), sample.kwargs))
        name = f"{op.name}{'.' if op.variant_test_name else ''}{op.variant_test_name} {dtype} sample {i}"
        undefined = op.name in UNDEFINED
        for form, function in forms(op).items():
            if one_kind and form not in ("function", "in-place"):
                continue
            program = Program(f"{name} {form}", _call(function), args, kwargs, undefined)
            outcome = eager_outcome(program)
            if outcome is None:
                continue
            statement = _statement(function)
            writes = _writes(program, outcome)
            if not (one_kind and writes):
                yield program
            if writes:
                yield Program(f"{program.name} as a statement", statement, args, kwargs, undefined)
            if form == "function" and op.supports_out and _are_tensors(outcome.results):
                out = tree_map(lambda t: torch.full_like(t, 7), outcome.results)
                with_out = Program(f"{name} out=", program.run, args, {**kwargs, "out": out}, undefined)
                if eager_outcome(with_out) is None:
                    continue
                if not one_kind:
                    yield with_out
                yield Program(f"{with_out.name} as a statement", statement, args, with_out.kwargs, undefined)


def with_low_rank_weights(program: Program) -> Program | None:
    """The program with a parameter of rank 1 in place of every matrix; None if it has none or refuses those."""
    args, kwargs = tree_map(_rank_one, (program.args, {k: v for k, v in program.kwargs.items() if k != "out"}))
    if "out" in program.kwargs:
        kwargs["out"] = program.kwargs["out"]
    new = Program(f"{program.name}, low-rank", program.run, args, kwargs, program.undefined)
    return None if eager_outcome(new) is None else new


def programs_of_module(info: Any, dtype: torch.dtype, samples: int) -> Iterator[Program]:
    """A frozen module of torch in training and in evaluation on its first samples, with low-rank weights as well."""
    for training in (True, False):
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
        for i, sample in enumerate(islice(inputs, samples)):
            if sample.forward_input is None:
                continue
            made, called = sample.constructor_input, sample.forward_input
            module = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
            if isinstance(module, LazyModuleMixin):
                module(*copied(called.args), **copied(called.kwargs))  # makes its parameters
            module.requires_grad_(False)
            for low_rank in (False, True):
                name = f"{info.name} {dtype} sample {i} {'training' if training else 'evaluation'}"
                if low_rank:
                    matrices = [p for p in module.parameters() if _rank_one(p) is not p]
                    for parameter in matrices:
                        parameter.data = _rank_one(parameter).data
                    name = f"{name}, low-rank"
                    if not matrices:
                        continue
                program = Program(name, _call_module, (module, *called.args), called.kwargs)
                if eager_outcome(program) is not None:
                    yield program


def eager_outcome(program: Program) -> Outcome | None:
    """What the program does by itself; None where torch refuses its arguments."""
    try:
        return observe(program, program.run)
    except Exception:  # noqa: BLE001  any refusal of torch's own
        return None


def forms(op: Any) -> dict[str, Callable[..., Any]]:
    forms = {
        "function": op.op,
        "method": op.method_variant,
        "in-place": op.inplace_variant,
        "operator": op.operator_variant,
        "in-place operator": op.inplace_operator_variant,
    }
    return {name: function for name, function in forms.items() if function is not None}


# Dynamo compiles functions of Python's; those of the database are built-in ones.
def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _statement(function: Callable[..., Any]) -> Callable[..., Any]:
    def statement(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        return torch.ones(2) * 3

    return statement


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _writes(program: Program, outcome: Outcome) -> bool:
    before = states(tree_leaves((program.args, program.kwargs)))
    return any(
        isinstance(old, Tensor) and old.layout is torch.strided and not _same_bits(old, new)
        for old, new in zip(before, outcome.arguments, strict=True)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _rank_one(leaf: Any) -> Any:
    """A parameter of rank 1 of the same shape; what is no matrix of numbers with a fraction is returned as it is."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.ndim != 2 or min(leaf.shape) < 2:
        return leaf
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    # Of unit scale, whatever the sample's was.
    column, row = (torch.linspace(0.5, 1.5, n, dtype=torch.float64) for n in leaf.shape)
    phase = 1 + 0.5j if leaf.is_complex() else 1
    return nn.Parameter((torch.outer(column, row) * phase).to(leaf.dtype), requires_grad=False)


def _are_tensors(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, tuple) and all(isinstance(t, Tensor) for t in result))


def _as_weights(value: Any) -> Any:
    seen: list[Tensor] = []

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            return leaf
        seen.append(leaf)
        return leaf.detach() if len(seen) == 1 else nn.Parameter(leaf.detach().clone(), requires_grad=False)

    return tree_map(replace, copied(value))


def finding_of_ours_alone(program: Program, other: str, report: list[Record]) -> str | None:
    """What the backend does to a program that the backend `other` does not, in one line; None if nothing."""
    want = eager_outcome(program)
    assert want is not None
    ours = finding(program, want, "pifa", report)
    if ours is None or finding(program, want, other) is not None:
        return None
    return f"{program.name}: {ours}"

"""Timing by turns: what all benchmarks share, from compiling what is timed to refusing what computes something else."""

import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ..errors import BenchError, CaptureError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LEAST_ROUNDS = 5
"""Every median is one of at least so many calls."""


@dataclass(frozen=True)
class Timing:
    """Medians of calls made by turns.

    Attributes:
        milliseconds: the median of each call, by name.
        rounds: how often each was called.
    """

    milliseconds: dict[str, float]
    rounds: int


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = LEAST_ROUNDS,
    prepare: Callable[[], None] | None = None,
) -> Timing:
    """Times calls by turns, so that a machine that slows down slows all of them down.

    The first call moves back by one each round: none always follows the same other one, with the same cache contents.

    Args:
        calls: what to time, by name.
        seconds: for each of them, all rounds together; rounds go on until it is used up.
        least: rounds to make even if that takes longer.
        prepare: called before every call, untimed.
    """
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    ends, rounds = time.perf_counter() + seconds * len(names), 0
    while rounds < least or time.perf_counter() < ends:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            if prepare is not None:
                prepare()
            call = calls[name]
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
        rounds += 1
    return Timing({name: median(times) * 1e3 for name, times in taken.items()}, rounds)


def compile_apart(
    module: nn.Module, backend: str, name: str, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The module compiled under a code object of its own, with Inductor's `options`.

    Dynamo keeps compiled code by code object and tries one after the other: variants with the same one would each be
    found after those before it, and beyond a number of them none would be compiled any more.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    own = types.FunctionType(
        call.__code__.replace(co_name=name), call.__globals__, name, call.__defaults__, call.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, backend=backend, dynamic=False, options=dict(options or {}))
    return compiled


def call_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """`function` with its arguments; what fails to compile is a `CaptureError`."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    def call() -> Any:
        try:
            return function(*args, **kwargs)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(f"torch.compile failed ({reason}); is there a C++ compiler?") from error

    return call


def refuse_wrong(errors: Mapping[str, float], bound: float, where: str) -> None:
    """Refuses a relative error above `bound`.

    Raises:
        BenchError: names the variants that are off.
    """
    wrong = {name: error for name, error in errors.items() if not error <= bound}  # NaN is wrong as well
    if wrong:
        said = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
        raise BenchError(
            f"{where}: wrong results, relative error at most {bound:.2g} expected, off are {said}; not timed. "
            "Report this with the versions of torch and pifa-compiler"
        )


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """PyTorch's number of threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

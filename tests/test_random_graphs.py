"""Random graphs of linears, functions, views and writes: whatever the passes do, the graph does what it did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import CAPTURES, Capture, call, low_rank
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pifa_compiler.passes import DEFAULT_PASSES, Record, run_passes
from programs import quiet, rewrites
from torch import Tensor, nn
from torch.nn import functional as F

from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear

TOKENS, WIDTH, WEIGHTS = 4, 8, 6
# What is reordered are sums of eight products, a dozen of them in a row; relative to the largest number of the result.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-3}

Step = tuple[str, int, int, int]
"""Name of the operation, two values among those made so far, and a weight; numbers are taken modulo what there is."""


class Weights(nn.Module):
    """The weights of a random program, and what shares memory with them.

    Of the six matrices [8, 8] two have full rank, three a deficient one, and the last is the first deficient one again.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        matrices = [
            torch.randn(WIDTH, WIDTH) / WIDTH**0.5,
            *(low_rank(WIDTH, WIDTH, rank, dtype) for rank in (2, 3, 1)),
        ]
        matrices.append(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        held = [nn.Parameter(matrix.to(dtype), requires_grad=False) for matrix in matrices]
        self.matrices = nn.ParameterList([*held, held[1]])
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, dtype=dtype), False) for _ in range(WEIGHTS))
        self.v, self.u = (nn.Parameter(torch.randn(s, dtype=dtype) / 2, False) for s in ((2, WIDTH), (WIDTH, 2)))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False) for _ in range(2))
        self.layers[0].weight.copy_(low_rank(WIDTH, WIDTH, 2, dtype))
        self.layers.append(self.layers[0])
        factors = factorize(torch.randn(WIDTH, WIDTH, dtype=dtype) / 2, rank=4)
        self.pifa = PifaLinear.from_factors(factors, torch.randn(WIDTH, dtype=dtype), requires_grad=False)
        # A parameter: `symbolic_trace` carries out what is written to buffers while it traces.
        self.alias = nn.Parameter(self.matrices[2].data, requires_grad=False)
        self.register_buffer("total", torch.zeros(WIDTH, dtype=dtype))


Operation = Callable[[Weights, Tensor, Tensor, int], Any]

LINEARS: dict[str, Operation] = {
    "linear": lambda w, a, b, i: F.linear(a, w.matrices[i], w.biases[i]),
    "linear without bias": lambda w, a, b, i: F.linear(a, w.matrices[i]),
    "matmul": lambda w, a, b, i: a @ w.matrices[i],
    "mm of a transpose": lambda w, a, b, i: torch.mm(a, w.matrices[i].t()),
    "addmm": lambda w, a, b, i: torch.addmm(w.biases[i], a, w.matrices[i]),
    "scaled addmm": lambda w, a, b, i: torch.addmm(w.biases[i], a, w.matrices[i], alpha=0.5),
    "transposed thrice": lambda w, a, b, i: F.linear(a, w.matrices[i].T.transpose(0, 1).mT),
    "computed weight": lambda w, a, b, i: F.linear(a, torch.tanh(w.matrices[i])),
    "pair": lambda w, a, b, i: F.linear(F.linear(a, w.v), w.u, w.biases[i]),
    "pair of matrices": lambda w, a, b, i: a @ w.matrices[i] @ w.matrices[i - 1],
    "module": lambda w, a, b, i: w.layers[i % 3](a),
    "tied module": lambda w, a, b, i: F.linear(a, w.layers[0].weight.t(), w.layers[0].bias),
    "pifa": lambda w, a, b, i: w.pifa(a),
    "bias of another": lambda w, a, b, i: F.linear(a, w.matrices[1], w.layers[0].bias),
}
FUNCTIONS: dict[str, Operation] = {
    "relu": lambda w, a, b, i: F.relu(a),
    "gelu": lambda w, a, b, i: F.gelu(a),
    "sigmoid": lambda w, a, b, i: torch.sigmoid(a),
    "add": lambda w, a, b, i: a + b,
    "product": lambda w, a, b, i: a * b,
    "scaled": lambda w, a, b, i: 0.5 * a - 1,
    "bias": lambda w, a, b, i: a * w.biases[i],
    "softmax": lambda w, a, b, i: a.softmax(-1),
    "norm": lambda w, a, b, i: F.layer_norm(a, (WIDTH,)),
    "cumulated": lambda w, a, b, i: a.cumsum(-1) / WIDTH,
    "mean": lambda w, a, b, i: a - a.mean(-1, keepdim=True),
    "flip": lambda w, a, b, i: a.flip(-1),
    "where": lambda w, a, b, i: torch.where(a > b, a, b),
}
VIEWS: dict[str, Operation] = {
    "view": lambda w, a, b, i: a.view(2, 2, WIDTH).view(TOKENS, WIDTH),
    "regrouped": lambda w, a, b, i: a.reshape(WIDTH, TOKENS).reshape(TOKENS, WIDTH),
    "itself": lambda w, a, b, i: a[:],
    "joined": lambda w, a, b, i: torch.cat((a[:2], b[2:])),
    "halves": lambda w, a, b, i: torch.cat(a.chunk(2, -1)[::-1], -1),
    "swapped": lambda w, a, b, i: torch.stack((b, a))[1],
}
WRITES: dict[str, Operation] = {
    "mul_": lambda w, a, b, i: a.mul_(0.5),
    "relu_": lambda w, a, b, i: F.relu(a, inplace=True),
    "add_ of another": lambda w, a, b, i: a.add_(b),
    "written row": lambda w, a, b, i: a[1].mul_(2),
    "written column": lambda w, a, b, i: a[:, 2:4].fill_(1),
    "set item": lambda w, a, b, i: a.__setitem__(0, b[1]),
    "weight": lambda w, a, b, i: w.matrices[i].mul_(0.5),
    "row of a weight": lambda w, a, b, i: w.matrices[i][0].add_(0.5),
    "alias of a weight": lambda w, a, b, i: w.alias[1:3].mul_(2),
    "bias in place": lambda w, a, b, i: w.biases[i].add_(1),
    "running total": lambda w, a, b, i: w.total.add_(a.sum(0)),
    "foreach": lambda w, a, b, i: torch._foreach_mul_([a, w.total], 0.5),
    "out": lambda w, a, b, i: torch.mul(a, 0.5, out=b),
    "product out": lambda w, a, b, i: torch.mm(a.clone(), w.matrices[i], out=b),
}
OPERATIONS = {**LINEARS, **FUNCTIONS, **VIEWS, **WRITES}


class Program(nn.Module):
    """Runs steps on an input [4, 8]; returns some of the values made."""

    def __init__(self, steps: list[Step], outputs: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.steps, self.outputs, self.weights = steps, outputs, Weights(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for name, first, second, weight in self.steps:
            a, b = values[first % len(values)], values[second % len(values)]
            result = OPERATIONS[name](self.weights, a, b, weight)
            if name not in WRITES:
                values.append(result)
        return tuple(values[i % len(values)] * 1 for i in [*self.outputs, len(values) - 1])


# Recent values more often than early ones, and linears and writes more often than their number: -1 is the last value.
VALUES = st.sampled_from([-1, -1, -1, -2, -2, -3, 0])
NAMES = st.one_of(*(st.sampled_from(sorted(names)) for names in (LINEARS, LINEARS, FUNCTIONS, VIEWS, WRITES)))
STEPS = st.lists(
    st.tuples(NAMES, VALUES, VALUES, st.sampled_from([1, 1, 1, 2, 2, *range(WEIGHTS)])), min_size=1, max_size=9
)
OUTPUTS = st.lists(VALUES, max_size=2)
PIPELINES = st.one_of(
    st.just(list(DEFAULT_PASSES)),
    st.just(list(DEFAULT_PASSES)),
    st.lists(st.sampled_from(DEFAULT_PASSES), min_size=1, max_size=8),
)
DTYPES = st.sampled_from([torch.float64, torch.float32])  # native forms are there for float32


def check(
    capture: Capture, steps: list[Step], outputs: list[int], pipeline: list[Any], dtype: torch.dtype
) -> list[Record]:
    """Asserts that the captured program does after the passes what it does eagerly, writes included."""
    torch._dynamo.reset()
    model = Program(steps, outputs, dtype)
    x = torch.linspace(-1, 1, TOKENS * WIDTH, dtype=dtype).view(TOKENS, WIDTH).cos()
    with quiet():
        gm = capture(model, (x.clone(),))
        # From the state that the capture left; a deepcopy would part the matrix from its alias.
        eager = Program(steps, outputs, dtype)
        eager.load_state_dict(model.state_dict())
        records = run_passes(gm, [rule() for rule in pipeline])
        ours, theirs = x.clone(), x.clone()
        got, want = call(gm, ours), eager(theirs)
    got = got if isinstance(got, tuple) else (got,)
    names, ours_after, theirs_after = zip(
        ("x", ours, theirs),
        *((n, value, eager.state_dict()[n]) for n, value in model.state_dict().items()),
        *((f"output {i}", *pair) for i, pair in enumerate(zip(got, want, strict=True))),
        strict=True,
    )
    for name, a, b in zip(names, ours_after, theirs_after, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() <= TOLERANCE[dtype] * scale or not b.isfinite().all(), name
    return records


def drawn(examples: int) -> Callable[[Any], Any]:
    """The same examples at every run, and some where a weight is written and then read, itself or as the tied one."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    kept = settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=health)

    def decorate(test: Any) -> Any:
        for write, weight in (("weight", 1), ("row of a weight", 5), ("alias of a weight", 2), ("product out", 1)):
            steps = [(write, -1, -1, weight), ("linear", -1, -1, 1 if weight == 5 else weight)]
            test = example(steps, [0], list(DEFAULT_PASSES), torch.float64)(test)
        return given(STEPS, OUTPUTS, PIPELINES, DTYPES)(kept(test))

    return decorate


@pytest.mark.parametrize("name", CAPTURES)
@drawn(60)
def test_the_passes_keep_what_random_graphs_do(name: str, steps: Any, outputs: Any, pipeline: Any, dtype: Any):
    check(CAPTURES[name], steps, outputs, pipeline, dtype)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CAPTURES)
@drawn(3000)
def test_the_passes_keep_what_many_random_graphs_do(name: str, steps: Any, outputs: Any, pipeline: Any, dtype: Any):
    check(CAPTURES[name], steps, outputs, pipeline, dtype)


def test_every_pass_rewrites_something_in_random_graphs():
    """Else the tests above would say nothing of it."""
    done: list[Record] = []

    @drawn(200)
    def collect(steps: Any, outputs: Any, pipeline: Any, dtype: Any) -> None:
        done.extend(check(CAPTURES["symbolic_trace"], steps, outputs, list(DEFAULT_PASSES), dtype))

    collect()
    assert {rule.__name__: rewrites(done, rule.__name__) > 0 for rule in DEFAULT_PASSES} == {
        rule.__name__: True for rule in DEFAULT_PASSES
    }

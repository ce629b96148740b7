"""Values by Triton's interpreter (`make test` sets TRITON_INTERPRET=1), tracing in a process without it."""

import pytest
import torch
from pifa_compiler.kernels import linear, linear_ref
from torch import Tensor
from triton_interpreter import interpreted, run_without_interpreter

pytest.importorskip("triton", reason="needs the package triton")

DTYPES = [torch.float32, torch.float16]  # the interpreter's tl.dot is wrong for bfloat16
TOKENS = [1, 2, 16, 17, 65]  # a GEMV, tensor cores, full; prefill with a ragged tile, with two
SIZES = {  # out, rank
    "equal": [(40, 8)] * 3,
    "grouped-query": [(70, 65), (33, 5), (33, 5)],
    "two": [(33, 17), (20, 3)],
    "one": [(33, 17)],
    "four": [(33, 17), (20, 3), (12, 1), (41, 40)],
    "full": [(20, 20), (33, 5)],
}
EPILOGUES = [("last", "last"), ("", "all"), ("all", ""), ("", "")]  # of `operands`
CASES = [(size, "all", "all") for size in SIZES] + [("grouped-query", *epilogue) for epilogue in EPILOGUES]


def padded(value: Tensor) -> Tensor:
    """The same tensor, contiguous, with NaN right before and after it."""
    storage = torch.full((64 + value.numel(),), torch.nan, dtype=value.dtype)
    return storage[32 : 32 + value.numel()].view(value.shape).copy_(value)


def operands(
    sizes: list[tuple[int, int]], tokens: int, dtype: torch.dtype, d_in: int = 37, *, order: str = "", bias: str = ""
):
    """`order` and `bias`: of no sibling, of "all", or of all but the "last"."""
    storage = torch.full((tokens + 2, d_in + 3), torch.nan, dtype=dtype)
    x = storage[1:-1, 1 : d_in + 1].copy_(torch.randn(tokens, d_in) + 1)  # NaN between rows, before and after
    w_pivots = [padded((torch.randn(rank, d_in) / d_in**0.5).to(dtype)) for _, rank in sizes]
    coeffs = [padded((torch.randn(out - rank, rank) / rank**0.5).to(dtype)) for out, rank in sizes]
    has = {"": 0, "all": len(sizes), "last": len(sizes) - 1}
    orders = [torch.randperm(out) if i < has[order] else None for i, (out, _) in enumerate(sizes)]
    biases = [padded(torch.randn(out).to(dtype)) if i < has[bias] else None for i, (out, _) in enumerate(sizes)]
    return x, w_pivots, coeffs, orders, biases


def run(*values) -> list[Tensor]:
    from pifa_compiler.kernels.linear_triton_siblings import linear_siblings_triton

    return linear_siblings_triton(*values)


@pytest.fixture
def nan_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated starts as NaN, so that an element never written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(value: Tensor) -> Tensor:
        return value.fill_(torch.nan) if value.is_floating_point() else value.fill_(2**20)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: fill(new_empty(*args, **kwargs)))


@interpreted
@pytest.mark.usefixtures("nan_in_new_tensors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("sizes", "order", "bias"), CASES)
def test_values_err_at_most_twice_as_much_as_torch(sizes: str, order: str, bias: str, tokens: int, dtype: torch.dtype):
    x, *weights = operands(SIZES[sizes], tokens, dtype, order=order, bias=bias)
    for got, *each in zip(run(x, *weights), *weights, strict=True):
        doubled = [value.double() if value is not None and value.is_floating_point() else value for value in each]
        exact = linear_ref(x.double(), *doubled)
        by_torch = linear(x, *each)
        bound = 2 * (by_torch - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (got.shape, got.dtype, got.is_contiguous()) == (by_torch.shape, dtype, True)
        assert (got - exact).abs().max() <= bound  # never true of NaN


@interpreted
def test_few_tokens_keep_y_p_wider_than_the_dtype():
    # y_p = 1 + 2^-12, of which float16 keeps 1; coeff (1, -1) against a second pivot row of 1 leaves the difference.
    x = torch.tensor([[1.0, 2.0**-12]] * 2, dtype=torch.float16)
    w_pivot = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float16)
    coeff = torch.tensor([[1.0, -1.0]], dtype=torch.float16)
    for tokens in (1, 2):
        for y in run(x[:tokens], [w_pivot] * 2, [coeff] * 2, [None] * 2, [None] * 2):
            assert y[:, 2].tolist() == [2.0**-12] * tokens


@interpreted
@pytest.mark.parametrize("batch", [(), (0,), (2, 3, 4)], ids=str)
def test_leading_dimensions(batch: tuple[int, ...]):
    _, *weights = operands(SIZES["two"], 1, torch.float32, order="all", bias="all")
    x = torch.randn(*batch, 37)
    for got, *each in zip(run(x, *weights), *weights, strict=True):
        torch.testing.assert_close(got, linear(x, *each))


@interpreted
def test_the_operator_is_registered_as_torch_demands():
    from pifa_compiler.kernels import linear_triton_siblings as _registers  # noqa: F401

    for tokens in (1, 20):
        values = operands(SIZES["grouped-query"], tokens, torch.float32, order="all", bias="last")
        torch.library.opcheck(torch.ops.pifa.linear_siblings_triton.default, values)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, c, o, b: (x, w, c[1:], o, b), "as many w_pivots"),
        (lambda x, w, c, o, b: (x.half(), w, c, o, b), "throughout"),
        (lambda x, w, c, o, b: (x, w, c, o[::-1], b), "takes orders of torch.int64"),
        (lambda x, w, c, o, b: (x, w, c, o[1:], b), "takes orders of torch.int64"),
        (lambda x, w, c, o, b: (x, w, c, o, [b[0], b[1].half()]), "takes biases of torch.float32"),
    ],
    ids=["coeffs", "mixed", "order", "orders", "bias"],
)
def test_what_does_not_fit_is_refused(change, message: str):
    with pytest.raises(ValueError, match=message):
        run(*change(*operands(SIZES["two"], 3, torch.float32, order="all", bias="all")))


TRACE = """
import itertools
import torch
from torch._subclasses import FakeTensorMode
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import config
from pifa_compiler.kernels import linear_triton_siblings as _registers
class Layer(torch.nn.Module):
    def forward(self, x, *weights):
        operands = [list(weights[i : i + 3]) for i in (0, 3, 6, 9)]
        return torch.ops.pifa.linear_siblings_triton.default(x, *operands)
for config.max_autotune, tokens in itertools.product((True, False), (1, 16, 512)):
    with FakeTensorMode():
        h = dict(device="cuda", dtype=torch.bfloat16)
        sizes = (96, 32), (48, 16), (48, 16)
        weights = [torch.empty(r, 64, **h) for _, r in sizes] + [torch.empty(o - r, r, **h) for o, r in sizes]
        weights += [torch.empty(o, device="cuda", dtype=torch.int64) for o, _ in sizes]
        weights += [torch.empty(o, **h) for o, _ in sizes]
        gm, _ = aot_export_module(Layer(), (torch.empty(tokens, 64, **h), *weights), trace_joint=False)
    targets = [str(node.target) for node in gm.graph.nodes]
    print(*(sum(name in target for target in targets) for name in ("triton_kernel_wrapper", "pifa", "index_select")))
"""


def test_query_key_and_value_of_unequal_shapes_are_two_launches_and_nothing_is_gathered_for_few_tokens():
    """Tuned and not, for one token, some and many. In a process without the interpreter."""
    done = run_without_interpreter("-c", TRACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 0 0", "2 0 0", "2 0 3"] * 2

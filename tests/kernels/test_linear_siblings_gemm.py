import os

import pytest
import torch
from pifa_compiler.kernels import linear_ref
from pifa_compiler.kernels.linear_siblings_gemm import GROUPED_TOKENS, linear_siblings_batched, linear_siblings_gemm
from pifa_compiler.kernels.side_by_side import as_one, lay_side_by_side
from torch import Tensor
from torch.profiler import profile
from triton_interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EQUAL = [(40, 8)] * 3  # out, rank
GROUPED_QUERY = [(40, 8), (24, 16), (24, 16)]
UNEQUAL = [(40, 8), (33, 16), (8, 8), (9, 24)]


def operands(sizes: list[tuple[int, int]], batch: tuple[int, ...], dtype: torch.dtype, d_in: int = 24):
    w_pivots = [(torch.randn(rank, d_in) / d_in**0.5).to(dtype) for _, rank in sizes]
    coeffs = [(torch.randn(max(out - rank, 0), rank) / rank**0.5).to(dtype) for out, rank in sizes]
    return torch.randn(*batch, d_in).to(dtype), w_pivots, coeffs


def assert_right(x: Tensor, w_pivots: list[Tensor], coeffs: list[Tensor]) -> None:
    z, rest = linear_siblings_gemm(x, w_pivots, coeffs)
    assert (z.dtype, rest.dtype) == (x.dtype, x.dtype)
    parts = z.split([w.shape[0] for w in w_pivots], -1), rest.split([c.shape[0] for c in coeffs], -1)
    for w_pivot, coeff, *found in zip(w_pivots, coeffs, *parts, strict=True):
        wanted = linear_ref(x.double(), w_pivot.double(), coeff.double())
        # Either half of y is rounded once, and y_p, which enters the other half, once more; sums are float32.
        assert (torch.cat(found, -1) - wanted).norm() <= 2 * torch.finfo(x.dtype).eps * wanted.norm()


def gemms(*values, function=linear_siblings_gemm) -> tuple[int, int]:
    """How many GEMMs and batched GEMMs are called."""
    with profile() as found:
        function(*values)
    calls = {event.key: event.count for event in found.key_averages()}
    return calls.get("aten::mm", 0), calls.get("aten::bmm", 0)


@pytest.mark.parametrize("laid", [True, False], ids=["side-by-side", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(1,), (2, 3, 4), (), (0,), (GROUPED_TOKENS + 1,)], ids=str)
@pytest.mark.parametrize("sizes", [EQUAL, GROUPED_QUERY, UNEQUAL], ids=["equal", "grouped-query", "unequal"])
def test_values_against_float64(sizes, batch: tuple[int, ...], dtype: torch.dtype, laid: bool):
    if dtype is torch.bfloat16 and not (laid and sizes is EQUAL) and os.environ.get("TRITON_INTERPRET") == "1":
        batch = (GROUPED_TOKENS + 2,)  # the interpreter's tl.dot is wrong for bfloat16
    x, w_pivots, coeffs = operands(sizes, batch, dtype)
    if laid:
        lay_side_by_side(w_pivots)
        lay_side_by_side(coeffs)
    assert_right(x, w_pivots, coeffs)


def test_siblings_of_one_shape_are_two_launches():
    x, w_pivots, coeffs = operands(EQUAL, (5,), torch.float32)
    assert gemms(torch.randn(GROUPED_TOKENS + 1, 24), w_pivots, coeffs) == (6, 0)
    lay_side_by_side(w_pivots)
    lay_side_by_side(coeffs)
    assert gemms(x, w_pivots, coeffs) == (1, 1)


@interpreted
@pytest.mark.parametrize("sizes", [GROUPED_QUERY, UNEQUAL[:2]], ids=["grouped-query", "unequal"])
def test_siblings_of_unequal_shapes_are_one_gemm_and_one_launch_of_our_kernel(sizes):
    x, w_pivots, coeffs = operands(sizes, (5,), torch.float32)
    lay_side_by_side(w_pivots)
    assert gemms(x, w_pivots, coeffs) == (1, 0)  # the kernel is no call of ATen
    many = torch.randn(GROUPED_TOKENS + 1, 24)
    lay_side_by_side(coeffs)
    assert gemms(many, w_pivots, coeffs) == ((2, 1) if sizes is GROUPED_QUERY else (3, 0))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    for tokens in (3, GROUPED_TOKENS + 1):
        for found in linear_siblings_gemm(*operands(UNEQUAL, (tokens,), torch.float32)):
            assert not found.isnan().any()


def test_strided_operands():
    x, w_pivots, coeffs = operands(UNEQUAL, (6, 4), torch.float32)
    x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_right(x, [w.T.contiguous().T for w in w_pivots], [c.T.contiguous().T for c in coeffs])


def test_weights_that_are_exchanged_later_are_read():
    x, w_pivots, coeffs = operands(EQUAL, (5,), torch.float32)
    lay_side_by_side(w_pivots)
    w_pivots[1].data = torch.randn_like(w_pivots[1])
    assert as_one(w_pivots) is None
    assert_right(x, w_pivots, coeffs)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_the_operator_is_registered_as_torch_demands(sizes):
    for batch in ((3,), (2, 3)):
        values = operands(sizes, batch, torch.float32)
        torch.library.opcheck(torch.ops.pifa.linear_siblings_gemm.default, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, c: (x.double(), [t.double() for t in w], [t.double() for t in c]), "float64"),
        (lambda x, w, c: (x, [w[0].half(), *w[1:]], c), "throughout"),
        (lambda x, w, c: (x[:, 1:], w, c), r"takes x \[..., in\]"),
        (lambda x, w, c: (x, w, [c[0][:, 1:], *c[1:]]), r"takes x \[..., in\]"),
        (lambda x, w, c: (x, w, c[1:]), r"takes x \[..., in\]"),
        (lambda x, w, c: (x, [], []), r"takes x \[..., in\]"),
    ],
    ids=["float64", "mixed", "in", "rank", "count", "none"],
)
def test_what_does_not_fit_is_refused(change, message: str):
    with pytest.raises(ValueError, match=message):
        linear_siblings_gemm(*change(*operands(EQUAL, (3,), torch.float32)))


@pytest.mark.parametrize("laid", [True, False], ids=["side-by-side", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(1,), (2, 3, 4), (), (0,), (300,)], ids=str)
@pytest.mark.parametrize("rank", [8, 17, 40])
def test_batched_values_against_float64(
    rank: int, batch: tuple[int, ...], dtype: torch.dtype, laid: bool, monkeypatch: pytest.MonkeyPatch
):
    x, w_pivots, coeffs = operands([(40, rank)] * 3, batch, dtype)
    if laid:
        lay_side_by_side([*w_pivots])
        lay_side_by_side([*coeffs])
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    y = linear_siblings_batched(x, w_pivots, coeffs)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((*batch, 3, 40), dtype, True)
    for i, weights in enumerate(zip(w_pivots, coeffs, strict=True)):
        wanted = linear_ref(x.double(), *(w.double() for w in weights))
        # Either half of y is rounded once, and y_p, which enters the other half, once more; sums are float32.
        assert (y[..., i, :] - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


def test_a_batch_is_two_launches_and_is_registered_as_torch_demands():
    x, w_pivots, coeffs = operands(EQUAL, (5,), torch.float32)
    assert gemms(x, w_pivots, coeffs, function=linear_siblings_batched) == (6, 0)
    lay_side_by_side(w_pivots)
    lay_side_by_side(coeffs)
    assert gemms(x, w_pivots, coeffs, function=linear_siblings_batched) == (0, 2)
    torch.library.opcheck(torch.ops.pifa.linear_siblings_batched.default, (x, w_pivots, coeffs))
    with pytest.raises(ValueError, match="of one shape"):
        linear_siblings_batched(*operands(UNEQUAL, (5,), torch.float32))

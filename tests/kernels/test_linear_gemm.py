import pytest
import torch
from pifa_compiler.kernels import linear_ref
from pifa_compiler.kernels.linear_gemm import linear_gemm
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(d_out: int, d_in: int, rank: int, batch: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, w_pivot = torch.randn(*batch, d_in), torch.randn(rank, d_in) / d_in**0.5
    return tuple(v.to(dtype) for v in (x, w_pivot, torch.randn(d_out - rank, rank) / rank**0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(1,), (17,), (2, 3, 4), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("size", [(40, 24, 8), (33, 17, 5), (20, 20, 20), (9, 12, 1)], ids=str)
def test_values_against_float64(size: tuple[int, int, int], batch: tuple[int, ...], dtype: torch.dtype):
    values = operands(*size, batch, dtype)
    y = linear_gemm(*values)
    wanted = linear_ref(*(v.double() for v in values))
    assert (y.shape, y.dtype, y.is_contiguous()) == (wanted.shape, dtype, True)
    # Either half of y is rounded once, and y_p, which enters the other half, once more; sums are float32.
    assert (y - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch):
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    for rank in (5, 17):
        assert not linear_gemm(*operands(17, 12, rank, (3,), torch.float32)).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_operands(dtype: torch.dtype):
    x, w_pivot, coeff = operands(40, 24, 8, (6, 4), dtype)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0), w_pivot.T.contiguous().T, coeff.T.contiguous().T
    wanted = linear_ref(x.double(), w_pivot.double(), coeff.double())
    assert (linear_gemm(*strided) - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("rank", [5, 17])
def test_the_operator_is_registered_as_torch_demands(rank: int):
    for batch in ((3,), (2, 3)):
        torch.library.opcheck(torch.ops.pifa.linear_gemm.default, operands(17, 12, rank, batch, torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles(dynamic: bool):
    _, w_pivot, coeff = operands(17, 12, 5, (), torch.float32)
    fast = torch.compile(lambda x: linear_gemm(x, w_pivot, coeff).relu(), dynamic=dynamic)
    for tokens in (2, 5):
        x = torch.randn(tokens, 12)
        torch.testing.assert_close(fast(x), linear_gemm(x, w_pivot, coeff).relu())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, c: (x.double(), w.double(), c.double()), "float64"),
        (lambda x, w, c: (x, w.half(), c), "throughout"),
        (lambda x, w, c: (x[:, 1:], w, c), r"takes x \[..., in\]"),
        (lambda x, w, c: (x, w, c[:, 1:]), r"takes x \[..., in\]"),
        (lambda x, w, c: (x[0, 0], w, c), r"takes x \[..., in\]"),
    ],
    ids=["float64", "mixed", "in", "rank", "scalar"],
)
def test_what_does_not_fit_is_refused(change, message: str):
    with pytest.raises(ValueError, match=message):
        linear_gemm(*change(*operands(17, 12, 5, (3,), torch.float32)))

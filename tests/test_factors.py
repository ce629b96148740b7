import math

import pytest
import torch
from graphs import low_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pifa_compiler.errors import RankError
from pifa_compiler.factors import (
    MAXVOL_BOUND,
    _maxvol,
    factorize,
    factorize_jointly,
    factorize_losslessly,
    numerical_rank,
    rank_for_density,
    rounding_error,
    row_order,
    stored_numbers,
)

SIZES = [(24, 16, 5), (16, 24, 16), (63, 60, 17), (8, 100, 1), (40, 40, 39)]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("pivoting", ["lu", "qr"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), SIZES)
def test_factorize_is_lossless_in_float64(d_out, d_in, rank, pivoting):
    weight = low_rank(d_out, d_in, rank, torch.float64)
    factors = factorize(weight, pivoting=pivoting)
    assert factors.rank == rank
    assert factors.shape == (d_out, d_in)
    # 1e-12: some thousand operations of eps 2e-16 on a basis whose pivot rows have a condition number below 1e3.
    assert relative(factors.dense(), weight) < 1e-12
    assert torch.equal(factors.pivots, factors.pivots.sort().values)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
def test_factorize_of_a_pair_errs_by_rounding_only(dtype, tolerance):
    """Twice eps (fp32: more, for the sum over the rank): both stored matrices are rounded once, to eps / 2 each."""
    u, v = torch.randn(63, 20), torch.randn(20, 60)
    factors = factorize((u, v), dtype=dtype)
    assert factors.w_pivot.dtype == factors.coeff.dtype == dtype
    got = torch.cat((factors.w_pivot.double(), factors.coeff.double() @ factors.w_pivot.double()))[factors.order()]
    assert relative(got, u.double() @ v.double()) < tolerance


def test_factorize_reports_what_the_factors_are():
    u, v = torch.randn(200, 40, dtype=torch.float64), torch.randn(40, 80, dtype=torch.float64)
    factors = factorize((u, v), dtype=torch.bfloat16)
    got = torch.cat((factors.w_pivot.double(), factors.coeff.double() @ factors.w_pivot.double()))[factors.order()]
    true_error = relative(got, u @ v)
    assert 0.7 * true_error < factors.quality.error < 1.4 * true_error  # 16 probes know a norm to 1 / sqrt(2 * 16)
    assert factors.quality.max_coeff == float(factors.coeff.abs().max())
    assert factors.quality.max_coeff <= MAXVOL_BOUND + 0.02  # bfloat16 rounds by 0.4%, the refit moves a little
    assert factors.quality.condition >= 1


def test_first_rows_as_pivots_would_be_worse_than_the_chosen():
    """The reason for choosing: rows that nearly depend on each other make large coefficients."""
    u = torch.randn(64, 16, dtype=torch.float64)
    u[1] = u[0] + 1e-4 * torch.randn(16)
    first = torch.linalg.solve(u[:16], u[16:], left=False).abs().max()
    chosen = factorize((u, torch.randn(16, 32, dtype=torch.float64))).coeff.abs().max()
    assert chosen < MAXVOL_BOUND + 1e-9
    assert first > 10 * chosen


def test_coefficients_make_up_for_rounded_pivot_rows_on_the_inputs_that_occur():
    torch.manual_seed(3)
    x = torch.randn(500, 64, dtype=torch.float64) * torch.logspace(0, -3, 64, dtype=torch.float64)
    u, v = torch.randn(96, 32, dtype=torch.float64), torch.randn(32, 64, dtype=torch.float64)
    exact = x @ (u @ v).T

    def error(gram: torch.Tensor | None) -> float:
        factors = factorize((u, v), dtype=torch.bfloat16, gram=gram)
        y_pivot = x @ factors.w_pivot.double().T
        y = torch.cat((y_pivot, y_pivot @ factors.coeff.double().T), dim=-1)[:, factors.order()]
        return relative(y, exact)

    assert error(x.T @ x) < error(None)


def test_a_rank_below_the_weights_own_gives_the_nearest_weight():
    weight = torch.randn(30, 20, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(weight)
    nearest = left[:, :7] * singular[:7] @ right[:7]
    assert relative(factorize(weight, rank=7).dense(), nearest) < 1e-12


def test_a_pair_of_deficient_rank_loses_the_superfluous_rows():
    u, v = torch.randn(30, 8, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)
    v[7] = v[0] - v[1]
    factors = factorize((u, v))
    assert factors.rank == 7
    assert relative(factors.dense(), u @ v) < 1e-12


def test_a_large_pair_one_rank_short_loses_the_superfluous_row():
    """V's smallest pivot in float32 is noise, 1.4e-4 of the largest; with full rank it has some 0.05."""
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((490, 489), (489, 500)))
    assert factorize((torch.randn(520, 490, dtype=torch.float64), left @ right)).rank == 489


def test_rounding_error_is_that_of_the_dense_weight():
    u, v = torch.randn(200, 40, dtype=torch.float64), torch.randn(40, 80, dtype=torch.float64)
    factors = factorize((u, v))
    w_pivot, coeff = (part.bfloat16().double() for part in (factors.w_pivot, factors.coeff))
    true_error = relative(torch.cat((w_pivot, coeff @ w_pivot))[factors.order()], u @ v)
    error = rounding_error(factors.w_pivot, factors.coeff)
    assert 0.7 * true_error < error < 1.4 * true_error  # 16 probes know a norm to 1 / sqrt(2 * 16)
    assert error > factorize((u, v), dtype=torch.bfloat16).quality.error  # whose coefficients fit the rounded rows
    assert rounding_error(w_pivot, coeff) == 0


@pytest.mark.parametrize(
    ("weight", "rank", "words"),
    [
        (torch.tensor([[1.0, math.nan]]), None, "NaN or Inf"),
        (torch.zeros(3, 4), None, "zero"),
        (torch.ones(3, 4), 0, "rank must lie in 1..3"),
        (torch.ones(0, 4), None, "is empty"),
        ((torch.ones(3, 0), torch.ones(0, 4)), None, "is empty"),
        (torch.ones(3, 4), 4, "rank must lie in 1..3"),
        (torch.ones(3), None, "floating-point matrix"),
        (torch.ones(3, 4, dtype=torch.int64), None, "floating-point matrix"),
        ((torch.ones(3, 2), torch.ones(3, 4)), None, "do not chain"),
        (
            (torch.full((3, 2), 3e3).half(), torch.full((2, 4), 3e3).half()),
            None,
            "up to 1.8e.07, do not fit into torch.f",
        ),
        (
            (torch.full((3, 2), 1e-4).half(), torch.full((2, 4), 1e-4).half()),
            None,
            "below 6.1e-05 without full precision",
        ),
        ((torch.full((3, 2), 1e-25), torch.full((2, 4), 1e-25)), None, "do not fit into torch.float32"),
        ((torch.full((3, 2), 1e-20).bfloat16(), torch.full((2, 4), 1e-20).bfloat16()), None, "into torch.bfloat16"),
        ((torch.full((3, 2), 1e-200).double() * 1e-200, torch.ones(2, 4)), None, "zero"),
        ((torch.full((3, 2), 1e-200, dtype=torch.float64),) * 2, None, "do not chain"),
        ((torch.full((3, 3), 1e-200, dtype=torch.float64),) * 2, None, "up to 0, do not fit into torch.float64"),
        ((torch.full((3, 3), 1e200, dtype=torch.float64),) * 2, None, "up to inf, do not fit into torch.float64"),
    ],
)
def test_factorize_refuses(weight, rank, words):
    with pytest.raises(RankError, match=words):
        factorize(weight, rank=rank)


def test_factorize_refuses_a_dtype_too_narrow_for_the_weight():
    with pytest.raises(
        RankError, match=r"up to 1e\+05, do not fit into torch.float16: it holds numbers up to 6.55e\+04"
    ):
        factorize(torch.full((4, 4), 1e5), dtype=torch.float16)


@pytest.mark.parametrize("scale", [5e-308, 1e-200, 1e-160, 1e150, 1e300])
def test_factorize_works_to_the_ends_of_float64(scale):
    u, v = torch.randn(20, 4, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    for weight in ((u @ v) * scale, (u * scale, v), (u * scale**0.5, v * scale**0.5), (u / scale**0.4, v * scale)):
        factors = factorize(weight)
        assert factors.rank == 4
        assert factors.quality.error < 1e-12  # as in `test_factorize_is_lossless_in_float64`


def test_zeros_beside_the_pivot_rows_are_no_reason_to_refuse():
    weight = torch.zeros(12, 9)
    weight[3:6] = torch.randn(3, 9)
    assert factorize(weight.half()).quality.error < torch.finfo(torch.float16).eps


def test_no_row_is_lost_beside_a_huge_number():
    u, v = torch.randn(20, 4), torch.randn(4, 16)
    u[5] = 0
    assert factorize_losslessly((u, v)).rank == 4
    u[7, 2] = 1e22
    for weight in ((u, v), u @ v):
        assert factorize(weight).rank == 1  # float64 sees no other
        with pytest.raises(RankError, match=r"rows of this weight .* would be lost"):
            factorize_losslessly(weight)


def check_any_weight(seed: int) -> None:
    """Factors of a random pair, well conditioned or not, are refused or within what rounding can cost."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    d_out, d_in = integer(1, 40), integer(1, 40)
    rank = integer(1, min(d_out, d_in) + 1)
    orders = 8 * float(torch.rand(1, generator=generator))  # of magnitude, between the largest and the smallest
    decays = [torch.logspace(0, -orders, n, dtype=torch.float64) for n in (d_out, rank, d_in)]
    left, between, right = (decay if integer(0, 2) else torch.ones_like(decay) for decay in decays)
    dtype = (torch.float64, torch.float32, torch.bfloat16, torch.float16)[integer(0, 4)]
    scale = 10.0 ** integer(-9, 9)
    u, v = left[:, None] * normal(d_out, rank) * between * scale, normal(rank, d_in) * right
    gram = None if integer(0, 2) else (lambda x: x.T @ x)(normal(50, d_in) * right)
    try:
        factors = factorize((u, v), dtype=dtype, gram=gram)
    except RankError as error:
        if dtype is torch.float16 and "do not fit into torch.float16" in str(error):
            return
        raise  # all others have room for these scales
    eps = torch.finfo(dtype).eps
    assert factors.quality.max_coeff <= MAXVOL_BOUND * (1 + eps), seed
    if gram is not None:
        return  # coefficients fit the inputs that it is of, and not all
    w_pivot, coeff = factors.w_pivot.double(), factors.coeff.double()
    got = torch.cat((w_pivot, coeff @ w_pivot))[factors.order()]
    # By rounding of both factors P and C: |C| |dP| + |dC| |P|, each off by eps of it at most, and 1e-12 as above.
    bound = eps * (1 + 2 * float(coeff.norm())) + 1e-12
    assert factors.quality.error <= 1.5 * bound, seed  # estimated
    assert float((got - u @ v).norm()) <= bound * float((u @ v).norm()), seed


def test_any_weight_is_within_rounding_or_refused():
    for seed in (*range(300), 561, 1553):  # where fitting to the rounded rows alone would exceed the bound
        check_any_weight(seed)


@pytest.mark.slow
def test_thousands_of_weights_are_within_rounding_or_refused():
    for seed in range(300, 8300):
        check_any_weight(seed)


def test_factorize_refuses_an_unknown_pivoting():
    with pytest.raises(RankError, match='"lu" or "qr"'):
        factorize(torch.ones(3, 4), pivoting="svd")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 30, 80, 100])
def test_numerical_rank_sees_through_the_rounding_of_the_dtype(rank, dtype):
    weight = torch.randn(120, 100) if rank == 100 else low_rank(120, 100, rank, dtype)
    assert numerical_rank(weight.to(dtype)) == rank


def test_row_order_is_the_gather_index():
    pivots = torch.tensor([1, 4, 5])
    stored = torch.tensor([1, 4, 5, 0, 2, 3])  # which output row each stored row is
    assert torch.equal(stored[row_order(pivots, 6)], torch.arange(6))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(1e-3, 1), st.sampled_from([1, 16, 32]))
def test_rank_for_density_is_the_largest_within_the_budget(d_out, d_in, density, multiple):
    try:
        rank = rank_for_density(d_out, d_in, density, multiple=multiple)
    except RankError:
        assert stored_numbers(d_out, d_in, 1) > int(density * d_out * d_in)
        return
    budget = int(density * d_out * d_in)
    assert 1 <= rank <= min(d_out, d_in)
    assert stored_numbers(d_out, d_in, rank) <= budget
    assert rank % multiple == 0 or rank < multiple
    if rank + multiple <= min(d_out, d_in) and rank >= multiple:
        assert stored_numbers(d_out, d_in, rank + multiple) > budget


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan])
def test_rank_for_density_refuses_a_density_outside_0_1(density):
    with pytest.raises(RankError, match=r"\(0, 1\]"):
        rank_for_density(10, 10, density)


def test_rank_for_density_refuses_a_budget_without_room():
    with pytest.raises(RankError, match="no room for rank 1"):
        rank_for_density(10, 10, 0.1)


@given(rows=st.integers(2, 24), rank=st.integers(1, 8), width=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_joint_factors_are_exact_and_share_one_order(rows: int, rank: int, width: int, seed: int):
    torch.manual_seed(seed)
    rank = min(rank, rows, width)
    pairs = [(torch.randn(rows, rank).double(), torch.randn(rank, width).double()) for _ in range(2)]
    first, second = factorize_jointly(pairs)
    assert torch.equal(first.order(), second.order())
    for (u, v), factors in zip(pairs, (first, second), strict=True):
        assert factors.rank == rank
        assert_close(factors.dense(), u @ v, rtol=1e-9, atol=1e-9)


def test_joint_coefficients_stay_small():
    torch.manual_seed(0)
    decay = torch.logspace(0, -4, 60).double()
    pairs = [(torch.randn(400, 60).double() * decay, torch.randn(60, 200).double()) for _ in range(2)]
    # Nothing bounds them one by one; 3 is above what was seen for any weights, the first rows give some 100.
    assert max(factors.quality.max_coeff for factors in factorize_jointly(pairs)) < 3


def test_joint_factors_lower_all_to_the_least_rank_and_refuse_other_heights():
    torch.manual_seed(0)
    small = torch.randn(12, 3).double() @ torch.randn(3, 9).double()
    large = torch.randn(12, 5).double() @ torch.randn(5, 9).double()
    assert [factors.rank for factors in factorize_jointly([large, small])] == [3, 3]
    with pytest.raises(RankError, match="must have as many rows"):
        factorize_jointly([small, torch.randn(11, 9).double()])
    upper, lower = torch.eye(8)[:, :3] @ torch.randn(3, 9), torch.eye(8)[:, 4:7] @ torch.randn(3, 9)
    with pytest.raises(RankError, match="depend on each other in another"):
        factorize_jointly([upper, lower])


@pytest.mark.parametrize(("rows", "rank"), [(30, 7), (200, 60), (90, 89), (50, 50)])
def test_swaps_in_blocks_end_where_no_single_swap_helps(rows: int, rank: int):
    torch.manual_seed(rows)
    basis = torch.linalg.qr(torch.randn(rows, rank).double()).Q
    start = torch.arange(rank)  # the first rows: many swaps to make
    pivots = _maxvol([basis], start)
    assert len(set(pivots.tolist())) == rank
    coeff = torch.linalg.solve(basis[pivots], basis, left=False)
    assert float(coeff.abs().max()) <= MAXVOL_BOUND * (1 + 1e-9)
    assert torch.linalg.slogdet(basis[pivots])[1] >= torch.linalg.slogdet(basis[start])[1]

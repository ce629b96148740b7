import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_compiler.factors import factorize
from pifa_compiler.reconstruction import regression
from pifa_compiler.reconstruction.methods import METHODS, MethodOptions
from pifa_compiler.reconstruction.regression import Regression
from pifa_compiler.reconstruction.spectra import SMALL
from pifa_compiler.reconstruction.statistics import Statistics

DOUBLE = torch.float64
DEFAULTS = MethodOptions()
SHAPES = [(SMALL, SMALL + 88), (SMALL + 88, SMALL)]


def problem(shape: tuple[int, int], power: float = 0.6, tokens: int = 1200):
    """A weight, sums over tokens with energies that fall with a power, and a sum of outputs."""
    d_out, d_in = shape

    def correlated(n: int) -> torch.Tensor:
        rows = torch.randn(tokens, n, dtype=DOUBLE) * torch.arange(1, n + 1, dtype=DOUBLE) ** -power
        return rows @ torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q

    weight, dense, gradients = torch.randn(shape, dtype=DOUBLE) / d_in**0.5, correlated(d_in), correlated(d_out)
    compressed = dense + 0.1 * dense.std() * torch.randn_like(dense)
    gram, cross = compressed.T @ compressed, dense.T @ compressed
    outputs = (dense @ weight.T + 0.1 * torch.randn(tokens, d_out, dtype=DOUBLE)).T @ compressed
    return weight, Statistics(gram, cross, gram, dense.abs().mean(dim=0), tokens), gradients.T @ gradients, outputs


def loss(found, weight, statistics, gradient_gram, outputs, options=DEFAULTS) -> tuple[float, float]:
    """What a solution loses on top of the best weight of full rank, and what the best one of its rank loses."""
    eps = options.damping * statistics.gram.diagonal().mean() * torch.eye(weight.shape[1], dtype=DOUBLE)
    root = torch.linalg.cholesky(statistics.gram + eps)
    cross = weight @ statistics.cross if outputs is None else outputs
    target = (1 - options.mix) * weight @ statistics.gram + options.mix * cross + weight @ eps
    metric = torch.eye(weight.shape[0], dtype=DOUBLE)
    if gradient_gram is not None:
        metric = gradient_gram / gradient_gram.diagonal().mean() + options.gradient_damping * metric
    left = torch.linalg.cholesky(metric).T
    whitened = torch.linalg.solve_triangular(root.T, left @ target, upper=True, left=False)
    best = float(torch.linalg.svdvals(whitened)[found.u.shape[1] :].square().sum())
    return float((whitened - left @ found.u @ (found.v @ root)).square().sum()), best


@pytest.fixture
def precisions(monkeypatch) -> list[torch.dtype]:
    """In which dtypes matrices were decomposed."""
    seen = []

    def noted(symmetric):
        seen.append(symmetric.dtype)
        return original(symmetric)

    original = regression.eigenpairs
    monkeypatch.setattr(regression, "eigenpairs", noted)
    return seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_large_weights_are_solved_in_float32_and_lose_no_more_than_the_best(shape, drift, weighted, precisions):
    weight, statistics, gradient_gram, outputs = problem(shape)
    known = {"output_cross": outputs if drift else None, "gradient_gram": gradient_gram if weighted else None}
    found = METHODS["two-sided"].prepare(statistics, DEFAULTS)(weight, 200, **known)
    assert found.u.dtype == found.v.dtype == DOUBLE
    assert precisions == [torch.float32]
    lost, best = loss(found, weight, statistics, known["gradient_gram"], known["output_cross"])
    assert best < lost * (1 + 1e-9)
    assert lost < best * (1 + 1e-4)  # what EXCESS keeps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_float32_does_not_do_float64_takes_over(shape, precisions):
    weight, statistics, gradient_gram, outputs = problem(shape, power=3.0)
    options = MethodOptions(damping=1e-9, gradient_damping=1e-9)
    found = METHODS["two-sided"].prepare(statistics, options)(
        weight, 400, output_cross=outputs, gradient_gram=gradient_gram
    )
    assert precisions == [torch.float32, DOUBLE]
    lost, best = loss(found, weight, statistics, gradient_gram, outputs, options)
    assert lost < best * (1 + 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operator_of_the_check_is_the_matrix(shape):
    weight, statistics, gradient_gram, outputs = problem((shape[0] // 8, shape[1] // 8))
    solver = Regression(statistics, mix=0.25, damping=1e-3)
    for cross in (None, outputs):
        target = regression._Target(solver, weight, cross)
        for side in (regression._Inputs, regression._Outputs):
            for gram in (None, gradient_gram):
                whole = side(target, gram, 1e-2)
                matrix = whole.squared(target.matrix(DOUBLE))
                torch.testing.assert_close(whole.apply_squared(torch.eye(len(matrix), dtype=DOUBLE)), matrix)


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), *SHAPES], ids=str)
@pytest.mark.parametrize("defect", ["rank 1 inputs", "rank 1 gradients", "zero inputs", "zero gradients", "outlier"])
def test_defective_sums_give_finite_factors(shape, defect):
    weight, statistics, gradient_gram, outputs = problem(shape, tokens=30)
    gram, cross = statistics.gram, statistics.cross
    if defect == "rank 1 inputs":
        gram = cross = torch.ones_like(gram)
    elif defect == "zero inputs":
        gram, cross, outputs = torch.zeros_like(gram), torch.zeros_like(cross), torch.zeros_like(outputs)
    elif defect == "rank 1 gradients":
        gradient_gram = torch.ones_like(gradient_gram)
    elif defect == "zero gradients":
        gradient_gram = torch.zeros_like(gradient_gram)
    else:  # a channel 1e4 times the others, summed from bfloat16
        scale = torch.ones(shape[1], dtype=DOUBLE).index_fill_(0, torch.tensor(3), 1e4)
        gram, cross, outputs = (scale[:, None] * gram * scale), (scale[:, None] * cross * scale), outputs * scale
        gram = cross = gram.bfloat16().double()
    statistics = Statistics(gram, cross, gram, statistics.mean_abs, statistics.tokens)
    for damping in (1e-3, 0.0):
        solve = METHODS["two-sided"].prepare(statistics, MethodOptions(damping=damping))
        for given_outputs in (outputs, None):
            found = solve(weight, 8, output_cross=given_outputs, gradient_gram=gradient_gram)
            assert torch.isfinite(found.u).all()
            assert torch.isfinite(found.v).all()


@pytest.mark.parametrize("shape", [(24, 20), SHAPES[0]], ids=str)
@pytest.mark.parametrize("inputs", [1e30, 1e-30], ids=str)
@pytest.mark.parametrize("gradients", [1e30, 1e-30], ids=str)
def test_the_scale_of_sums_does_not_matter(shape, inputs, gradients):
    weight, statistics, gradient_gram, outputs = problem(shape)
    grown = Statistics(
        statistics.gram * inputs,
        None if statistics.cross is None else statistics.cross * inputs,
        statistics.gram,
        statistics.mean_abs,
        statistics.tokens,
    )
    for cross in (outputs, None):
        wanted = METHODS["two-sided"].prepare(statistics, DEFAULTS)(
            weight, 8, output_cross=cross, gradient_gram=gradient_gram
        )
        found = METHODS["two-sided"].prepare(grown, DEFAULTS)(
            weight,
            8,
            output_cross=None if cross is None else cross * inputs,
            gradient_gram=(gradient_gram * gradients).float(),
        )
        # float32: the matrix of gradients is rounded, and large weights are solved in it.
        assert (found.u @ found.v - wanted.u @ wanted.v).norm() < 1e-3 * (wanted.u @ wanted.v).norm()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6), st.sampled_from([1e-12, 1.0, 1e12]), st.data())
def test_no_weight_of_the_rank_is_better(d_out, d_in, seed, size, data):
    torch.manual_seed(seed)
    weight, statistics, gradient_gram, outputs = problem((d_out, d_in), tokens=40)
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    found = METHODS["two-sided"].prepare(statistics, DEFAULTS)(
        weight * size, rank, output_cross=outputs * size, gradient_gram=gradient_gram
    )
    lost, best = loss(found, weight * size, statistics, gradient_gram, outputs * size)
    total = float((weight * size).square().sum() * statistics.gram.trace())
    assert lost == pytest.approx(best, rel=1e-9, abs=1e-12 * total)


@pytest.mark.parametrize("shape", [(24, 20), SHAPES[1]], ids=str)
def test_a_rank_that_the_weight_does_not_have_is_lowered(shape):
    _, statistics, gradient_gram, _ = problem(shape)
    weight = torch.randn(shape[0], 5, dtype=DOUBLE) @ torch.randn(5, shape[1], dtype=DOUBLE)
    found = METHODS["two-sided"].prepare(statistics, DEFAULTS)(weight, 9, gradient_gram=gradient_gram)
    factors = factorize((found.u, found.v), rank=9)
    assert factors.rank == 5


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)], ids=str)
def test_gradients_that_are_zero_weigh_all_errors_alike(shape):
    weight, statistics, gradient_gram, _ = problem(shape)
    solve = METHODS["two-sided"].prepare(statistics, MethodOptions(gradient_damping=0))
    wanted, found = solve(weight, 8), solve(weight, 8, gradient_gram=torch.zeros_like(gradient_gram))
    assert torch.equal(found.u @ found.v, wanted.u @ wanted.v)


def test_the_default_dtype_does_not_matter():
    weight, statistics, gradient_gram, outputs = problem((24, 20))
    solve = METHODS["two-sided"].prepare(statistics, DEFAULTS)
    wanted = solve(weight, 8, output_cross=outputs, gradient_gram=gradient_gram)
    torch.set_default_dtype(torch.float16)
    try:
        found = METHODS["two-sided"].prepare(statistics, DEFAULTS)(
            weight, 8, output_cross=outputs, gradient_gram=gradient_gram
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.u, wanted.u)
    assert torch.equal(found.v, wanted.v)

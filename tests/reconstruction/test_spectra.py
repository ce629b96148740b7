import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_compiler.reconstruction.spectra import SMALL, eigenpairs, excess_loss, scaled, squared_singular_values

DOUBLE = torch.float64


def falling_gram(n: int, power: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of 4 n tokens whose energy falls with a power, as that of real activations does."""
    rows = torch.randn(4 * n, n, dtype=DOUBLE) * torch.arange(1, n + 1, dtype=DOUBLE) ** (-power / 2)
    rows = rows @ torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE)).Q
    return (rows.T @ rows).to(dtype)


def by_svd(weight: torch.Tensor, gram: torch.Tensor | None, gradient_gram: torch.Tensor | None) -> torch.Tensor:
    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix.double())
        return vectors * values.clamp(min=0).sqrt()

    weighted = weight.double()
    if gram is not None:
        weighted = weighted @ root(gram)
    if gradient_gram is not None:
        weighted = root(gradient_gram).T @ weighted
    return torch.linalg.svdvals(weighted).square()


def tail_sums(squared: torch.Tensor) -> torch.Tensor:
    return squared.flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
@pytest.mark.parametrize("given_grams", [(True, True), (True, False), (False, True), (False, False)])
def test_squared_singular_values_are_those_of_the_weighted_weight(shape, given_grams):
    grams = [falling_gram(n) if is_given else None for is_given, n in zip(given_grams, shape[::-1], strict=True)]
    weight = torch.randn(shape)
    torch.testing.assert_close(squared_singular_values(weight, *grams), by_svd(weight, *grams))


@pytest.mark.parametrize("shape", [(SMALL, SMALL + 88), (SMALL + 88, SMALL)])
def test_products_in_float32_leave_the_sums_past_a_rank(shape):
    weight, gram, gradient_gram = torch.randn(shape), falling_gram(shape[1]), falling_gram(shape[0])
    found = tail_sums(squared_singular_values(weight, gram, gradient_gram))
    wanted = tail_sums(by_svd(weight, gram, gradient_gram))
    # At three quarters of the ranks 4e-5 of the sum is left: noise of 2^-24 in products of that size.
    torch.testing.assert_close(found[:384], wanted[:384], rtol=1e-4, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-20, 20))
def test_squared_singular_values_scale_with_all_three(gram_size, gradient_size, weight_size):
    weight, gram, gradient_gram = torch.eye(6) + torch.ones(6, 6), falling_gram(6), falling_gram(6)
    sizes = [10**size for size in (2 * weight_size, gram_size, gradient_size)]
    found = squared_singular_values(10**weight_size * weight, 10**gram_size * gram, 10**gradient_size * gradient_gram)
    wanted = squared_singular_values(weight, gram, gradient_gram)
    torch.testing.assert_close(found / sizes[0] / sizes[1] / sizes[2], wanted, rtol=1e-3, atol=0)  # float32 inputs


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (SMALL, SMALL)])
def test_a_singular_gram_matrix_has_singular_values_that_vanish(shape):
    few = torch.randn(5, shape[1])
    found = squared_singular_values(torch.randn(shape), few.T @ few, falling_gram(shape[0]))
    assert torch.isfinite(found).all()
    assert float(found[5:].sum()) < 1e-3 * float(found.sum())
    assert float(squared_singular_values(torch.zeros(shape), few.T @ few).abs().max()) == 0
    assert float(squared_singular_values(torch.randn(shape), torch.zeros(shape[1], shape[1])).abs().max()) == 0


def test_scaled_has_a_mean_square_of_1_whatever_the_size():
    for size in (1e-200, 1e-30, 1.0, 1e30, 1e200):
        matrix = size * torch.randn(6, 4, dtype=DOUBLE)
        found, factor = scaled(matrix)
        assert float(found.square().mean()) == pytest.approx(1)
        torch.testing.assert_close(found * factor, matrix)
    assert torch.equal(scaled(torch.zeros(3, 2))[0], torch.zeros(3, 2, dtype=DOUBLE))


def test_eigenpairs_in_float32_are_precise_where_the_largest_value_is_a_million_times_the_others():
    exact = falling_gram(256, dtype=DOUBLE)
    spike = torch.nn.functional.normalize(torch.randn(256, 1, dtype=DOUBLE), dim=0)
    exact += 1e6 * exact.diagonal().mean() * spike @ spike.T
    exact = (exact + exact.T) / 2
    values, vectors = eigenpairs(exact.float())
    assert values.dtype == vectors.dtype == DOUBLE
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(256, dtype=DOUBLE), rtol=0, atol=1e-5)
    assert float((vectors[:, -1] @ vectors[:, :-1]).abs().max()) < 1e-12  # what is left of the largest costs most
    wanted = torch.linalg.eigvalsh(exact.float().double())
    torch.testing.assert_close(values[:128].sum(), wanted[:128].sum(), rtol=1e-5, atol=0)
    # What LAPACK makes of it in float32 is off by much more.
    plain = torch.linalg.eigvalsh(exact.float()).double()
    assert abs(float(plain[:128].sum() / wanted[:128].sum()) - 1) > 1e-3


def test_eigenpairs_in_float32_of_a_matrix_of_low_rank_are_a_basis():
    rows = torch.randn(40, 256, dtype=DOUBLE) * torch.logspace(0, -3, 40, dtype=DOUBLE)[:, None]
    values, vectors = eigenpairs((rows.T @ rows).float())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(256, dtype=DOUBLE), rtol=0, atol=1e-5)
    assert float(values[:216].abs().max()) < 1e-5 * float(values[-1])


def test_a_loss_that_may_be_noise_alone_is_no_loss_to_compare_with():
    exact = torch.randn(96, 5, dtype=DOUBLE)
    exact, noise = exact @ exact.T, 1e-7 * torch.randn(96, 96, dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(exact + noise @ noise.T / 1e-7)
    assert excess_loss(lambda z: exact @ z, values, vectors, 5) == float("inf")


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3])
def test_the_excess_of_a_truncation_along_noisy_vectors_is_found_within_a_factor_of_5(noise):
    exact, rank = falling_gram(192, dtype=DOUBLE), 96
    disturbance = torch.randn(192, 192, dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(exact + noise * exact.diagonal().mean() * (disturbance + disturbance.T))
    kept = vectors[:, -rank:]
    least = float(torch.linalg.eigvalsh(exact)[:-rank].sum())
    actual = float(exact.trace() - (kept.T @ exact @ kept).trace()) / least - 1
    found = excess_loss(lambda z: exact @ z, values, vectors, rank)
    assert actual / 5 - 1e-12 < found < 5 * actual + 1e-12  # float64 knows the actual excess to about 1e-12
    assert excess_loss(lambda z: exact @ z, values, vectors, 192) == 0

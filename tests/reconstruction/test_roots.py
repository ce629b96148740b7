import pytest
import torch

from pifa_compiler.reconstruction.roots import Root, congruence, damped_root, gram_root

DOUBLE = torch.float64


def positive(n: int) -> torch.Tensor:
    matrix = torch.randn(n, n + 5, dtype=DOUBLE)
    return matrix @ matrix.T


def eigen_root(gram: torch.Tensor) -> Root:
    values, vectors = torch.linalg.eigh(gram)
    return Root(vectors, values.sqrt())


@pytest.mark.parametrize("n", [20, 513], ids=["small", "more than a block"])
@pytest.mark.parametrize("make", [lambda gram: gram_root(gram, 30), eigen_root], ids=["triangle", "eigenvectors"])
def test_products_and_quotients_are_those_with_the_root(make, n):
    gram = positive(n)
    root, matrix = make(gram), torch.randn(3, n, dtype=DOUBLE)
    dense = root.matrix()
    torch.testing.assert_close(dense @ dense.T, gram)
    torch.testing.assert_close(root.times(matrix), matrix @ dense)
    torch.testing.assert_close(root.times_transposed(matrix), matrix @ dense.T)
    torch.testing.assert_close(root.divided(matrix) @ dense, matrix)
    torch.testing.assert_close(root.divided_transposed(matrix) @ dense.T, matrix)
    assert root.notes == ()
    torch.testing.assert_close(
        root.to(torch.float32).times(matrix.float()).double(), matrix @ dense, rtol=1e-4, atol=1e-3
    )


def test_quotients_are_zero_where_nothing_was_seen():
    rows = torch.randn(4, 10, dtype=DOUBLE)
    root = gram_root(rows.T @ rows, 4)
    assert "rank 4 of 10 channels from 4 tokens" in root.notes[0]
    torch.testing.assert_close(root.matrix() @ root.matrix().T, rows.T @ rows)
    inverse = root.divided(root.divided_transposed(torch.eye(10, dtype=DOUBLE)))
    torch.testing.assert_close(inverse, torch.linalg.pinv(rows.T @ rows))


def test_the_clamped_root_is_the_root_of_what_is_positive():
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    values = torch.tensor([3.0, 1.0, 0.5, 0.0, -1e-4, -1e-3], dtype=DOUBLE)
    found = damped_root(vectors * values @ vectors.T, 1e-6)
    wanted = vectors * (values.clamp(min=0) + 1e-6) @ vectors.T
    torch.testing.assert_close(found.matrix() @ found.matrix().T, wanted, rtol=0, atol=1e-12)
    eye = torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(found.divided(found.matrix()), eye, rtol=0, atol=1e-9)  # condition number 2e3, float64


@pytest.mark.parametrize("n", [7, 1100])
def test_congruence_is_the_product_from_both_sides(n):
    matrix, gram = torch.randn(n, 5, dtype=DOUBLE), positive(n)
    found = congruence(matrix, gram, size=2.0, damping=0.1)
    torch.testing.assert_close(found, matrix.T @ (gram / 2 + 0.1 * torch.eye(n, dtype=DOUBLE)) @ matrix)
    assert torch.equal(found, found.T)
    assert congruence(matrix.float(), gram).dtype == torch.float32

import pytest
import torch

from pifa_compiler.errors import RankError
from pifa_compiler.reconstruction.pruning import PRUNERS, sparsegpt, wanda


def problem(d_out: int = 6, d_in: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    weight, x = torch.randn(d_out, d_in), torch.randn(200, d_in) @ torch.randn(d_in, d_in)
    return weight, x.T @ x


@pytest.mark.parametrize("name", PRUNERS)
def test_two_of_every_four_are_kept(name):
    weight, gram = problem()
    pruned = PRUNERS[name](weight, gram)
    assert ((pruned != 0).reshape(6, -1, 4).sum(dim=2) == 2).all()
    assert pruned.dtype == weight.dtype


def test_wanda_keeps_what_is_large_in_weight_times_input_norm():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert wanda(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))).tolist() == [[1.0, 0.0, 0.0, 4.0]]


def textbook_sparsegpt(row: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """One row by optimal brain surgery: each column in turn, the inverse of what is left of H taken anew."""
    row = row.double().clone()
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(row), dtype=torch.float64)
    keep: list[int] = []
    for j in range(len(row)):
        if j % 4 == 0:
            scores = [row[j + k] ** 2 / torch.linalg.inv(hessian[j + k :, j + k :])[0, 0] for k in range(4)]
            keep = [j + k for k in sorted(range(4), key=lambda k: -scores[k])[:2]]
        if j not in keep:
            inverse = torch.linalg.inv(hessian[j:, j:])
            row[j:] = row[j:] - row[j] / inverse[0, 0] * inverse[0]
            row[j] = 0
    return row


def test_sparsegpt_is_column_by_column_surgery():
    weight, gram = problem()
    pruned = sparsegpt(weight, gram, block=8)
    wanted = torch.stack([textbook_sparsegpt(row, gram) for row in weight])
    torch.testing.assert_close(pruned.double(), wanted, rtol=1e-3, atol=1e-3)


def test_sparsegpt_loses_less_than_wanda_on_the_inputs():
    weight, gram = problem(32, 64)
    lost = {}
    for name, prune in PRUNERS.items():
        difference = prune(weight, gram) - weight
        lost[name] = float((difference @ gram * difference).sum())
    assert lost["sparsegpt-2:4"] < 0.8 * lost["wanda-2:4"]


def test_dead_channels_are_pruned_and_do_not_crash():
    weight, gram = problem()
    gram[3] = gram[:, 3] = 0
    assert torch.isfinite(sparsegpt(weight, gram)).all()


@pytest.mark.parametrize("name", PRUNERS)
def test_inputs_that_are_no_multiple_of_four_are_refused(name):
    with pytest.raises(RankError, match="multiple of 4"):
        PRUNERS[name](torch.randn(4, 6), torch.eye(6))

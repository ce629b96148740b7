"""The losses against their definitions, in float64, gradients included."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pifa_compiler.distillation.losses import TopK, divergence, relative_error

ROWS, VOCABULARY = 70, 50  # more rows than are computed at once on a CPU, and no multiple of them


@pytest.fixture
def z() -> Tensor:
    return (3 * torch.randn(ROWS, VOCABULARY, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def target() -> Tensor:
    return 3 * torch.randn(ROWS, VOCABULARY, dtype=torch.float64)


def kl(z: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    log_q, log_p = ((each / temperature).log_softmax(dim=1) for each in (z, target))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def assert_same(found: Tensor, wanted: Tensor, z: Tensor) -> None:
    torch.testing.assert_close(found, wanted)
    got, right = (torch.autograd.grad(2 * each, z, retain_graph=True)[0] for each in (found, wanted))
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_divergence_is_what_it_says(z: Tensor, target: Tensor, temperature: float, share: float) -> None:
    weights = torch.rand(ROWS)
    weights[5] = 0
    text = torch.randint(0, VOCABULARY, (ROWS,))
    text[3] = -1
    found = divergence(z, target, weights, temperature=temperature, text=text, text_share=share)
    entropy = F.cross_entropy(z, text, reduction="none", ignore_index=-1)
    each = (1 - share) * temperature**2 * kl(z, target, temperature) + share * entropy
    assert_same(found, (weights.double() * each).sum(), z)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_the_likeliest_tokens_all_others_count_as_one(z: Tensor, target: Tensor, temperature: float) -> None:
    known = TopK.of_logits(target, 7, temperature)
    at = known.tokens.long()
    p = known.log_probabilities.double().softmax(dim=1)
    q = (z / temperature).softmax(dim=1).gather(1, at)
    q = torch.cat((q, 1 - q.sum(dim=1, keepdim=True)), dim=1)
    wanted = temperature**2 * (p * (p / q).log()).sum()
    assert_same(divergence(z, known, torch.ones(ROWS), temperature=temperature), wanted, z)
    # Fewer events tell less: the divergence over them is at most that over all tokens.
    assert 0 < wanted.item() < temperature**2 * kl(z, target, temperature).sum().item()


def test_with_all_tokens_known_it_is_the_divergence_itself(z: Tensor, target: Tensor) -> None:
    found = divergence(z, TopK.of_logits(target, VOCABULARY, 1.0), torch.ones(ROWS))
    # log-probabilities are kept in float16: half a unit in the last of 11 bits, at most of 16.
    torch.testing.assert_close(found, kl(z, target).sum(), rtol=0, atol=ROWS * 16 * 2**-11)


def test_tokens_that_the_teacher_rules_out_cost_nothing(z: Tensor, target: Tensor) -> None:
    target[:, ::2] = -torch.inf
    found = divergence(z, target, torch.ones(ROWS))
    log_p = target[:, 1::2].log_softmax(dim=1)
    wanted = (log_p.exp() * (log_p - z.log_softmax(dim=1)[:, 1::2])).sum()
    assert_same(found, wanted, z)


def test_the_gradient_has_the_dtype_of_the_logits(target: Tensor) -> None:
    z = torch.randn(ROWS, VOCABULARY).bfloat16().requires_grad_()
    divergence(z, target.bfloat16(), torch.ones(ROWS)).backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
    exact = z.detach().double().requires_grad_()
    kl(exact, target.bfloat16().double()).sum().backward()
    assert exact.grad is not None
    # Rounded once: half a unit in the last of 8 bits.
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_relative_error_is_a_share_of_the_teachers_square() -> None:
    target, weights = torch.randn(6, 4), torch.tensor([1.0, 1, 0, 1, 1, 1])
    counted = weights > 0
    found = relative_error(1.5 * target, target, weights / 5)
    assert float(found) == pytest.approx(0.25)
    assert float(relative_error(torch.where(counted[:, None], target, 9.0), target, weights)) == 0

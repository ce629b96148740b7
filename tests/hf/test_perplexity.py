import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn

from pifa_compiler.errors import CalibrationError, ConfigError
from pifa_compiler.hf.perplexity import perplexity


def textbook_perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """Token by token in float64, from the definition: exp(-mean log p(token | the tokens before it))."""
    logs = []
    for window in windows:
        scores = model.double()(window).logits[0].detach()
        for i in range(1, window.shape[1]):
            row = scores[i - 1] - scores[i - 1].max()
            logs.append(float(row[window[0, i]]) - math.log(sum(math.exp(v) for v in row.tolist())))
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize("seqlen", [2, 7, 64])
def test_perplexity_is_the_textbook_one(seqlen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pifa_compiler.hf.perplexity._ROWS", 5)  # several chunks, the last one shorter
    model = tiny_llama()
    windows = [torch.randint(0, 64, (1, seqlen)) for _ in range(3)]
    result = perplexity(model, windows)
    assert (result.tokens, result.windows, result.seqlen) == (3 * (seqlen - 1), 3, seqlen)
    # float32 rounding of a mean logarithm of about 5
    assert result.perplexity == pytest.approx(textbook_perplexity(model, windows), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    uniform = nn.Embedding.from_pretrained(torch.zeros(50, 50))
    assert perplexity(uniform, [torch.randint(0, 50, (1, 9))]).perplexity == pytest.approx(50)


def test_the_next_token_is_predicted_and_not_the_same_one() -> None:
    follows = torch.full((10, 10), -50.0)
    follows[torch.arange(10), (torch.arange(10) + 1) % 10] = 50.0
    knows_successor = nn.Embedding.from_pretrained(follows)
    assert perplexity(knows_successor, [torch.arange(10)[None]]).perplexity == pytest.approx(1)


def test_half_precision_logits_are_summed_in_float32() -> None:
    table = torch.randn(64, 64).bfloat16()
    window = torch.randint(0, 64, (1, 600))
    half, single = nn.Embedding.from_pretrained(table), nn.Embedding.from_pretrained(table.float())
    assert perplexity(half, [window]) == perplexity(single, [window])


def test_perplexity_takes_tuples_reports_progress_and_restores_the_mode() -> None:
    class Tupled(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor]:
            assert not self.training
            return (torch.zeros(*ids.shape, 4),)

    model, seen = Tupled().train(), []
    perplexity(model, [torch.zeros(1, 3, dtype=torch.int64)] * 2, lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]
    assert model.training


def test_no_key_value_cache_is_built() -> None:
    class Cached(nn.Module):
        config = SimpleNamespace(use_cache=True)

        def forward(self, ids: Tensor, use_cache: bool = True) -> Tensor:
            assert not use_cache
            return torch.zeros(*ids.shape, 4)

    perplexity(Cached(), [torch.zeros(1, 3, dtype=torch.int64)])


def test_logits_that_are_not_finite_are_refused_naming_the_window() -> None:
    model = tiny_llama()
    good, bad = torch.full((1, 8), 5), torch.full((1, 8), 6)
    with torch.no_grad():
        model.model.embed_tokens.weight[6] = torch.nan
    with pytest.raises(CalibrationError, match="window 1 of 2"):  # the head is tied: NaN reaches every softmax
        perplexity(model, [good, bad])


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [torch.zeros(1, 1, dtype=torch.int64)],
        [torch.zeros(2, 4, dtype=torch.int64)],
        [torch.zeros(4, dtype=torch.int64)],
        [torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)],
    ],
    ids=["none", "one token", "batch", "flat", "mixed"],
)
def test_windows_of_the_wrong_shape_are_refused(windows: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="windows of one shape"):
        perplexity(tiny_llama(), windows)

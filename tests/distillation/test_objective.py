"""What is compared of models is told by what they do."""

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from pifa_compiler.distillation.config import DistillConfig
from pifa_compiler.distillation.objective import Call, HiddenStates, Predictions, predicts_next_token
from pifa_compiler.errors import CalibrationError

IDS = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


class Causal(nn.Module):
    """Logits of a running mean of embeddings; given as a tensor, and called by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embedding(tokens).cumsum(dim=1))
        return found


@pytest.mark.parametrize(
    ("model", "batch", "wanted"),
    [
        (tiny_llama(), IDS, True),
        (tiny_llama(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, True),
        (Causal(), (IDS,), True),
        (BertForMaskedLM(BertConfig(**BERT)).eval(), IDS, False),
        (BertModel(BertConfig(**BERT)).eval(), IDS, False),
        (nn.Linear(8, 8), torch.randn(2, 8), False),
    ],
    ids=["llama", "llama with a mask", "a module", "masked", "encoder", "no tokens"],
)
@torch.no_grad()
def test_models_that_predict_the_next_token_are_known(model: nn.Module, batch: object, wanted: bool) -> None:
    assert predicts_next_token(model, Call.of_batch(model, batch)) is wanted  # type: ignore[arg-type]


@torch.no_grad()
def test_padding_does_not_count() -> None:
    model, teacher = tiny_llama(), tiny_llama(initializer_range=0.1)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    calls = [Call.of_batch(model, {"input_ids": ids, "attention_mask": mask}) for ids in (IDS, IDS * mask)]
    for share in (0.0, 0.5):
        objective = Predictions(DistillConfig(steps=1, text_share=share))
        assert objective.count(calls[0]) == 16
        with_text, without = (
            objective.loss(objective.output(model, call), objective.output(teacher, call), call, 1.0) for call in calls
        )
        torch.testing.assert_close(with_text, without)


@torch.no_grad()
def test_hidden_states_are_found_where_models_have_them() -> None:
    objective = HiddenStates()
    encoder, masked = BertModel(BertConfig(**BERT)).eval(), BertForMaskedLM(BertConfig(**BERT)).eval()
    call = Call.of_batch(encoder, IDS)
    torch.testing.assert_close(objective.output(encoder, call), encoder(IDS).last_hidden_state.flatten(0, 1))
    assert objective.output(masked, call).shape == (20, 16)
    linear = nn.Linear(8, 4)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(objective.output(linear, Call.of_batch(linear, x)), linear(x).flatten(0, 1))


def test_a_model_without_hidden_states_is_refused() -> None:
    class Scalar(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    model = Scalar()
    with pytest.raises(CalibrationError, match="Scalar gives neither a tensor nor last_hidden_state"):
        HiddenStates().output(model, Call.of_batch(model, torch.ones(2)))

import pytest
import torch
from torch import nn

from pifa_compiler.errors import CaptureError
from pifa_compiler.hf import generate as cli_generate
from pifa_compiler.hf.generate import generate

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
OTHERS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
}


def model_of(kind: str) -> nn.Module:
    """A tiny random model; the sliding windows hold fewer tokens than the tests write."""
    torch.manual_seed(0)
    windows = {"Gemma2": 8, "Gemma3": 8, "Mistral": 8}
    options = {**SMALL, **OTHERS, **({"sliding_window": windows[kind]} if kind in windows else {})}
    if kind == "Gemma3":
        options["layer_types"] = ["sliding_attention", "full_attention"]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(**options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Counted:
    """A backend that runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(
    ("kind", "prompt_length"),
    [("Gemma3", 5), ("Gemma3", 12), ("Gemma2", 5), ("Mistral", 5), ("Mistral", 12), ("Llama", 5)],
)
def test_one_graph_writes_all_tokens_as_the_eager_model_does(kind: str, prompt_length: int):
    model, prompt, backend = model_of(kind), torch.randint(3, 96, (1, prompt_length)), Counted()
    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, dynamic=False)
    written = generate(model, prompt, 14, step=step, stop=False).tokens
    assert backend.graphs == 1
    assert written == generate(model, prompt, 14, stop=False).tokens
    assert len(set(written)) > 1


def test_a_model_that_needs_a_graph_for_every_token_is_refused(monkeypatch: pytest.MonkeyPatch):
    """transformers' own cache of a sliding window guards on the number of tokens in it."""
    model, prompt, backend = model_of("Gemma3"), torch.randint(3, 96, (1, 5)), Counted()
    config = model.config.get_text_config(decoder=True)
    monkeypatch.setattr(
        cli_generate, "static_cache", lambda model, length: transformers.StaticCache(config, max_cache_len=length)
    )
    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, dynamic=False)
    with pytest.raises(CaptureError, match=r"new graph for every token \(4 so far\).*run without --compile"):
        generate(model, prompt, 40, step=step, stop=False)
    assert backend.graphs == 4

import json

import pytest
import torch
from torch import nn

import pifa_compiler as pc
from pifa_compiler.cli.tables import summary
from pifa_compiler.errors import CheckpointError


class Mixed(nn.Module):
    """Experts in one 3-D parameter, a convolution, a norm, buffers and an embedding around two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.norm = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.randn(4, 8, 8))
        self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.same = self.norm

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        h = torch.einsum("btc,ecd->btd", h, self.experts.gate_up)
        return self.out(self.fc(h).relu())


def test_everything_that_holds_numbers_is_in_the_report_once():
    model = Mixed()
    total = sum(parameter.numel() for parameter in model.parameters())
    report = pc.compress(model, [torch.randint(0, 10, (4, 9))], pc.CompressConfig(ranks={"*": 3}, gradients=False))
    assert [layer.name for layer in report.layers] == ["fc", "out"]
    found = {other.name: other for other in report.others}
    assert {name: (other.kind, other.numbers, other.buffered) for name, other in found.items()} == {
        "embed": ("Embedding", 80, 0),
        "conv": ("Conv1d", 200, 0),
        "norm": ("BatchNorm1d", 16, 17),
        "experts": ("Module", 256, 0),
    }
    assert found["experts"].shapes == {"gate_up": (4, 8, 8)}
    bias = 16
    assert sum(other.numbers for other in report.others) + bias + 2 * 128 == total == report.params_before
    assert report.untouched == 80 + 200 + 16 + 256 + bias
    assert report.model_density == report.params_after / total
    assert report.density < 0.6 < 0.8 < report.model_density
    assert json.loads(json.dumps(report.to_dict()))["model_density"] == report.model_density
    assert [other["name"] for other in report.to_dict()["others"]] == ["embed", "conv", "norm", "experts"]


def test_a_mixture_of_experts_says_how_much_of_it_is_untouched(tmp_path, capsys: pytest.CaptureFixture[str]):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        num_local_experts=8,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    experts = 2 * 8 * 3 * 64 * 64
    config = pc.CompressConfig(density=0.5, rank_multiple=1, skip=("*.experts.*",))
    report = pc.compress(model, [torch.randint(3, 32, (2, 16))], config)
    assert report.density <= 0.5
    assert report.untouched_by_kind["MixtralExperts"] == experts
    assert report.untouched > 0.75 * report.params_before
    assert report.model_density > 0.9
    share = f"({report.untouched / report.params_before:.0%} of the model) are as they were; beside linear layers"
    summary(report, tmp_path, "pydoc", "cpu")
    for text in (str(report), capsys.readouterr().out):
        assert share in text
        assert f"{experts:,} in MixtralExperts" in text
        assert f"{report.model_density:.4f} of the whole model" in text


def test_compact_reports_the_rest_as_well():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 24)), nn.LayerNorm(24))
    report = pc.compact(model)
    assert [(other.name, other.kind, other.numbers) for other in report.others] == [("1", "LayerNorm", 48)]
    assert report.untouched == 48 + 24
    assert report.model_density == report.params_after / report.params_before < 1


def test_a_tied_embedding_is_counted_with_the_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    report = pc.compress(model, [torch.randint(3, 32, (2, 12))], pc.CompressConfig(density=0.6, rank_multiple=1))
    numbers = sum(other.numbers for other in report.others)
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") and ".ln_" not in name)
    assert numbers + biases + sum(layer.stored_after for layer in report.layers) == report.params_after


def test_reports_of_older_versions_are_read_and_what_is_none_is_refused():
    values = pc.compress(Mixed(), [torch.randint(0, 10, (4, 9))], pc.CompressConfig(density=0.6)).to_dict()
    older = {key: value for key, value in values.items() if key not in ("planned_bytes", "distillation")}
    assert pc.Report.from_dict(older).to_dict() == {**values, "planned_bytes": 0}
    for damaged in ({}, {**values, "layers": 3}, {**values, "others": [{"shapes": None}]}, {**values, "notes": None}):
        with pytest.raises(CheckpointError, match="what a report should be is none"):
            pc.Report.from_dict(damaged)

import pytest
import torch
from expert_models import EXPERTS, tiny_mixtral
from graphs import low_rank
from torch import nn

import pifa_compiler as pc
from pifa_compiler.compact import _capture
from pifa_compiler.errors import CaptureError
from pifa_compiler.report import Report


class Pair(nn.Module):
    """A low-rank layer as published codes write it: U(V(x)) with a bias behind."""

    def __init__(self, d_out: int, d_in: int, rank: int, bias: bool = True, middle_bias: bool = False) -> None:
        super().__init__()
        self.ALinear = nn.Linear(rank, d_out, bias=bias)
        self.BLinear = nn.Linear(d_in, rank, bias=middle_bias)

    def forward(self, x):
        return self.ALinear(self.BLinear(x))


class Attention(nn.Module):
    """Pairs as SVD-LLM writes them: the two linears are children of the attention, with other work around them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_v_proj, self.q_u_proj = nn.Linear(32, 6, bias=False), nn.Linear(6, 24)
        self.out = nn.Linear(24, 32)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q_u_proj(self.q_v_proj(x))))


def assert_same(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)  # lossless up to float32 rounding


def test_chains_become_one_layer():
    model = nn.Sequential(Pair(48, 32, 7), nn.ReLU(), nn.Sequential(nn.Linear(48, 5, bias=False), nn.Linear(5, 40)))
    x = torch.randn(6, 32)
    wanted = model(x)
    report = pc.compact(model)
    assert [type(layer) for layer in model] == [pc.PifaLinear, nn.ReLU, pc.PifaLinear]
    assert_same(model, x, wanted)
    assert [(layer.name, layer.rank) for layer in report.factorized] == [("0", 7), ("2", 5)]
    assert report.layers[0].stored_before == 7 * (48 + 32)
    assert report.layers[0].stored_after < report.layers[0].stored_before
    assert report.params_after < report.params_before


def test_pairs_that_only_the_graph_shows():
    model, x = Attention(), torch.randn(2, 5, 32)
    wanted = model(x)
    report = pc.compact(model, example=x)
    assert [layer.name for layer in report.factorized] == ["q_v_proj"]
    assert type(model.q_v_proj) is pc.PifaLinear
    assert type(model.q_u_proj) is nn.Identity
    assert_same(model, x, wanted)
    assert {layer.name: layer.skipped for layer in report.skipped} == {"out": "weight has full rank"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_singular_weights_are_found_whoever_made_them(dtype):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    model[0].weight.data = low_rank(96, 64, 10, dtype)
    x = torch.randn(9, 64, dtype=dtype)
    wanted = model(x)
    report = pc.compact(model)
    assert [layer.rank for layer in report.factorized] == [10]
    assert type(model[2]) is nn.Linear
    # Both stored factors are rounded once: some eps of the dtype.
    eps = torch.finfo(dtype).eps
    assert float((model(x) - wanted).detach().norm() / wanted.detach().norm()) < 4 * eps


def test_low_rank_hugging_face_models_are_compacted():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data = low_rank(48, 192, 9)
    x = torch.randint(0, 96, (2, 12))
    wanted = model(x).logits
    report = pc.compact(model)
    assert [layer.name for layer in report.factorized] == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    torch.testing.assert_close(model(x).logits, wanted, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_near_misses_are_left_alone_with_their_reason():
    class Reused(Pair):
        def forward(self, x):
            middle = self.BLinear(x)
            return self.ALinear(middle) + middle.sum()

    model = nn.Sequential(Pair(48, 32, 7, middle_bias=True), Reused(40, 48, 6), Pair(24, 40, 24))
    x = torch.randn(6, 32)
    wanted = model(x)
    report = pc.compact(model, example=x)
    assert report.factorized == []
    reasons = {layer.name: layer.skipped for layer in report.skipped}
    assert "bias between" in reasons["0"]
    assert "not low-rank" in reasons["2"]
    assert reasons["1.ALinear"] == "weight has full rank"
    assert torch.equal(model(x), wanted)


def test_a_second_run_finds_nothing():
    model = nn.Sequential(Pair(48, 32, 7), nn.ReLU())
    pc.compact(model)
    assert pc.compact(model).layers == []


def test_tied_singular_weights_stay_tied():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[0].weight.data = low_rank(32, 32, 4)
    model[2].weight = model[0].weight
    report = pc.compact(model)
    assert [layer.skipped for layer in report.skipped] == ["weight is tied to 2.weight", "weight is tied to 0.weight"]
    assert model[2].weight is model[0].weight


def test_an_example_that_cannot_be_captured_is_an_error():
    class Branches(Attention):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError):
        pc.compact(Branches(), example=torch.randn(2, 32))


def test_a_models_own_inputs_follow_it_to_its_device():
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Embedding(9, 32), Attention()

        @property
        def dummy_inputs(self):
            return {"ids": torch.tensor([[1, 2, 3]])}  # on the CPU, as Hugging Face's are

        def forward(self, ids):
            return self.attention(self.embed(ids))

    model, report = Language().to("meta"), Report("lossless", None)  # no second device with values here
    captured = _capture(model, None, report)
    assert captured is not None
    assert {node.meta["val"].device.type for node in captured.graph.graph.find_nodes(op="placeholder")} == {"meta"}


class Codec(nn.Module):
    """An autoencoder: its two linears are used one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 6, bias=False), nn.Linear(6, 24)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class CodecWithParts(Codec):
    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.p = nn.Sequential(nn.Linear(32, 6, bias=False), nn.Linear(6, 24)) if inner is None else inner

    def forward(self, x):
        return self.p(x)


class NonlinearBetween(Holder):
    def forward(self, x):
        return self.p[1](torch.relu(self.p[0](x)))


class CalledByParts(Holder):
    def forward(self, x):
        return self.p[1](self.p[0](x))


class EncodesToo(Holder):
    def encode(self, x):
        return self.p[0](x)


class EncodesInTraining(Holder):
    def forward(self, x):
        return (self.p(x), self.p[0](x)) if self.training else self.p(x)


class SharedV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(32, 8, bias=False)
        self.us = nn.ModuleList(nn.Linear(8, 40) for _ in range(3))

    def forward(self, x):
        return sum(u(self.v(x)) for u in self.us)


class TiedV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 40)) for _ in range(3))
        for pair in self.pairs[1:]:
            pair[0].weight = self.pairs[0][0].weight

    def forward(self, x):
        return sum(pair(x) for pair in self.pairs)


class TiedToAnEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.u, self.table = nn.Linear(32, 8, bias=False), nn.Linear(8, 40, bias=False), nn.Embedding(40, 8)
        self.u.weight = self.table.weight

    def forward(self, x):
        return self.u(self.v(x)) + self.table.weight.sum()


class SharedPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(32, 6, bias=False), nn.Linear(6, 32))
        self.two = self.one

    def forward(self, x):
        return self.two(self.one(x))


def hooked():
    model = Holder()
    model.p.register_forward_hook(lambda module, x, y: y * 3)
    model.p[0].register_forward_hook(lambda module, x, y: y * 3)
    return model


LEFT = {
    CodecWithParts: "CodecWithParts.decode and CodecWithParts.encode use decoder, encoder",
    NonlinearBetween: "weight has full rank",
    CalledByParts: "not called by the module that holds them",
    EncodesToo: "EncodesToo.encode may use parts of p",
    EncodesInTraining: "EncodesInTraining.forward may use parts of p",
    SharedV: "weight has full rank",
    TiedV: "weight is tied to pairs.",
    TiedToAnEmbedding: "weight is tied to table.weight",
    SharedPair: "layer is used elsewhere too, as two.0",
    hooked: "layer has forward hooks",
}


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_linears_that_others_use_one_by_one_are_no_pair(make, with_example):
    model, x = make(), torch.randn(5, 32)
    modules, wanted = list(model.modules()), model(x)
    report = pc.compact(model, x if with_example else None)
    assert report.factorized == []
    assert list(model.modules()) == modules
    assert report.params_after == report.params_before
    assert any(LEFT[make] in str(layer.skipped) for layer in report.layers)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("with_example", [True, False])
def test_a_module_that_is_a_pair_becomes_one_layer_only_if_it_is_called_as_a_whole(with_example):
    model, x = Holder(Codec()), torch.randn(5, 32)
    wanted = model(x)
    pc.compact(model, x if with_example else None)
    assert type(model.p) is pc.PifaLinear
    assert_same(model, x, wanted)
    model = Holder(Codec())
    model.p.width = 6  # others may ask for it: the module itself stays
    wanted = model(x)
    pc.compact(model, x if with_example else None)
    assert [type(layer) for layer in model.p.children()] == [pc.PifaLinear, nn.Identity]
    assert model.p.width == 6
    assert_same(model, x, wanted)


def test_pairs_in_a_row_do_not_overlap():
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((32, 6), (6, 32), (32, 5), (5, 32))))
    x = torch.randn(5, 32)
    wanted = model(x)
    report = pc.compact(model, x)
    assert [type(layer).__name__ for layer in model] == ["PifaLinear", "Identity", "PifaLinear", "Identity"]
    assert report.params_after == sum(layer.stored_after for layer in report.layers)
    assert_same(model, x, wanted)


def test_zero_weights_and_zero_pairs_are_left_with_their_reason():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), Holder(), nn.ReLU(), nn.Linear(24, 24))
    model[0].weight.data = low_rank(32, 32, 4)  # one that is exchanged all the same
    nn.init.zeros_(model[2].p[0].weight)
    nn.init.zeros_(model[4].weight)
    x = torch.randn(5, 32)
    wanted = model(x)
    report = pc.compact(model, x)
    reasons = {layer.name: str(layer.skipped) for layer in report.skipped}
    assert "zero" in reasons["2.p"]
    assert reasons["4"] == "weight is zero, which has no PIFA form"
    assert type(model[0]) is pc.PifaLinear
    assert_same(model, x, wanted)


def test_a_model_that_cannot_be_traced_without_an_example_asks_for_one():
    class Branches(Attention):
        def forward(self, x):
            self.seen = x
            return super().forward(x) if x.sum() > -1e9 else x

    model = Branches()
    attributes = vars(model).keys()
    report = pc.compact(model)
    assert report.factorized == []
    assert any("cannot be traced without an example, give one" in note for note in report.notes)
    assert vars(model).keys() == attributes
    assert "seen" not in vars(model)


def test_a_linear_in_front_of_a_pair_does_not_take_it_apart_and_no_layer_is_reported_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 6, bias=False), nn.Linear(6, 24), nn.Linear(24, 24))
    model[3].weight.data = torch.randn(24, 4) @ torch.randn(4, 24) / 10  # singular by itself
    x = torch.randn(5, 32)
    wanted = model(x)
    report = pc.compact(model, x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)  # float32, sums in another order
    assert sorted(layer.name for layer in report.layers) == ["0", "1", "3"]
    assert {layer.name for layer in report.factorized} == {"1", "3"}


@pytest.mark.parametrize(
    ("scale", "of_inputs", "words"),
    [(3000, 1e-3, "do not fit into torch.float16"), (1e-3, 1e4, "without full precision")],
    ids=["overflow", "underflow"],
)
def test_a_pair_whose_product_does_not_fit_into_its_dtype_stays(scale: float, of_inputs: float, words: str):
    model = Pair(48, 32, 7, bias=False).requires_grad_(False)
    for layer in (model.ALinear, model.BLinear):
        layer.weight.copy_(torch.randn_like(layer.weight) * scale)
    model.half()
    x = (torch.randn(5, 32) * of_inputs / 100).half()
    wanted = model(x)
    assert bool(wanted.isfinite().all())
    report = pc.compact(model)
    assert words in report.layers[0].skipped
    assert torch.equal(model(x), wanted)


def test_experts_become_layers_where_the_weights_of_all_are_singular():
    model = tiny_mixtral()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(EXPERTS):
            experts.gate_up_proj[expert, :48] = low_rank(48, 32, rank=6)
            experts.gate_up_proj[expert, 48:] = low_rank(48, 32, rank=6)
            experts.down_proj[expert] = low_rank(32, 48, rank=5 if expert == 1 else 9)
    call = {"input_ids": torch.arange(32).view(2, 16)}
    wanted = model(**call).logits
    report = pc.compact(model, call)
    place = "model.layers.0.mlp.experts.pifa"
    ranks = {layer.name: layer.rank for layer in report.factorized}
    assert ranks == {f"{place}.gate_proj": 6, f"{place}.up_proj": 6, f"{place}.down_proj": 9}
    torch.testing.assert_close(model(**call).logits, wanted, rtol=1e-4, atol=1e-4)

    model = tiny_mixtral()
    with torch.no_grad():
        for weight in model.model.layers[0].mlp.experts.gate_up_proj:
            weight[:48] = low_rank(48, 32, rank=6)
    report = pc.compact(model, call)
    left = {layer.name: layer.skipped for layer in report.skipped}
    assert left[f"{place}.gate_proj"] == left[f"{place}.up_proj"] == "up_proj of expert 0: weight has full rank"
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"

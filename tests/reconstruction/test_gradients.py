import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

import pifa_compiler as pc
from pifa_compiler.compress import measure
from pifa_compiler.errors import CalibrationError
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.linears import weight_name
from pifa_compiler.graph.predictions import Predictions, find_predictions
from pifa_compiler.graph.run import cut_into_blocks
from pifa_compiler.reconstruction import gradients as output_gradients
from pifa_compiler.reconstruction import value_store
from pifa_compiler.reconstruction.gradients import _ROWS, _logits_gradient, sum_dense
from pifa_compiler.reconstruction.statistics import DenseStatistics
from pifa_compiler.reconstruction.value_store import Room

transformers = pytest.importorskip("transformers")


def dense_statistics(captured, linears, predictions, **options) -> DenseStatistics:
    found = DenseStatistics()
    sum_dense(captured, linears, predictions, found.add, **options)
    return found


def linears_of(captured, *, head: bool = False):
    nodes = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [node for node in nodes if head or "lm_head" not in weight_name(node)]


def by_autograd(model: nn.Module, calls: list[dict[str, torch.Tensor]]):
    """sum x x^T and sum g g^T of every linear, from hooks on the whole model and one backward pass for each call.

    All random signs are 1.
    """
    grams: dict[str, torch.Tensor] = {}
    gradient_grams: dict[str, torch.Tensor] = {}
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: outputs.update({name: (x[0].detach(), y)}))
    for call in calls:
        mask = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        scores = model(**call, use_cache=False).logits
        loss = 2 * scores[mask].softmax(dim=-1).sqrt().sum()
        names = [name for name in outputs if name != "lm_head"]
        for name, g in zip(names, torch.autograd.grad(loss, [outputs[n][1] for n in names]), strict=True):
            x, g = outputs[name][0][mask], g[mask]
            grams[name] = grams.get(name, 0) + x.T @ x
            gradient_grams[name] = gradient_grams.get(name, 0) + g.T @ g
    return grams, gradient_grams


@pytest.fixture(scope="module", params=[None, slice(9, None), slice(None, 3)], ids=["whole", "right", "left"])
def four_blocks(request):
    """A tiny Llama captured with three calls, padded at this side or not at all; the calls; and their tokens."""
    torch.manual_seed(0)
    calls = [{"input_ids": torch.randint(0, 64, (2, 12))} for _ in range(3)]
    if request.param is not None:
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, request.param] = 0
        calls = [{**call, "attention_mask": mask} for call in calls]
    return capture(tiny_llama(num_hidden_layers=4), calls), calls, 3 * (24 if request.param is None else 21)


@pytest.mark.parametrize(
    ("bfloat16", "limit"),
    [(False, None), (False, 0), (False, 1 << 14), (True, None)],
    ids=["fp32", "fp32-in-files", "fp32-some-in-files", "bf16-units"],
)
def test_both_sums_are_those_of_autograd_on_the_whole_model(four_blocks, bfloat16, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(output_gradients, "_signs", lambda count, generator: torch.ones(count))
    monkeypatch.setattr(output_gradients, "has_bfloat16_units", lambda device: bfloat16)
    monkeypatch.setattr(value_store, "_SMALL", 64)
    captured, calls, tokens = four_blocks
    predictions = find_predictions(captured)
    found = DenseStatistics()
    sum_dense(captured, linears_of(captured), predictions, found.add, room=Room(limit, tmp_path))
    assert list(tmp_path.iterdir()) == []  # what was written is gone with the walk
    grams, gradient_grams = by_autograd(tiny_llama(num_hidden_layers=4), calls)
    assert set(found.tokens.values()) == {tokens}
    assert {name.removesuffix(".weight") for name in found.gradient_gram} == set(gradient_grams) == set(grams)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        rounded = by_autograd(tiny_llama(num_hidden_layers=4), calls)
    for ours, exact, theirs in zip((found.gram, found.gradient_gram), (grams, gradient_grams), rounded, strict=True):
        assert {gram.dtype for gram in ours.values()} == {torch.float32}
        # float32 through four layers, forward and back; in bfloat16 no more than twice what torch's autocast is off
        tolerance = 2 * max(relative_error(theirs[name], exact[name]) for name in exact) if bfloat16 else 1e-4
        assert all(relative_error(ours[f"{name}.weight"], exact[name]) < tolerance for name in exact)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.norm(got.float() - wanted) / torch.linalg.norm(wanted))


def test_gradients_of_a_value_that_crosses_several_blocks_add_up(monkeypatch):
    monkeypatch.setattr(output_gradients, "_signs", lambda count, generator: torch.ones(count))
    monkeypatch.setattr(output_gradients, "has_bfloat16_units", lambda device: False)

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))

        def forward(self, tokens):
            h = first = self.layers[0](self.embedding(tokens))
            for layer in self.layers[1:]:
                h = layer(h).tanh() + first
            return h @ self.embedding.weight.T

    model, tokens = Skips(), torch.randint(0, 16, (2, 6))
    captured = capture(model, [tokens])
    predictions = find_predictions(captured)
    assert not isinstance(predictions, str)
    found = dense_statistics(captured, linears_of(captured), predictions)
    met = []
    model.layers[0].register_forward_hook(lambda m, x, y: met.append(y))
    (g,) = torch.autograd.grad(2 * model(tokens).softmax(dim=-1).sqrt().sum(), met)
    g = g.reshape(-1, 8)
    assert relative_error(found.gradient_gram["layers.0.weight"], g.T @ g) < 1e-4  # float32 through nine layers


@pytest.mark.parametrize(("tokens", "stride"), [(4096, 2), (2048, 1), (30, 1)])
def test_for_ranks_inputs_are_summed_of_as_few_tokens_as_will_do_and_gradients_of_all(tokens, stride):
    widest = 128  # so that 2048 tokens will do
    model = tiny_llama(intermediate_size=widest)
    captured = capture(model, [torch.randint(0, 64, (1, tokens // 2)) for _ in range(2)])
    linears, predictions = linears_of(captured), find_predictions(captured)
    found = dense_statistics(captured, linears, predictions, for_ranks=True)
    whole = dense_statistics(captured, linears, predictions)
    assert set(whole.tokens.values()) == {tokens}
    assert set(found.tokens.values()) == {tokens // stride}
    for name, gram in whole.gradient_gram.items():
        assert torch.equal(found.gradient_gram[name], gram)
        mean, same = whole.gram[name] / whole.tokens[name], found.gram[name] / found.tokens[name]
        assert torch.equal(same, mean) == (stride == 1)
        assert torch.linalg.norm(same - mean) < 0.5 * torch.linalg.norm(mean)  # a mean over half of the tokens


def test_blocks_are_computed_once_forward_and_once_to_go_back_and_a_stopped_walk_goes_on(monkeypatch):
    captured = capture(tiny_llama(num_hidden_layers=4), [torch.randint(0, 64, (1, 12)) for _ in range(2)])
    predictions, linears = find_predictions(captured), linears_of(captured)
    run, ran = output_gradients.run_block, []
    monkeypatch.setattr(
        output_gradients, "run_block", lambda gm, block, *rest: ran.append(block) or run(gm, block, *rest)
    )
    dense_statistics(captured, linears, predictions)
    blocks = len(set(map(id, ran)))
    assert blocks > 2
    assert len(ran) == 2 * (2 * blocks - 1)  # of two batches; the last block's way there is the first step back
    whole, stopped, done = DenseStatistics(), DenseStatistics(), []
    sum_dense(captured, linears, predictions, whole.add, save=done.append)
    assert [each.block for each in done] == list(reversed(range(blocks)))
    again = done[blocks // 2]
    ran.clear()
    sum_dense(captured, linears, predictions, stopped.add, done=again)
    assert len(ran) == 2 * (2 * again.block - 1)
    assert 0 < len(stopped.gram) < len(whole.gram)
    for name, gram in stopped.gradient_gram.items():
        assert torch.equal(gram, whole.gradient_gram[name])


def test_the_gradients_of_all_signs_have_fishers_matrix_in_the_mean_and_no_tie_between_tokens():
    logits, generator = torch.randn(1, 2, 5), torch.Generator().manual_seed(0)
    found = torch.stack([_logits_gradient(logits, None, generator)[0].flatten() for _ in range(20000)])
    products = found[:, :, None] * found[:, None, :]
    p = logits[0].softmax(dim=-1)
    fisher = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
    bound = 5 * products.std(dim=0) / len(found) ** 0.5 + 1e-6  # five standard deviations of a mean
    assert bool(((products.mean(dim=0) - fisher).abs() <= bound).all())
    again = _logits_gradient(logits, None, torch.Generator().manual_seed(0))[0].flatten()
    assert torch.equal(again, found[0])


def test_tokens_have_signs_of_their_own():
    """Of tokens that all predict the same, across blocks of rows: each pair of gradients is as good as unrelated."""
    tokens, vocabulary = 3 * _ROWS + 5, 4096
    found = _logits_gradient(torch.zeros(1, tokens, vocabulary), None, torch.Generator().manual_seed(0))[0]
    cosines = nn.functional.normalize(found) @ nn.functional.normalize(found).T
    assert float((cosines - torch.eye(tokens)).abs().max()) < 6 / vocabulary**0.5  # in standard deviations


def test_no_parameter_gets_a_gradient_and_blocks_cover_the_graph_once():
    model = tiny_llama(num_hidden_layers=6)
    captured = capture(model, [torch.randint(0, 64, (1, 12))])
    predictions = find_predictions(captured)
    dense_statistics(captured, linears_of(captured), predictions)
    assert all(parameter.grad is None for parameter in model.parameters())
    blocks = cut_into_blocks(captured.graph, predictions.logits, 6)
    nodes = [node for block in blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    assert 5 <= len(blocks) <= 9
    residual = [node for block in blocks[1:-1] for node in block.outputs if node.meta["val"].shape == (1, 12, 32)]
    assert len(residual) <= len(blocks) - 2  # cut between decoder layers, one such value crosses


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("tokens", ["decoder_input_ids", "labels"])
@pytest.mark.parametrize("count", [6, 9], ids=["fewer", "as many"])
def test_an_encoder_decoder_predicts_after_its_decoders_tokens(tokens, count):
    torch.manual_seed(0)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    call = {"input_ids": torch.randint(3, 50, (2, 9)), "attention_mask": mask}
    call[tokens] = torch.randint(3, 50, (2, count))
    if tokens == "labels":
        call[tokens][1, -2:] = -100  # padding
    captured = capture(t5(), [call])
    predictions = find_predictions(captured)
    assert isinstance(predictions, Predictions)
    assert predictions.tokens.target == tokens
    found = dense_statistics(captured, linears_of(captured), predictions)
    for name in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"):
        assert float(found.gradient_gram[f"{name}.weight"].diagonal().min()) > 0
    assert found.of_input("encoder.block.0.layer.1.DenseReluDense.wi.weight").tokens == 14
    decoded = 2 * count if tokens == "decoder_input_ids" else 2 * count - 2
    assert found.of_input("decoder.block.0.layer.2.DenseReluDense.wi.weight").tokens == decoded


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    return transformers.BertForMaskedLM(config).eval(), {"input_ids": torch.randint(3, 50, (2, 9))}


def encoder() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)), torch.randint(0, 20, (2, 6))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bert, "depend on later tokens"),
        (lambda: (nn.Linear(4, 4), torch.randn(2, 4)), "not called with token ids"),
        (encoder, "gives no logits"),
        (lambda: (bert()[0], {**bert()[1], "labels": torch.randint(3, 50, (2, 9))}), "depend on later tokens"),
    ],
)
def test_other_models_have_no_next_token_loss_and_it_is_said_why(make, words):
    model, call = make()
    assert words in find_predictions(capture(model, [call]))


def test_a_plain_module_that_predicts_tokens_has_one():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 20))
    captured = capture(model, [torch.randint(0, 20, (2, 6))])
    predictions = find_predictions(captured)
    assert isinstance(predictions, Predictions)
    found = dense_statistics(captured, linears_of(captured), predictions)
    assert set(found.gradient_gram) == {"1.weight", "3.weight"}


def test_gradients_that_are_not_finite_name_the_weight_and_the_way_out():
    model = tiny_llama()
    captured = capture(model, [torch.randint(0, 64, (1, 8))])
    predictions = find_predictions(captured)
    model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(CalibrationError, match=r"gradient at the output of .*\.weight is not finite.*--no-gradients"):
        dense_statistics(captured, linears_of(captured), predictions)


class Copies(nn.Module):
    """Writes into a part of a new tensor, which a functional graph spells as `aten.copy`; DeepSeek and RWKV do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, ids):
        h = self.fc(self.embed(ids))
        wide = h.new_empty(*ids.shape, 8)
        wide[..., :4] = h[..., :4]
        wide[..., 4:] = h[..., 4:] * 2
        return self.head(wide)


def test_a_copy_has_a_derivative_here():
    model, ids = Copies(), torch.randint(0, 20, (2, 6))
    captured = capture(model, [ids])
    assert captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default)
    predictions = find_predictions(captured)
    assert isinstance(predictions, Predictions)
    found = dense_statistics(captured, linears_of(captured), predictions)
    assert float(found.gradient_gram["fc.weight"].diagonal().min()) > 0


@torch.library.custom_op("pifa_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Has no derivative."""
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, ids):
        return self.head(doubled(self.fc(self.embed(ids))))


def test_a_model_with_an_operation_without_derivative_is_compressed_by_its_inputs_alone_and_says_so():
    batches = [torch.randint(0, 20, (4, 9))]
    report = pc.compress(Opaque(), batches, pc.CompressConfig(ranks={"*": 3}))
    assert len(report.factorized) == 2
    (note,) = report.notes
    assert note.startswith("output errors are not weighted by gradients: ")
    assert "no-gradients" in note


class Scattered(Opaque):
    """Cannot be computed in bfloat16."""

    def forward(self, ids):
        h = self.fc(self.embed(ids))
        return self.head(torch.zeros(h.shape).scatter_add(2, torch.arange(8).expand(h.shape), h))


def test_what_cannot_be_computed_in_bfloat16_is_computed_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr(output_gradients, "has_bfloat16_units", lambda device: True)
    model, batches = Scattered(), [torch.randint(0, 20, (4, 9))]
    found = measure(model, batches)
    (note,) = found.notes
    assert "in float32, not bfloat16: scatter_add" in note
    monkeypatch.setattr(output_gradients, "has_bfloat16_units", lambda device: False)
    wanted = measure(model, batches)
    assert torch.equal(found.gradient_gram["fc.weight"], wanted.gradient_gram["fc.weight"])
    assert wanted.notes == ()


class Pooled(nn.Module):
    """Logits for every token, and a pooler that they do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.pooler = nn.Linear(8, 8)

    def forward(self, ids):
        h = self.fc(self.embed(ids)).tanh()
        return self.head(h), self.pooler(h[:, 0])


def test_tokens_are_counted_for_every_input_and_what_the_predictions_do_not_need_has_sums_too():
    model, batches = Pooled(), [torch.randint(0, 20, (4, 9)) for _ in range(2)]
    found = measure(model, batches)
    assert found.tokens == {"fc.weight": 72, "head.weight": 72, "pooler.weight": 8}
    assert set(found.gram) == {"fc.weight", "head.weight", "pooler.weight"}
    assert "pooler.weight" not in found.gradient_gram
    assert measure(model, batches, gradients=False).tokens == found.tokens
    assert len(pc.compress(model, batches, pc.CompressConfig(density=0.7, rank_multiple=1)).factorized) == 3


def test_measure_takes_gradients_because_it_is_asked_to():
    model, batches = Pooled(), [torch.randint(0, 20, (4, 9))]
    assert measure(model, batches).gradient_gram
    without = measure(model, batches, gradients=False)
    assert without.gradient_gram == {}
    report = pc.compress(model, batches, pc.CompressConfig(ranks={"fc": 2}), statistics=without)
    assert report.notes == [
        "output errors are not weighted by gradients: the statistics given were measured with gradients=False"
    ]


def test_statistics_of_another_model_are_refused():
    statistics = measure(Pooled(), [torch.randint(0, 20, (4, 9))])
    with pytest.raises(CalibrationError, match=r"know nothing of other\.weight"):
        statistics.of_input("other.weight")

import re

import pytest
import torch
from graphs import CAPTURES, Capture, call, op_counts
from pifa_compiler.kernels import linear_cpu
from pifa_compiler.kernels.side_by_side import as_one
from pifa_compiler.passes import Lower, MergeSiblings, Skip, run_passes
from pifa_compiler.passes.lower import FORMS
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.profiler import profile
from torch.testing import assert_close
from triton_interpreter import interpreted

from pifa_compiler.bench.layer import random_factors
from pifa_compiler.factors import factorize
from pifa_compiler.linear import PifaLinear
from pifa_compiler.modules import replace_linear

pytestmark = pytest.mark.skipif(linear_cpu.load() is not None, reason=str(linear_cpu.load()))

aten, pifa = torch.ops.aten, torch.ops.pifa

ON_GPUS = {"cpu": FORMS["cuda"]}
"""The forms of GPUs, taken where there is none."""


def layer(d_out: int, rank: int) -> PifaLinear:
    return PifaLinear.from_factors(
        factorize(torch.randn(d_out, 16), rank=rank), torch.randn(d_out), requires_grad=False
    )


class Attention(nn.Module):
    """Three linears of unequal shapes on one input, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = layer(24, 7), layer(16, 5), layer(16, 4), layer(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q[..., :16] * k + v)


class Written(nn.Module):
    """The input changes between its two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(24, 7), layer(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        before = self.first(h)
        h.add_(1)
        return before + self.second(h)


@pytest.mark.parametrize("tokens", [1, 40])
def test_siblings_become_one_call(capture: Capture, tokens: int):
    model, x = Attention(), torch.randn(tokens, 16)
    gm = capture(model, (x,))
    records = run_passes(gm, [Lower(), MergeSiblings()])
    counts = op_counts(gm)
    assert counts[pifa.linear_siblings_cpu.default] == counts[pifa.linear_cpu.default] == 1
    assert [record.rule for record in records].count("MergeSiblings") == 1
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)  # the same sums in another order
    assert run_passes(gm, [MergeSiblings()]) == []  # a second run finds nothing


def test_siblings_stay_apart_where_the_input_changes_between_them():
    model, x = Written(), torch.randn(3, 16)
    gm = torch.fx.symbolic_trace(model)
    records = run_passes(gm, [Lower(), MergeSiblings()])
    assert records[-1].outcome == Skip("siblings stay apart: the graph may write in place between them")
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-5)


def test_siblings_stay_apart_where_a_weight_is_computed():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, w: Tensor, coeff: Tensor) -> Tensor:
            first = pifa.linear_cpu.default(x, w, coeff, None)
            return first + pifa.linear_cpu.default(x, w * 2, coeff, None)

    gm = torch.fx.symbolic_trace(Scaled())
    (record,) = run_passes(gm, [MergeSiblings()])
    assert record.outcome == Skip("siblings stay apart: a weight is computed in the graph")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_calls_siblings_together(dynamic: bool):
    model, report = Attention(), []
    compiled = torch.compile(model, backend="pifa", dynamic=dynamic, options={"report": report})
    for tokens in (5, 1, 300):
        x = torch.randn(tokens, 16)
        with torch.no_grad():
            assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)  # values of up to 30, three products deep
    merged = [record for record in report if record.rule == "MergeSiblings"]
    assert merged
    assert not any(isinstance(record.outcome, Skip) for record in merged)


class Projections(nn.Module):
    """Query, key and value of grouped queries, on one input, and the layer behind."""

    def __init__(self, *, equal: bool = False, order: bool = True, bias: bool = True) -> None:
        super().__init__()
        shapes = [(24, 8)] * 3 if equal else [(24, 8), (16, 4), (16, 4)]
        self.q, self.k, self.v = (layer(*shape) for shape in shapes)
        self.o = PifaLinear.from_factors(factorize(torch.randn(16, 24), rank=8), None, requires_grad=False)
        for each in (self.q, self.k, self.v):
            each.order, each.bias = each.order if order else None, each.bias if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat((k, v), -1)[..., :24])


def weights_of(model: Projections) -> list[list[Tensor]]:
    layers = (model.q, model.k, model.v)
    return [[each.w_pivot for each in layers], [each.coeff for each in layers]]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("order", [True, False], ids=["order", "no-order"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "grouped-query"])
def test_products_on_gpus_become_joint_ones(equal: bool, order: bool, bias: bool, capture: Capture):
    model, x = Projections(equal=equal, order=order, bias=bias), torch.randn(3, 16)
    wanted = model(x)
    gm = capture(model, (x,))
    lower, merge = Lower(forms=ON_GPUS), MergeSiblings()
    *_, record = run_passes(gm, [lower, merge])
    assert record.outcome == "linear_siblings_gemm"
    counts = op_counts(gm)
    assert counts[pifa.linear_siblings_gemm.default] == counts[pifa.linear_gemm.default] == 1
    assert all(as_one(weights) is not None for weights in weights_of(model))
    assert_close(call(gm, x), wanted, rtol=1e-4, atol=1e-4)  # values of up to 30, three products deep
    assert_close(model(x), wanted, rtol=0, atol=0)  # the weights moved, and are the same
    assert run_passes(gm, [MergeSiblings()]) == []  # a second run finds nothing


@pytest.mark.parametrize("by", ["export", "dynamo"])  # symbolic_trace knows no shapes, so not how many tokens
@pytest.mark.parametrize(
    ("equal", "order", "outcome"),
    [
        (True, True, "linear_siblings_batched"),
        (True, False, "linear_siblings_batched"),
        (False, False, "linear_siblings_gemm"),
        (False, True, Skip("siblings stay apart: of several shapes, over many tokens, with orders to undo")),
    ],
)
def test_an_order_of_many_tokens_is_undone_from_one_buffer(by: str, equal: bool, order: bool, outcome: str | Skip):
    model, x = Projections(equal=equal, order=order), torch.randn(2, 200, 16)
    gm = CAPTURES[by](model, (x,))
    *_, record = run_passes(gm, [Lower(forms=ON_GPUS), MergeSiblings()])
    assert record.outcome == outcome
    assert (op_counts(gm).get(aten.cat.default, 0) > 1) is (outcome == "linear_siblings_gemm")  # one is the model's
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("order", [True, False], ids=["order", "no-order"])
@pytest.mark.parametrize("by", ["export", "dynamo"])  # symbolic_trace knows no shapes, so not that it is one token
def test_decoding_on_gpus_takes_the_kernel_for_siblings(by: str, order: bool, bias: bool):
    model, x = Projections(order=order, bias=bias), torch.randn(1, 16)
    gm = CAPTURES[by](model, (x,))
    *_, record = run_passes(gm, [Lower(forms=ON_GPUS), MergeSiblings()])
    assert record.outcome == "linear_siblings_triton"
    assert op_counts(gm)[pifa.linear_triton.default] == 1  # o alone
    assert all(as_one(weights) is None for weights in weights_of(model))  # weights may lie anywhere
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-4)


GATHERS = (aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.cat.default)


@pytest.mark.parametrize("heads_of_keys", [4, 2], ids=["llama", "grouped-query"])
@pytest.mark.parametrize(("tokens", "tune"), [(1, False), (1, True), (16, True)])
def test_no_gather_is_left_before_attention_where_our_kernels_decode(heads_of_keys: int, tokens: int, tune: bool):
    class Projected(nn.Module):
        """Of a block of Llama, what attention gets before it is turned by its place."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = pifa_llama(heads_of_keys).model.layers[0].self_attn

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            layers = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
            return tuple(each(x).unflatten(-1, (-1, 8)).transpose(-2, -3) for each in layers)

    gm = CAPTURES["dynamo"](Projected(), (torch.randn(1, tokens, 32),))
    with inductor.patch(max_autotune=tune):
        *_, record = run_passes(gm, [Lower(forms=ON_GPUS), MergeSiblings()])
    assert record.outcome == "linear_siblings_triton"
    counts = op_counts(gm)
    assert {target: counts[target] for target in GATHERS if target in counts} == {}


def test_gemms_stay_apart_where_weights_cannot_be_moved():
    model, x = Projections(), torch.randn(3, 16)
    gm = torch.fx.symbolic_trace(model)
    other_name = model.k.w_pivot.detach()
    *_, record = run_passes(gm, [Lower(forms=ON_GPUS), MergeSiblings()])
    assert record.outcome == Skip("siblings stay apart: their weights cannot be moved, others use the same memory")
    assert other_name.data_ptr() == model.k.w_pivot.data_ptr()
    assert_close(call(gm, x), model(x), rtol=1e-4, atol=1e-4)


def pifa_llama(heads_of_keys: int) -> nn.Module:
    model = tiny_llama(
        num_key_value_heads=heads_of_keys, tie_word_embeddings=False, num_hidden_layers=1, max_position_embeddings=512
    )
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            d_out, d_in = module.weight.shape
            replace_linear(model, name, random_factors(d_out, d_in, 8 if d_in == 32 else 16, torch.float32))
    return model.requires_grad_(False)


def calls_of(function, *args, **options) -> dict[str, int]:
    with profile() as found:
        function(*args, **options)
    return {event.key: event.count for event in found.key_averages()}


@interpreted
@pytest.mark.parametrize("heads_of_keys", [4, 2], ids=["llama", "grouped-query"])
def test_a_block_of_llama_is_eight_launches_and_no_weight_is_held_twice(
    heads_of_keys: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(FORMS, "cpu", FORMS["cuda"])
    model = pifa_llama(heads_of_keys)
    held = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    compiled = torch.compile(model, backend="pifa", dynamic=False)
    for tokens in (1, 40, 300)[: 3 if heads_of_keys == 4 else 2]:
        ids = torch.arange(tokens)[None] % 64
        wanted = model(ids, use_cache=False).logits
        result, (*_, code) = run_and_get_code(compiled, ids, use_cache=False)
        assert_close(result.logits, wanted, rtol=1e-4, atol=1e-5)
        assert ("index_select" in code) is (tokens > 1)  # our kernels store rows in order: nothing is gathered
        calls = calls_of(compiled, ids, use_cache=False)
        if tokens == 1:  # two launches each: query, key, value; o; gate, up; down
            assert calls["pifa::linear_siblings_triton"] == calls["pifa::linear_triton"] == 2
            assert calls["aten::mm"] == 1  # the head
        else:
            gemms = calls["aten::mm"] - 1 + calls["aten::bmm"]
            # Grouped queries: the coefficients of q, k and v are a launch of a kernel of ours, which ATen does not see.
            assert gemms + (heads_of_keys == 2) == 8
    assert sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())) == held
    stacked = model.model.layers[0].self_attn
    assert as_one([stacked.q_proj.w_pivot, stacked.k_proj.w_pivot, stacked.v_proj.w_pivot]) is not None
    stacked.k_proj.w_pivot.mul_(2)  # what the model holds is what compiled code reads
    assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    model.model.layers[0].mlp.up_proj.coeff.data = -model.model.layers[0].mlp.up_proj.coeff  # exchanged: apart now
    assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_inductor_takes_the_parts_of_siblings_together_where_it_reads_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMS, "cpu", FORMS["cuda"])

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = layer(24, 8), layer(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(self.gate(x)) * self.up(x)

    model, x = Gated(), torch.randn(3, 16)
    result, (code,) = run_and_get_code(torch.compile(model, backend="pifa", dynamic=False), x)
    assert_close(result, model(x), rtol=1e-4, atol=1e-4)
    assert code.count("pifa.linear_siblings_gemm.default(") == 1
    assert "aten.cat" not in code
    assert len(re.findall(r"^cpp_fused\w* = ", code, re.MULTILINE)) == 1  # orders and biases too

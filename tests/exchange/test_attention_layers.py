"""`nn.MultiheadAttention` taken apart into layers computes the same, and its projections are compressed."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pifa_compiler as pc
from pifa_compiler.exchange.attention_layers import AttentionLayers, attention_as_layers

HEADS, TOKENS, KEYS, BATCH = 4, 6, 9, 3
MASKS = {
    "none": lambda: {},
    "bool": lambda: {"attn_mask": torch.rand(TOKENS, KEYS) < 0.3},
    "added": lambda: {"attn_mask": torch.randn(TOKENS, KEYS)},
    "by head": lambda: {"attn_mask": torch.randn(BATCH * HEADS, TOKENS, KEYS)},
    "padding": lambda: {"key_padding_mask": torch.arange(KEYS) >= torch.tensor([[9], [4], [7]])},
    "both": lambda: {
        "attn_mask": torch.rand(TOKENS, KEYS) < 0.3,
        "key_padding_mask": torch.arange(KEYS) >= torch.tensor([[9], [4], [7]]),
    },
}
SIZES = {"one size": {}, "sizes of their own": {"kdim": 12, "vdim": 20}, "no bias": {"bias": False}}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["tokens first", "batch first"])
def test_it_computes_what_torchs_module_does(sizes, masks, batch_first):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, HEADS, batch_first=batch_first, **sizes).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers = AttentionLayers(dense)
    query, key, value = (torch.randn(BATCH, n, width) for n, width in zip(
        (TOKENS, KEYS, KEYS), (16, dense.kdim, dense.vdim), strict=True
    ))  # fmt: skip
    given = (query, key, value) if batch_first else [x.transpose(0, 1) for x in (query, key, value)]
    call = masks()
    for need, average in itertools.product((True, False), repeat=2):
        options = {"need_weights": need, "average_attn_weights": average}
        for args in ({**call}, {**call, "is_causal": True}) if "attn_mask" in call else (call,):
            if "is_causal" in args and not need and "key_padding_mask" not in call:
                continue  # the hint alone is believed then, and these masks are not causal
            wanted, got = dense(*given, **args, **options), layers(*given, **args, **options)
            assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5, equal_nan=True)
            assert (got[1] is None) == (wanted[1] is None)
            if need:
                assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_unbatched_inputs_the_causal_hint_gradients_and_dropout_are_as_torchs():
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, HEADS, dropout=1.0)
    layers = AttentionLayers(dense)
    x, padding = torch.randn(TOKENS, 16, requires_grad=True), torch.arange(TOKENS) > 3
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    # All weights of attention are dropped: what is left is the last bias.
    assert_close(layers(x, x, x)[0], dense(x, x, x)[0])
    dense.eval(), layers.eval()
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": mask, "is_causal": True, "need_weights": False}):
        wanted, got = dense(x, x, x, **options), layers(x, x, x, **options)
        assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
        assert got[1] is wanted[1] is None or got[1].shape == wanted[1].shape
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (got[0], wanted[0])]
        assert_close(*grads, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="is_causal"):
        layers(x, x, x, is_causal=True)


def test_what_others_read_of_it_is_there():
    dense = nn.MultiheadAttention(16, HEADS)
    layers = AttentionLayers(dense)
    assert_close(layers.in_proj_weight.detach() + 0, dense.in_proj_weight.detach())
    assert_close(layers.in_proj_bias, dense.in_proj_bias)
    assert layers.out_proj is dense.out_proj
    apart = AttentionLayers(nn.MultiheadAttention(16, HEADS, kdim=8, bias=False))
    assert apart.in_proj_weight is apart.in_proj_bias is None


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, HEADS, 48, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def test_an_encoder_is_compressed_with_all_projections_and_computes_the_same_on_every_path():
    torch.manual_seed(0)
    model = Encoder().eval()
    original = copy.deepcopy(model)
    x = torch.randn(2, 16, 32)
    report = pc.compress(model, [x, torch.randn(2, 16, 32)], pc.CompressConfig(density=0.6, rank_multiple=1))
    names = {layer.name for layer in report.factorized}
    children = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert {f"encoder.layers.{n}.self_attn.{child}" for n in (0, 1) for child in children} <= names
    assert report.density <= 0.6
    assert report.params_after == sum(p.numel() for p in model.parameters()) + sum(
        model.get_submodule(name).rank for name in names
    )
    dense = copy.deepcopy(original)  # what the compressed model is, put together
    for name in names:
        parent, _, child = name.rpartition(".")
        weight = model.get_submodule(name).weight.detach().clone()
        if child in children[:3]:
            rows = children.index(child)
            dense.get_submodule(parent).in_proj_weight.data[rows * 32 : rows * 32 + 32] = weight
        elif "linear" not in name:
            dense.get_submodule(name).weight.data = weight
        else:  # their features may be renumbered
            continue
    for index in (0, 1):
        for child in ("linear1", "linear2"):
            dense.encoder.layers[index].set_submodule(child, model.encoder.layers[index].get_submodule(child))
    padding = torch.arange(16) >= torch.tensor([[16], [11]])
    for grad, given in itertools.product((True, False), (None, padding)):
        with torch.set_grad_enabled(grad):
            got, wanted = model(x, given), dense(x, given)
        seen = torch.ones(2, 16, dtype=torch.bool) if given is None else ~given
        assert_close(got[seen], wanted[seen], rtol=1e-4, atol=1e-5)


class Pools(nn.Module):
    """Attention that is used twice, has more than projections, or is told something."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.wide = nn.MultiheadAttention(16, HEADS), nn.MultiheadAttention(16, HEADS, add_bias_kv=True)
        self.zero, self.hooked = nn.MultiheadAttention(16, HEADS, add_zero_attn=True), nn.MultiheadAttention(16, HEADS)
        self.again = self.twice = nn.MultiheadAttention(16, HEADS)
        self.hooked.register_forward_hook(lambda *_: None)


def test_only_what_computes_no_more_is_taken_apart_and_all_is_put_back():
    model = Pools()
    before = dict(model.named_modules(remove_duplicate=False))
    with contextlib.suppress(KeyboardInterrupt), attention_as_layers(model) as found:
        assert found.keys() == {"plain"}
        assert type(model.plain) is AttentionLayers
        raise KeyboardInterrupt
    assert dict(model.named_modules(remove_duplicate=False)) == before

"""Padding holds numbers of another size, so that a sum which takes it in is far off."""

import pytest
import torch
from torch import Tensor, nn

import pifa_compiler as pc
from pifa_compiler.compress import measure
from pifa_compiler.errors import CalibrationError
from pifa_compiler.graph.capture import capture
from pifa_compiler.graph.linears import weight_name
from pifa_compiler.graph.token_masks import _tokens_of

COUNTS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
LEFT = COUNTS.flip(1)
CAUSAL = torch.ones(5, 5).tril().bool()


def causal(counts: Tensor) -> Tensor:
    """[batch, 1, tokens, tokens], bool."""
    return CAUSAL & counts.bool()[:, None, None, :]


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible.bool(), torch.finfo(torch.float32).min)


def unmasked(counts: Tensor) -> Tensor:
    """As transformers does for attention that cannot have a row without anything to see: such rows see all."""
    visible = causal(counts)
    return visible | ~visible.any(dim=-1, keepdim=True)


SPELLINGS = {
    "int": (COUNTS, COUNTS),
    "bool": (COUNTS.bool(), COUNTS),
    "float": (COUNTS.float(), COUNTS),
    "additive": (additive(COUNTS), COUNTS),
    "additive -10000": ((1 - COUNTS) * -10000.0, COUNTS),
    "of keys": (COUNTS[:, None, None, :].bool(), COUNTS),
    "of keys, additive": (additive(COUNTS[:, None, None, :]), COUNTS),
    "causal": (causal(COUNTS), COUNTS),
    "causal, left": (causal(LEFT), LEFT),
    "causal, left, rows unmasked": (unmasked(LEFT), LEFT),
    "causal, all heads": (causal(COUNTS).expand(2, 3, 5, 5), COUNTS),
    "causal, additive": (additive(causal(COUNTS)), COUNTS),
    "causal, no heads": (causal(COUNTS)[:, 0].int(), COUNTS),
    "both ways": ((COUNTS[:, None, :] & COUNTS[:, :, None]).bool()[:, None], COUNTS),
    "both ways, of keys": (COUNTS.bool()[:, None, None, :].expand(2, 1, 5, 5), COUNTS),
    "window": (causal(COUNTS) & ~CAUSAL.tril(-3), COUNTS),
}


@pytest.mark.parametrize(("mask", "counts"), SPELLINGS.values(), ids=SPELLINGS)
def test_tokens_are_read_off_every_spelling_of_a_mask(mask: Tensor, counts: Tensor):
    found = _tokens_of(mask, inverted=False)
    assert isinstance(found, Tensor)
    assert torch.equal(found, counts.bool())


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 5),
        torch.zeros(2, 1, 5, 5),
        CAUSAL.expand(2, 1, 5, 5),
        torch.ones(1, 1, 5, 5),
        additive(CAUSAL[None]),
    ],
    ids=["ones", "nothing added", "causal", "shared", "causal, additive"],
)
def test_masks_without_padding_leave_nothing_out(mask: Tensor):
    assert _tokens_of(mask, inverted=False) is None


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.rand(2, 5), "neither 0 and 1 nor"),
        (torch.rand(2, 1, 5, 5) > 0.5, "neither padding nor causality"),
        (torch.eye(2).bool()[:, :, None, None].expand(2, 2, 5, 5), "from head to head"),
        (torch.ones(2, 1, 3, 5), r"neither \[.., 1, tokens\]"),
        (torch.zeros(5, dtype=torch.int64), "is not"),
    ],
)
def test_masks_that_say_something_else_are_not_guessed_at(mask: Tensor, words: str):
    torch.manual_seed(0)
    found = _tokens_of(mask, inverted=False)
    assert isinstance(found, str)
    assert words.replace("\\", "") in found


def test_key_padding_masks_mark_the_padding():
    found = _tokens_of(COUNTS == 0, inverted=True)
    assert isinstance(found, Tensor)
    assert torch.equal(found, COUNTS.bool())


class Reader(nn.Module):
    """Reads tokens [batch, tokens, 8], in some layout, by one linear."""

    def __init__(self, layout: str = "plain") -> None:
        super().__init__()
        self.fc, self.out, self.layout = nn.Linear(8, 8), nn.Linear(8, 8), layout

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.layout == "flat":
            x = x.reshape(-1, 8)
        elif self.layout == "tokens first":
            x = x.transpose(0, 1)
        elif self.layout == "heads":
            x = x.reshape(*x.shape[:2], 2, 8).transpose(1, 2)
        elif self.layout == "frames":
            x = x[:, ::2]
        elif self.layout == "pooled":
            x = x[:, 0]
        return self.out(self.fc(x).relu())


def padded(counts: Tensor = COUNTS, channels: int = 8) -> Tensor:
    x = torch.randn(*counts.shape, channels)
    x[counts == 0] = 1e6
    return x


def gram(rows: Tensor) -> Tensor:
    rows = rows.reshape(-1, 8)
    return rows.T @ rows


@pytest.mark.parametrize("layout", ["plain", "flat", "tokens first"])
@pytest.mark.parametrize("by_position", [True, False], ids=["by-position", "by-name"])
def test_a_mask_is_found_however_it_is_passed_and_laid_over_every_layout(layout: str, by_position: bool):
    x = padded()
    batch = (x, COUNTS) if by_position else {"x": x, "attention_mask": COUNTS}
    found = measure(Reader(layout), [batch], gradients=False)
    torch.testing.assert_close(found.gram["fc.weight"], gram(x[COUNTS.bool()]), rtol=1e-5, atol=1e-4)
    assert found.tokens == {"fc.weight": 8, "out.weight": 8}
    assert found.notes == ()


def test_a_mask_is_laid_over_heads():
    x = padded(channels=16)
    found = measure(Reader("heads"), [(x, COUNTS)], gradients=False)
    torch.testing.assert_close(found.gram["fc.weight"], gram(x[COUNTS.bool()]), rtol=1e-5, atol=1e-4)
    assert found.tokens["fc.weight"] == 16


def test_a_mask_that_does_not_fit_is_noted_with_the_layers_that_saw_padding():
    x = padded()
    report = pc.compress(Reader("frames"), [(x, COUNTS)], pc.CompressConfig(ranks={"*": 2}, gradients=False))
    assert report.notes == [
        "padding, if there is any, was calibrated on in 2 linears whose inputs have other rows than attention_mask: "
        "fc, out"
    ]
    for quiet in ((padded(torch.ones(2, 5)), torch.ones(2, 5)), (torch.randn(2, 5, 8),)):
        report = pc.compress(Reader("frames"), [quiet], pc.CompressConfig(ranks={"*": 2}, gradients=False))
        assert report.notes == []


def test_one_row_a_sample_needs_no_mask():
    found = measure(Reader("pooled"), [(torch.randn(2, 5, 8), COUNTS)], gradients=False)
    assert found.tokens == {"fc.weight": 2, "out.weight": 2}
    assert found.notes == ()


def test_a_mask_that_is_not_understood_is_noted():
    mask = torch.rand(2, 5).clamp(0.1, 0.9)
    report = pc.compress(Reader(), [(padded(), mask)], pc.CompressConfig(ranks={"*": 2}, gradients=False))
    (note,) = report.notes
    assert "a mask is not understood: attention_mask [2, 5]: its numbers are neither" in note

    class Other(Reader):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x * mask[..., None])

    report = pc.compress(Other(), [(torch.randn(2, 5, 8), COUNTS)], pc.CompressConfig(ranks={"*": 2}, gradients=False))
    (note,) = report.notes
    assert "mask: pass attention_mask, 1 at tokens that count" in note


def test_a_mask_that_leaves_nothing_is_refused():
    with pytest.raises(CalibrationError, match=r"no token reaches the input of fc\.weight: the masks leave none"):
        measure(Reader(), [(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64))], gradients=False)


class Translator(nn.Module):
    """An encoder, and a decoder that reads both; all are as long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder, self.own, self.cross, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        encoded = self.encoder(self.embed(input_ids))
        h = self.own(self.embed(decoder_input_ids))
        return self.head(h + self.cross(encoded))


@pytest.mark.parametrize("masks", ["both", "encoder", "decoder"])
def test_every_value_has_the_mask_of_its_own_stream(masks: str):
    model, ids = Translator(), torch.randint(0, 20, (2, 5))
    call = {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    call |= {"attention_mask": COUNTS} if masks != "decoder" else {}
    call |= {"decoder_attention_mask": LEFT[:, :] * COUNTS} if masks != "encoder" else {}
    found = measure(model, [call], gradients=False)
    source, target = (8 if masks != "decoder" else 10), (6 if masks != "encoder" else 10)
    assert found.tokens == {
        "encoder.weight": source,
        "cross.weight": source,
        "own.weight": target,
        "head.weight": target,
    }
    with torch.no_grad():
        embedded = model.embed(ids.flip(0))
    rows = embedded[(LEFT * COUNTS).bool()] if masks != "encoder" else embedded
    torch.testing.assert_close(found.gram["own.weight"], gram(rows), rtol=1e-5, atol=1e-4)


def test_of_text_and_images_a_mask_is_about_the_text():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, pixels: Tensor, attention_mask: Tensor) -> Tensor:
            return self.text(x).mean(dim=1) + self.image(pixels).mean(dim=1)

    found = measure(Both(), [(padded(), torch.randn(2, 7, 8), COUNTS)], gradients=False)
    assert found.tokens == {"text.weight": 8, "image.weight": 14}
    assert found.notes == ()


def test_torch_s_own_transformer_names_its_padding_by_stream():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.fc(src)

    captured = capture(Wrapped(), [(padded(), COUNTS == 0)])
    (linear,) = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert weight_name(linear) == "fc.weight"
    rows = captured.masks.rows(linear.all_input_nodes[0], 0, (2, 5))
    assert rows is not None
    assert torch.equal(rows, COUNTS.reshape(-1).bool())

"""What of two models' outputs is compared: predictions of the next token, or the last hidden states."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CalibrationError
from ..graph.capture import Batch, call_of
from .config import DistillConfig
from .losses import TopK, divergence, relative_error

_IDS = ("decoder_input_ids", "input_ids")
_MASKS = {"decoder_input_ids": "decoder_attention_mask"}


@dataclass(frozen=True)
class Call:
    """One batch as a model is called with it.

    Attributes:
        args, kwargs: the call.
        ids: the name of the token ids whose next ones are predicted, [batch, 2 or more]; None if there are none.
        tokens: these ids.
        mask: which of them count, [batch, tokens]; None for all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: str | None
    tokens: Tensor | None
    mask: Tensor | None

    @classmethod
    def of_batch(cls, model: nn.Module, batch: Batch) -> "Call":
        """The call of a batch, its tensors where they are."""
        args, kwargs = call_of(model, batch, None)
        names = list(inspect.signature(model.forward).parameters)
        known = {**dict(zip(names, args, strict=False)), **kwargs}
        whole = {name: value for name, value in known.items() if "mask" not in name and _is_token_ids(value)}
        ids = next((name for name in _IDS if name in whole), next(iter(whole)) if len(whole) == 1 else None)
        mask = None if ids is None else known.get(_MASKS.get(ids, "attention_mask"))
        if not isinstance(mask, Tensor) or ids is None or mask.shape != whole[ids].shape:
            mask = None
        return cls(args, kwargs, ids, None if ids is None else whole[ids], mask)

    def to(self, device: torch.device) -> "Call":
        """The same with its tensors on a device."""
        args, kwargs, tokens, mask = pytree.tree_map_only(
            Tensor, lambda value: value.to(device), (self.args, self.kwargs, self.tokens, self.mask)
        )
        return Call(args, kwargs, self.ids, tokens, mask)

    def with_tokens(self, model: nn.Module, tokens: Tensor) -> "Call":
        """The same with other token ids."""
        assert self.ids is not None  # noqa: S101  the caller's part
        if self.ids in self.kwargs:
            return Call(self.args, {**self.kwargs, self.ids: tokens}, self.ids, tokens, self.mask)
        at = list(inspect.signature(model.forward).parameters).index(self.ids)
        return Call((*self.args[:at], tokens, *self.args[at + 1 :]), self.kwargs, self.ids, tokens, self.mask)


def predicts_next_token(model: nn.Module, call: Call) -> bool:
    """Whether a model's output is logits at each of its tokens that no later token has a part in."""
    if call.tokens is None:
        return False
    before = _logits_of(model(*call.args, **call.kwargs))
    ids = call.tokens
    if before is None or before.ndim != 3 or before.shape[:2] != ids.shape or before.shape[2] <= int(ids.max()):
        return False
    half = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, half:] = torch.where(ids[:, half:] == 0, 1, ids[:, half:] - 1)
    other = call.with_tokens(model, changed)
    after = _logits_of(model(*other.args, **other.kwargs))
    if after is None:
        return False
    rounding = 64 * torch.finfo(before.dtype).eps * float(before.abs().max())
    return torch.allclose(before[:, :half], after[:, :half], rtol=0, atol=rounding)


class Predictions:
    """The divergence of next-token predictions, by their logits."""

    name = "logits"

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def count(self, call: Call) -> float:
        """Over how many tokens the loss of a batch is a sum."""
        assert call.tokens is not None  # noqa: S101  as `predicts_next_token` found
        return float(call.tokens.numel() if call.mask is None else call.mask.sum())

    def output(self, model: nn.Module, call: Call) -> Tensor:
        """The logits, [rows, vocabulary]."""
        logits = _logits_of(model(*call.args, **call.kwargs))
        assert logits is not None  # noqa: S101  as `predicts_next_token` found
        return logits.flatten(0, 1)

    def loss(self, output: Tensor, target: "Tensor | TopK", call: Call, scale: float) -> Tensor:
        """`scale` times the sum over a batch's tokens."""
        assert call.tokens is not None  # noqa: S101  as `predicts_next_token` found
        mask = torch.ones_like(call.tokens) if call.mask is None else call.mask.to(call.tokens.dtype)
        text = None
        if self.config.text_share:
            text = torch.full_like(call.tokens, -1)
            text[:, :-1] = torch.where(mask[:, 1:] != 0, call.tokens[:, 1:], -1)
            text = text.flatten()
        return divergence(
            output,
            target,
            (mask != 0).flatten().float() * scale,
            temperature=self.config.temperature,
            text=text,
            text_share=self.config.text_share,
        )


class HiddenStates:
    """The squared error of the last hidden states, over the mean square of the teacher's."""

    name = "hidden-states"

    def count(self, call: Call) -> float:
        """1: the loss of a batch is a mean over its tokens, or over what else has a hidden state."""
        return 1.0

    def output(self, model: nn.Module, call: Call) -> Tensor:
        """The states, [rows, width].

        Raises:
            CalibrationError: the model has no such output.
        """
        kwargs = call.kwargs
        if hasattr(getattr(model, "config", None), "output_hidden_states"):
            kwargs = {**kwargs, "output_hidden_states": True}
        output = model(*call.args, **kwargs)
        states = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        for name in ("decoder_hidden_states", "hidden_states"):
            if states is None and getattr(output, name, None):
                states = getattr(output, name)[-1]
        if states is None and isinstance(output, tuple):
            states = output[0]
        if not isinstance(states, Tensor) or states.ndim < 2 or not states.is_floating_point():
            raise CalibrationError(
                f"{type(model).__name__} gives neither a tensor nor last_hidden_state nor hidden_states; distil the "
                "part of it that does"
            )
        return states.flatten(0, -2)

    def loss(self, output: Tensor, target: "Tensor | TopK", call: Call, scale: float) -> Tensor:
        """`scale` times the mean over a batch's rows."""
        assert isinstance(target, Tensor)  # noqa: S101  no predictions, no likeliest ones
        counted = torch.ones(len(output), device=output.device)
        if call.mask is not None and call.mask.numel() == len(output):
            counted = (call.mask != 0).flatten().float()
        return relative_error(output, target, counted * (scale / float(counted.sum())))


def _logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Mapping) and "logits" not in output:
        return None
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


def _is_token_ids(value: Any) -> bool:
    integer = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return integer and value.ndim == 2 and value.shape[1] >= 2

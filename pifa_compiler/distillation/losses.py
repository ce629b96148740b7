"""How far a model's outputs are from its teacher's, with the gradient made in the same pass, some tokens at a time.

Logits of a whole window in float32, and what a softmax keeps of them for its gradient, would be the largest tensors of
a run by far: 49152 entries of a vocabulary and 2048 tokens are 400 MB, a few times over. Here a copy in float32 exists
of few rows only, and what is kept is the gradient, in the dtype of the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = {"cpu": 32}
"""Tokens whose probabilities are computed at once: few enough for a CPU's cache."""

_MORE_ROWS = 1024
"""On other devices: enough to keep them busy."""


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens at every place, and all others as one.

    Attributes:
        tokens: [rows, k], int32.
        log_probabilities: theirs, at the run's temperature, and last that of all others, [rows, k + 1], float16.
    """

    tokens: Tensor
    log_probabilities: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor, k: int, temperature: float) -> "TopK":
        """Of logits [..., vocabulary]."""
        flat = logits.flatten(0, -2)
        found = []
        for rows in flat.split(_rows_at_once(flat)):
            log_p = (rows.float() / temperature).log_softmax(dim=1)
            values, tokens = log_p.topk(min(k, flat.shape[1]))
            rest = log_p.scatter(1, tokens, -torch.inf).logsumexp(dim=1, keepdim=True)
            found.append((tokens.int(), torch.cat((values, rest), dim=1).half()))
        tokens, values = (torch.cat(each) for each in zip(*found, strict=True))
        return cls(tokens, values)

    def to_dict(self) -> dict[str, Tensor]:
        """For a file."""
        return {"tokens": self.tokens, "log_probabilities": self.log_probabilities}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "TopK":
        """From a file, to a device."""
        return cls(tensors["tokens"].to(device), tensors["log_probabilities"].to(device))


def divergence(
    logits: Tensor,
    target: "Tensor | TopK",
    weights: Tensor,
    *,
    temperature: float = 1.0,
    text: Tensor | None = None,
    text_share: float = 0.0,
) -> Tensor:
    """sum_t w_t ((1 - a) T^2 KL(softmax(z'_t / T) || softmax(z_t / T)) + a CE(z_t, text_t)), z' the teacher's logits.

    Gradients go into `logits`, once.

    Args:
        logits: z, [rows, vocabulary].
        target: z', of the same shape, or what is known of them.
        weights: w, [rows], float32; 0 where a row does not count.
        temperature: T.
        text: the token that follows, [rows], int64; below 0 where there is none. Needed if `text_share` is not 0.
        text_share: a.

    Returns:
        The sum, in float32 or as exact as `logits` are.
    """
    total: Tensor = _Divergence.apply(logits, target, weights, temperature, text, text_share)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: "Tensor | TopK",
        weights: Tensor,
        temperature: float,
        text: Tensor | None,
        text_share: float,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), count := _rows_at_once(logits)):
            rows = slice(start, start + count)
            z, weight = logits[rows].to(exact), weights[rows].to(exact)
            log_q = (z / temperature).log_softmax(dim=1)
            loss, slope = (_to_all if isinstance(target, Tensor) else _to_top_k)(log_q, target, rows, temperature)
            loss, slope = loss * temperature**2, slope.mul_(temperature)
            if text_share:
                assert text is not None  # noqa: S101  the caller's part
                loss, slope = loss * (1 - text_share), slope.mul_(1 - text_share)
                known = (text[rows] >= 0).to(exact)
                at = text[rows].clamp_min(0)[:, None]
                log_p = log_q if temperature == 1 else z.log_softmax(dim=1)
                loss = loss - text_share * known * log_p.gather(1, at)[:, 0]
                slope.add_(log_p.exp().mul_((text_share * known)[:, None]))
                slope.scatter_add_(1, at, (-text_share * known)[:, None])
            total += (loss * weight).sum()
            if gradient is not None:
                gradient[rows] = slope.mul_(weight[:, None])
        ctx.gradient = gradient
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(along), None, None, None, None, None


def _to_all(log_q: Tensor, target: Any, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each row, and q - p, its gradient at the logits of q."""
    log_p = (target[rows].to(log_q.dtype) / temperature).log_softmax(dim=1)
    p = log_p.exp()
    # 0 (log 0 - log q) is 0: a teacher may rule tokens out by logits of -inf.
    return (p * (log_p - log_q)).nan_to_num_(nan=0.0).sum(dim=1), log_q.exp().sub_(p)


def _to_top_k(log_q: Tensor, target: Any, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """The same, where of p the likeliest tokens are known; all others are one event, in q as in p."""
    at, log_p = target.tokens[rows].long(), target.log_probabilities[rows].to(log_q.dtype).log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    known = q.gather(1, at)
    # What the others have is their sum, not what is missing to 1: that would be rounding errors where it is little.
    q_rest = q.scatter(1, at, 0).sum(dim=1, keepdim=True).clamp_min(torch.finfo(log_q.dtype).tiny)
    log_known = torch.cat((log_q.gather(1, at), q_rest.log()), dim=1)
    loss = (p * (log_p - log_known)).nan_to_num_(nan=0.0).sum(dim=1)
    return loss, q.mul_(1 - p[:, -1:] / q_rest).scatter_(1, at, known - p[:, :-1])


def relative_error(states: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t |h_t - h'_t|^2 over the mean of |h'_t|^2, h' the teacher's.

    Args:
        states: h, [rows, width].
        target: h', the same shape.
        weights: w, [rows], float32.
    """
    states, target = states.float(), target.float()
    scale = (target.square().sum(dim=1) * (weights > 0)).sum() / (weights > 0).sum().clamp_min(1)
    return ((states - target).square().sum(dim=1) * weights).sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _rows_at_once(logits: Tensor) -> int:
    return _ROWS.get(logits.device.type, _MORE_ROWS)

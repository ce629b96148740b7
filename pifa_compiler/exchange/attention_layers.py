"""`AttentionLayers`: `nn.MultiheadAttention` with a layer for each of its four projections.

`nn.MultiheadAttention` keeps the projections of queries, keys and values in one parameter and hands the weight of the
last one to a function, so that no layer can be exchanged. Here they are children: q_proj, k_proj, v_proj and out_proj.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from ..dense_weight import DenseWeight
from ..linear import PifaLinear
from ..modules import bias_of, module_at
from .allowed import Exchangeable, why_marked
from .atomic import Exchange


class AttentionLayers(nn.Module):
    """Computes what an `nn.MultiheadAttention` does, from layers of its own.

    Args:
        attention: the module to take over from. Weights of queries, keys and values are copied if they lie in one
            parameter; the last projection is the same layer.
    """

    q_proj: nn.Linear | PifaLinear
    k_proj: nn.Linear | PifaLinear
    v_proj: nn.Linear | PifaLinear
    out_proj: nn.Linear | PifaLinear

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim, self.dropout = attention.num_heads, attention.head_dim, attention.dropout
        self.batch_first = attention.batch_first
        # What torch's own transformer layers look at before they take a path around `forward`.
        self._qkv_same_embed_dim, self.bias_k, self.bias_v, self.add_zero_attn = False, None, None, False
        stacked, biases = attention.in_proj_weight, attention.in_proj_bias
        apart = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            weight = apart[index] if stacked is None else _part(stacked, index)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
            layer.weight = weight
            layer.bias = None if biases is None else _part(biases, index)
            setattr(self, name, layer)
        self.out_proj = attention.out_proj
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of queries, keys and values, [3 * embed_dim, embed_dim], read-only; None if inputs differ."""
        if not self.embed_dim == self.kdim == self.vdim:
            return None
        # A kind of tensor of its own, so that torch's fused paths, which would read it at each call, are not taken.
        weights = torch.cat([layer.weight for layer in (self.q_proj, self.k_proj, self.v_proj)])
        if torch.compiler.is_compiling():
            return weights
        stand_in = DenseWeight.of_values(weights)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # what has it transformers leaves alone
        return stand_in

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Their biases, [3 * embed_dim], read-only."""
        biases = [bias for layer in (self.q_proj, self.k_proj, self.v_proj) if (bias := bias_of(layer)) is not None]
        return torch.cat(biases) if biases else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of `nn.MultiheadAttention`, shapes, masks and errors of wrong ones included.

        Raises:
            RuntimeError: `is_causal` without a mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; pass the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, len(query), self.num_heads, query.dtype)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [batch, heads, tokens, head]
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights


@contextmanager
def attention_as_layers(model: nn.Module) -> Iterator[dict[str, AttentionLayers]]:
    """While it lasts, every `nn.MultiheadAttention` of `model` that may be exchanged has layers.

    Yields:
        What stands in the place of each, by name.
    """
    found = dict(_exchanged(model))
    with Exchange() as exchange:
        for name, layers in found.items():
            exchange.module(model, name, layers)
        yield found
        exchange.undo()


def _exchanged(model: nn.Module) -> Iterator[tuple[str, AttentionLayers]]:
    names = [name for name, module in model.named_modules() if name and type(module) is nn.MultiheadAttention]
    if not names or isinstance(model, GraphModule):  # a graph names what it calls
        return
    exchangeable = Exchangeable(model, None)
    for name in names:
        attention = model.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)  # noqa: S101  what `names` are of
        marked = why_marked(attention) or exchangeable.why_shared(name)
        if marked is None and has_no_more(attention):
            yield name, AttentionLayers(attention)


def take_apart(model: nn.Module, layers: Iterable[str]) -> None:
    """Gives every `nn.MultiheadAttention` of `model` layers of which one is named among `layers`."""
    for name in layers:
        place = name.rpartition(".")[0]
        attention = module_at(model, place)
        if place and type(attention) is nn.MultiheadAttention and has_no_more(attention):
            model.set_submodule(place, AttentionLayers(attention))


def has_no_more(attention: nn.MultiheadAttention) -> bool:
    """Whether a module has what `AttentionLayers` takes over, and no further keys, parts or kinds of weights."""
    usual = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
    held = {key for key, parameter in attention._parameters.items() if parameter is not None}
    plain = all(type(parameter) is nn.Parameter for parameter in attention.parameters())
    return held <= usual and attention._modules.keys() == {"out_proj"} and plain and not attention.add_zero_attn


def _part(stacked: nn.Parameter, index: int) -> nn.Parameter:
    return nn.Parameter(stacked.detach().chunk(3)[index].clone(), stacked.requires_grad)


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores [batch, heads, tokens, keys], of masks that hide where True, or that are added."""
    masks = []
    if mask is not None:
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if padding is not None:
        masks.append(padding[:, None, None, :])
    added = [
        torch.zeros_like(each, dtype=dtype).masked_fill_(each, -math.inf) if each.dtype == torch.bool else each
        for each in masks
    ]
    return added[0] + added[1] if len(added) == 2 else next(iter(added), None)

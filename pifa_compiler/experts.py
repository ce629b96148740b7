"""`PifaExperts`: the module that stands where the experts of a mixture stood, and its layers, `PifaGroupedLinear`.

transformers 5 keeps the experts of a layer in 3D parameters, in classes decorated by `use_experts_implementation`
(`transformers.integrations.moe`): gate_up_proj or up_proj, and down_proj, one matrix an expert. `expert_weights` says
what a module of such a class holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, RankError
from .factors import PifaFactors
from .kernels import grouped_linear
from .kernels.grouped_linear import add_bias
from .kernels.grouped_mm import grouped_mm
from .linear import WithRowOrder


class PifaGroupedLinear(WithRowOrder):
    """A linear layer for each of several experts, whose weights [out, in] have one rank r and are stored in PIFA form.

    The state dict holds `w_pivot` [experts, r, in], `coeff` [experts, out - r, r], `pivots` [experts, r] (int32) and,
    if there is one, `bias` [experts, out]. The row order follows from `pivots`, as in `PifaLinear`. A new layer has no
    values; `from_factors` makes one of weights.

    Args:
        experts, in_features, out_features, rank: the shape; 1 <= rank <= min(in_features, out_features).
        bias: whether there is a bias.
        device, dtype: of the parameters, as in `nn.Linear`.

    Raises:
        RankError: no weight of this shape has this rank.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise RankError(
                f"weights [{out_features}, {in_features}] have a rank of 1..{min(in_features, out_features)}, "
                f"got rank {rank}"
            )
        self.experts, self.in_features, self.out_features, self.rank = experts, in_features, out_features, rank
        self.w_pivot = nn.Parameter(torch.empty(experts, rank, in_features, device=device, dtype=dtype))
        self.coeff = nn.Parameter(torch.empty(experts, out_features - rank, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("pivots", torch.empty(experts, rank, device=device, dtype=torch.int32))
        self.register_buffer("order", None, persistent=False)
        self._start_order()

    @classmethod
    def from_factors(
        cls, factors: Sequence[PifaFactors], bias: Tensor | None = None, requires_grad: bool = True
    ) -> "PifaGroupedLinear":
        """The layer that computes x W^T + bias with the weight W of every row's expert.

        Args:
            factors: the weight [out, in] of each expert, all of one shape and one rank.
            bias: [experts, out], or None. An `nn.Parameter` is kept as the same object.
            requires_grad: whether the factors are trainable.

        Raises:
            RankError: there are none, or shapes or ranks differ.
        """
        if len({(each.shape, each.rank) for each in factors}) != 1:
            found = sorted({(*each.shape, each.rank) for each in factors})
            raise RankError(f"wanted experts of one shape and one rank, got (out, in, rank) {found}")
        first = factors[0]
        d_out, d_in = first.shape
        layer = cls(len(factors), d_in, d_out, first.rank, device="meta", dtype=first.w_pivot.dtype)
        layer.w_pivot = nn.Parameter(torch.stack([each.w_pivot for each in factors]), requires_grad)
        layer.coeff = nn.Parameter(torch.stack([each.coeff for each in factors]), requires_grad)
        layer.pivots = torch.stack([each.pivots for each in factors]).to(torch.int32)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad)
        layer.restore_order()
        return layer

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [rows, in], sorted by expert, and where each expert's rows end, [experts] -> [rows, out]."""
        self._follow_pivots()
        return grouped_linear(x, self.w_pivot, self.coeff, self.order, self.bias, ends)

    def extra_repr(self) -> str:
        """The shape."""
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def layer_name(place: str, projection: str) -> str:
    """What the layer in PIFA form for a projection of the experts at `place` is called; see `PifaExperts.pifa`."""
    return f"{place}.pifa.{projection}"


@dataclass(frozen=True)
class ExpertWeights:
    """One projection of all experts.

    Attributes:
        weight: [experts, out, in], detached; a view of the module's own parameter.
        bias: [experts, out], likewise, or None.
    """

    weight: Tensor
    bias: Tensor | None


class PifaExperts(nn.Module):
    """Computes what a module of experts of transformers does, some or all of its projections in PIFA form.

    What the experts' class had besides its weights (activation, limits, config) is here under the same names, and so
    are the weights that stay dense. Which of transformers' implementations of experts is set does not matter.

    Attributes:
        experts_class: whose place it takes; its gate is what gates.
        pifa: the layers in PIFA form, by projection. They are children of this, and not of the module itself, since
            transformers converts tensors called `experts.down_proj` and the like when it saves and loads.
    """

    experts_class: type[Any]
    num_experts: int
    pifa: nn.ModuleDict
    act_fn: Any
    post_expert_norm: Any

    @classmethod
    def of(cls, experts: nn.Module, layers: Mapping[str, nn.Module]) -> "PifaExperts":
        """What stands where `experts` stood.

        Args:
            experts: a module that `expert_weights` knows, or a `PifaExperts`.
            layers: `PifaGroupedLinear`, or what is called like one, by projection: "gate_up_proj", or "gate_proj" and
                "up_proj" where `expert_weights` has them apart, or "up_proj" alone of experts without a gate; and
                "down_proj". They bring their biases along. Projections that are left out stay as they are.

        Raises:
            ConfigError: they are not such experts, or do not have such projections.
        """
        weights = expert_weights(experts)
        if isinstance(weights, str):
            raise ConfigError(f"these experts cannot be in PIFA form: {weights}")
        front = layers.keys() - {"down_proj"}
        known = [set(), {"gate_up_proj"} if experts.has_gate else {"up_proj"}]
        if "gate_proj" in weights:
            known.append({"gate_proj", "up_proj"})
        if front not in known:
            raise ConfigError(f"{type(experts).__name__} has no projections {sorted(front)}; wanted one of {known[1:]}")
        self = cls()
        own = vars(self)
        own.update({name: value for name, value in vars(experts).items() if name not in own})
        self.experts_class = type(experts)
        gone = {name for layer in layers for name in (layer, f"{layer}_bias")}
        if front:
            gone |= {"gate_up_proj", "gate_up_proj_bias"}
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in gone:
                self.register_parameter(name, parameter)
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.pifa = nn.ModuleDict(layers)
        return self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts' own forward computes, by the formula of `grouped_mm_experts_forward` of transformers.

        Args:
            hidden_states: [tokens, in].
            top_k_index: the experts of every token, [tokens, k]; the number of experts means none.
            top_k_weights: what to multiply their outputs by, [tokens, k].

        Returns:
            [tokens, out], dtype of `hidden_states`.
        """
        tokens, k = top_k_index.shape
        experts, places = top_k_index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        x = hidden_states[places // k]
        y = self._project("down_proj", self._hidden(x, ends), ends)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[places].unsqueeze(-1)
        y = y[places.argsort()].view(tokens, k, y.shape[-1])
        return y.sum(dim=1).to(hidden_states.dtype)

    def _hidden(self, x: Tensor, ends: Tensor) -> Tensor:
        """What the down projection reads, [rows, intermediate]."""
        hidden: Tensor
        if not self.has_gate:
            hidden = self.act_fn(self._project("up_proj", x, ends))
        elif "gate_proj" in self.pifa:
            hidden = self.act_fn(self._project("gate_proj", x, ends)) * self._project("up_proj", x, ends)
        else:
            hidden = self.experts_class._apply_gate(self, self._project("gate_up_proj", x, ends))
        return hidden

    def _project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        if name in self.pifa:
            projected: Tensor = self.pifa[name](x, ends)
            return projected
        held = self.get_parameter(name)
        weight = held.mT if self.is_transposed else held
        y = grouped_mm(x.to(weight.dtype), weight, ends)  # under autocast x may be of another dtype
        return add_bias(y, self.get_parameter(f"{name}_bias"), ends) if self.has_bias else y

    def extra_repr(self) -> str:
        """Whose place it takes, and what stayed dense."""
        dense = {name: list(parameter.shape) for name, parameter in self.named_parameters(recurse=False)}
        return f"of {self.experts_class.__name__}, num_experts={self.num_experts}, dense={dense}"


def expert_weights(module: nn.Module, *, joint: bool = False) -> dict[str, ExpertWeights] | str:
    """The projections of a module of experts, in the order of their use; or why it cannot become a `PifaExperts`.

    Args:
        module: any module.
        joint: whether gate and up come as one, "gate_up_proj", always; otherwise they do where the class has a gate of
            its own, which need not take them apart as transformers does.

    Returns:
        "gate_proj" and "up_proj", or "gate_up_proj", or "up_proj" of experts without a gate; and "down_proj".
    """
    kind = type(module)
    forward = getattr(kind.forward, "__globals__", {})
    if forward.get("__name__") != _MOE or not isinstance(getattr(module, "num_experts", None), int):
        return f"{kind.__name__} is no class of experts decorated by transformers' use_experts_implementation"
    if module._is_expert_parallel:
        return "its experts are spread over processes"
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    wanted = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if held != wanted or module._buffers:
        return f"{kind.__name__} has the parameters {sorted(held | module._buffers.keys())}, wanted {sorted(wanted)}"
    for name, parameter in module._parameters.items():
        dims = 2 if name.endswith("_bias") else 3
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dim() != dims:
            return f"its {name} is no floating-point parameter of {dims} dimensions"
    found = {}
    for name in names:
        weight = module.get_parameter(name).detach()
        bias = module.get_parameter(f"{name}_bias").detach() if module.has_bias else None
        found[name] = ExpertWeights(weight.mT if module.is_transposed else weight, bias)
    if joint or not module.has_gate or not _has_default_gate(kind):
        return found
    both = found["gate_up_proj"]
    biases = (None, None) if both.bias is None else both.bias.chunk(2, dim=1)
    gate, up = (ExpertWeights(*each) for each in zip(both.weight.chunk(2, dim=1), biases, strict=True))
    return {"gate_proj": gate, "up_proj": up, "down_proj": found["down_proj"]}


_MOE = "transformers.integrations.moe"


def _has_default_gate(kind: type[nn.Module]) -> bool:
    """Whether gate and up are the halves of one output, and act_fn(gate) * up is what the down projection reads."""
    gate: Any = getattr(kind, "_apply_gate", None)
    return getattr(gate, "__module__", None) == _MOE and gate.__name__ == "_default_apply_gate"

"""Modules of experts of transformers' classes, with random weights, and the same in PIFA form."""

import importlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from pifa_compiler import PifaFactors, factorize
from pifa_compiler.experts import PifaExperts, PifaGroupedLinear, expert_weights

EXPERTS, HIDDEN, INTERMEDIATE = 4, 12, 10

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SIZES = ("intermediate_size", "moe_intermediate_size")
CONFIG = SimpleNamespace(
    **dict.fromkeys(_COUNTS, EXPERTS),
    **dict.fromkeys(_SIZES, INTERMEDIATE),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **{"hidden_act": "silu", "hidden_activation": "gelu", "mlp_hidden_act": "relu2"},
    **{"swiglu_alpha": 1.7, "swiglu_limit": 1.5, "moe_latent_size": None, "post_norm_eps": 1e-5},
    **{"mlp_gate_softcap": 3.0, "mlp_up_softcap": 3.0, "mlp_softcap": 3.0, "_experts_implementation": "eager"},
)
"""What the experts' classes of transformers read from their models' configs."""


def expert_classes() -> Iterator[type[nn.Module]]:
    """Every class of experts in transformers that its interface dispatches."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "use_experts_implementation" in file.read_text(encoding="utf-8"):
            name = f"transformers.models.{file.parent.name}.{file.stem}"
            for value in vars(importlib.import_module(name)).values():
                is_own = isinstance(value, type) and value.__module__ == name and issubclass(value, nn.Module)
                if is_own and value.forward.__globals__["__name__"] == "transformers.integrations.moe":
                    yield value


def dense_experts(kind: type[nn.Module]) -> nn.Module:
    """Experts of a class, float64, with weights of unit scale."""
    experts = kind(CONFIG).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def routed(tokens: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, two experts for each of them, weights; the last expert gets none."""
    index = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, 2, dtype=dtype)


def grouped_layers(
    experts: nn.Module, names: Collection[str] | None = None, *, rank: int | None = None, joint: bool = False
) -> dict[str, PifaGroupedLinear]:
    """Layers for the projections `names` of experts, all if None, of full rank if None: they change no result."""
    weights = expert_weights(experts, joint=joint)
    assert not isinstance(weights, str), weights
    layers = {}
    for name, each in weights.items():
        if names is None or name in names:
            factors: list[PifaFactors] = [factorize(one, rank=rank or min(one.shape)) for one in each.weight]
            layers[name] = PifaGroupedLinear.from_factors(factors, each.bias)
    return layers


def tiny_mixtral(**changes: object) -> MixtralForCausalLM:
    """A Mixtral of one layer, random weights, in evaluation mode."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    return MixtralForCausalLM(MixtralConfig(**(settings | changes))).eval()


def put_experts_in_pifa_form(
    model: nn.Module, rank: int = 8, names: Collection[str] | None = None, *, joint: bool = False
) -> None:
    """Exchanges the projections `names` of all experts of a model, all if None."""
    for name, module in list(model.named_modules()):
        if not isinstance(expert_weights(module), str):
            model.set_submodule(name, PifaExperts.of(module, grouped_layers(module, names, rank=rank, joint=joint)))

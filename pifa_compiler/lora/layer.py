"""`PifaLora`: a PIFA layer with LoRA adapters beside it."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from ..errors import ConfigError, WeightError
from ..linear import PifaLinear

_FROM_NOTHING = (True, False, "gaussian", "orthogonal")
"""Starts of adapters that do not change the weight beside them."""


def adapted(target: nn.Module, adapter_name: str, **options: Any) -> "PifaLora | None":
    """The layer that PEFT puts in the place of `target`; None where the adapter is to be on a factor, not the layer."""
    return None if options.get("parameter_name") else PifaLora(target, adapter_name, **options)


class PifaLora(Linear):
    """x W^T + bias + sum over the active adapters of scaling B A x, W in PIFA form (LoRA, arXiv 2106.09685).

    PEFT makes these where an adapter is put on a `PifaLinear`. The weight is never put together: the layer computes by
    `pifa::linear`, and adapters add to what it gives. So they cannot be merged into it either; `merge_lora` makes
    another layer of both.

    Raises:
        ConfigError: the configuration asks for adapters that read or change the weight.
    """

    base_layer: PifaLinear

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """None of PEFT's variants: those that there are take the weight to be stored."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PifaLinear)  # noqa: S101  what it is registered for
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter, as PEFT calls it."""
        start = config.init_lora_weights
        if start not in _FROM_NOTHING:
            raise ConfigError(
                f"init_lora_weights={start!r} changes or reads the stored weight, which a PIFA layer has not; "
                "take True or 'gaussian'"
            )
        if config.use_dora:
            raise ConfigError("use_dora=True reads the stored weight, which a PIFA layer has not; take plain LoRA")
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: there is no stored weight to add to.

        Raises:
            WeightError: always, unless there is nothing to merge.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if not set(names) <= set(self.merged_adapters):
            raise WeightError(
                "adapters cannot be added to the weight of a PifaLinear, which has r independent rows and no more: "
                "pifa_compiler.merge_lora(model) makes layers of rank r + r' that hold both, or the nearest of rank r"
            )

    def delta_factors(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What adapters add to the weight, as factors (U [out, r'], V [r', in]) in float64, ranks r' added up."""
        u = [self._weight(self.lora_B, name) * self.scaling[name] for name in names]
        return torch.cat(u, dim=1), torch.cat([self._weight(self.lora_A, name) for name in names])

    @staticmethod
    def _weight(layers: nn.ModuleDict, name: str) -> torch.Tensor:
        weight = layers[name].weight
        assert isinstance(weight, torch.Tensor)  # noqa: S101  of an nn.Linear
        return weight.detach().double()

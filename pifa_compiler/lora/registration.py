"""Makes `LoraConfig` of PEFT know PIFA layers, whichever of the two packages is imported first."""

import functools
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    """Registers `PifaLora` with every `LoraConfig`, now or when PEFT is imported; a second call changes nothing."""
    wrapt.register_post_import_hook(_register, "peft.tuners.lora.config")


def _register(module: ModuleType) -> None:
    config = module.LoraConfig
    usual = config.__post_init__
    if getattr(usual, "knows_pifa", False):
        return

    @functools.wraps(usual)
    def post_init(self: Any) -> None:
        from ..linear import PifaLinear
        from .layer import adapted

        usual(self)
        self._register_custom_module({PifaLinear: adapted})

    post_init.knows_pifa = True  # type: ignore[attr-defined]
    config.__post_init__ = post_init

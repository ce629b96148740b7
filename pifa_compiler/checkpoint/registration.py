"""Makes `from_pretrained` of transformers know PIFA models, whichever of the two packages is imported first.

If transformers' quantizers are loaded, PIFA's are registered at once. If not, a hook waits for them: `import
pifa_compiler` imports nothing but torch.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


def install() -> None:
    """Registers PIFA with transformers, now or when transformers is imported; a second call changes nothing."""
    if _AWAITED in sys.modules:
        register()
    elif _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)


def register() -> None:
    """Registers PIFA with transformers now; imports transformers where nobody has yet."""
    try:
        importlib.import_module(".quantizer", __package__)  # registers itself, and a module is imported once
    except ImportError as error:
        # Raising here would break every import of transformers, for models too that have nothing to do with PIFA.
        warnings.warn(
            f"this transformers cannot load PIFA models ({error}); install transformers 5 or newer", stacklevel=2
        )


class _RegisterAfterImport(MetaPathFinder):
    """Finds the one awaited module as usual, and registers as soon as it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads with the usual loader, puts that one back in its place, takes the hook away and registers."""

    def __init__(self, usual: Loader) -> None:
        self.usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.usual
        module.__loader__ = self.usual
        self.usual.exec_module(module)
        if _HOOK in sys.meta_path:
            sys.meta_path.remove(_HOOK)
        register()


_HOOK = _RegisterAfterImport()

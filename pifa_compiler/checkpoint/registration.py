"""Makes `from_pretrained` of transformers know PIFA models, whichever of the two packages is imported first."""

import importlib
import warnings

import wrapt


def install() -> None:
    """Registers PIFA with transformers, now or when transformers is imported; a second call changes nothing."""
    wrapt.register_post_import_hook(lambda module: register(), "transformers.quantizers.auto")


def register() -> None:
    """Registers PIFA with transformers now; imports transformers where nobody has yet."""
    try:
        importlib.import_module(".quantizer", __package__)  # registers itself, and a module is imported once
    except ImportError as error:
        # Raising here would break every import of transformers, for models too that have nothing to do with PIFA.
        warnings.warn(
            f"this transformers cannot load PIFA models ({error}); install transformers 5 or newer", stacklevel=2
        )

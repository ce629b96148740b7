"""Where a file or folder is to be written: looked at before long work."""

import os
from pathlib import Path

from .errors import PifaError


def check_place(path: str | os.PathLike[str], final: Path, refusal: type[PifaError]) -> Path:
    """The folder that exists and in which `final`, or its parents, will be made.

    Args:
        path: as the user gave it, for the message.
        final: the same, whole and without links.
        refusal: the error to raise.

    Raises:
        PifaError: `refusal`, if nothing can be made there.
    """
    above = next(folder for folder in final.parents if folder.exists())
    if not above.is_dir():
        raise refusal(f"{above} is a file; {path} cannot be made below it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise refusal(f"{above} is not writable; choose another place or change its permissions")
    return above

"""`pifa inspect`: a compressed model layer by layer."""

from typing import Annotated

import typer

from . import tables
from .options import Folder, Json
from .output import print_json, work

EXAMPLE = "Example: pifa inspect smol-pifa"


def inspect_verb(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Compare all tensors with the checksums saved.")] = False,
    as_json: Json = False,
) -> None:
    """Show a compressed model layer by layer."""
    with work(as_json):
        from ..checkpoint.inspect import inspect

        found = inspect(folder, verify=verify)
    if as_json:
        print_json(found.to_dict())
    else:
        tables.layers(found, folder)

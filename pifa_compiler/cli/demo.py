"""`pifa demo`: a small model compressed and compared with what it was."""

from pathlib import Path

from . import tables
from .options import Force, Json, OutputFolder
from .output import print_json, progress, work

EXAMPLE = "Example: pifa demo -o smol-pifa"


def demo_verb(output: OutputFolder = Path("pifa-demo"), force: Force = False, as_json: Json = False) -> None:
    """Compress SmolLM2-135M and compare it with what it was: some minutes, on any CPU."""
    with work(as_json):
        from ..bench.demo import run

        with progress("demo", as_json) as tell:
            result = run(output, overwrite=force, progress=tell)
    if as_json:
        print_json(result.to_dict())
    else:
        tables.demo(result, output)

"""Rows of benchmarks in CSV files, with what they need to be judged later."""

import csv
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import BenchError


@dataclass(frozen=True)
class BenchRow:
    """One measurement; its fields are the columns. A field `a_over_b` is no argument but a_ms / b_ms."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if not each.init:
                above, below = (getattr(self, f"{name}_ms") for name in each.name.split("_over_"))
                object.__setattr__(self, each.name, above / below)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and CSV."""
        return asdict(self)


def provenance() -> dict[str, str]:
    """What a row needs to be judged later: date (UTC), machine, versions, and the commit of a checkout or ""."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": _processor(),
        "torch": torch.__version__,
        "pifa_compiler": version("pifa-compiler"),
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's name, and how many logical ones there are."""
    found = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        found = next(lines, "").partition(":")[2].strip()
    return f"{found or platform.processor() or platform.machine()}, {os.cpu_count()} logical CPUs"


def _commit() -> str:
    """The commit that this file is checked out at, "-dirty" added where the checkout has changes; "" if installed."""
    here = Path(__file__)
    try:
        git = ("git", "-C", str(here.parent))
        # An environment inside some other repository must not lend that one's commit to this package.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)  # noqa: S603
        told = subprocess.run(  # noqa: S603
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


class RowFile:
    """A CSV file that rows are appended to; its header is written with the first row, and has to fit later ones."""

    def __init__(self, path: Path, row_type: type[BenchRow]) -> None:
        """Looks at the file without changing it.

        Raises:
            BenchError: it cannot be written, or its header is another.
        """
        self._path = path
        self._provenance = provenance()
        self._columns = [*self._provenance, *row_type.__dataclass_fields__]
        if not path.parent.is_dir() or path.is_dir():
            raise BenchError(f"{path} cannot be written; name a file in a folder that exists")
        if path.is_file() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                header = next(csv.reader(file), [])
            if header != self._columns:
                raise BenchError(f"{path} has other columns than these rows; name another file or move it away")

    def append(self, row: BenchRow) -> None:
        """Writes one row, in one piece."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({**self._provenance, **row.to_dict()})

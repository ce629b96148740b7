"""Files that rows of benchmarks are kept in, with what each row needs to be judged later.

`CsvRows` appends rows of numbers to a CSV file. `JsonRows` keeps the rows of one setting; a stopped run goes on from
them.
"""

import csv
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..errors import BenchError, CheckpointError, ConfigError
from ..files import check_files, check_opens, resolve, write_whole


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


class CsvRows:
    """A CSV file that rows are appended to; its header is written with the first row, and has to fit later ones."""

    def __init__(self, path: Path, row_type: type[BenchRow]) -> None:
        """Looks at the file without changing it.

        Raises:
            BenchError: it cannot be written, or its header is another.
        """
        self._path = path
        self._provenance = provenance()
        self._columns = [*self._provenance, *row_type.__dataclass_fields__]
        check_opens(path, BenchError)
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


RowType = TypeVar("RowType")


class JsonRows(Generic[RowType]):
    """Rows of one setting in a JSON file, written whole after each row; what else the file holds stays in it.

    Attributes:
        setting: what all rows share, a dataclass.
        rows: those in the file, instances of the row type.
    """

    def __init__(self, path: Path, setting: Any, row_type: type[RowType]) -> None:
        """Reads the file, if it is there.

        Raises:
            ConfigError: it cannot be written, or holds rows of another setting.
            CheckpointError: it is no such file.
        """
        self.setting, self.rows = setting, list[RowType]()
        self._path = resolve(path, ConfigError)
        check_files(path, self._path, refusal=ConfigError)
        self._beside: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = [row_type(**row) for row in found.pop("rows")]
            known = type(setting)(**found.pop("setting"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} holds no rows of `pifa compare` ({error}); give another file") from error
        wanted, made_with = _plain(setting), _plain(known)
        other = [
            f"{name} {made_with[name]!r}, not {wanted[name]!r}" for name in wanted if made_with[name] != wanted[name]
        ]
        if other:
            raise ConfigError(f"{path} was made with {'; '.join(other)}; give another file")
        self.rows, self._beside = rows, found

    def append(self, row: RowType) -> None:
        """Adds a row and writes the file anew."""
        self.rows.append(row)
        content = {**self._beside, "setting": _plain(self.setting), "rows": [_plain(each) for each in self.rows]}
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self._path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return plain

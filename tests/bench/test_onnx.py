import csv
import json
from pathlib import Path

import pytest
import torch
from pifa_compiler.export import build_native
from typer.testing import CliRunner

from pifa_compiler import cli
from pifa_compiler.bench import onnx as bench_onnx
from pifa_compiler.errors import BenchError

pytestmark = pytest.mark.skipif(isinstance(build_native(), str), reason=str(build_native()))


def test_the_verb_prints_and_appends_one_row_a_cell(tmp_path: Path) -> None:
    arguments = ["bench", "onnx", "--dims", "32", "--tokens", "1,3", "--threads", "1", "--seconds", "0", "--json"]
    result = CliRunner().invoke(cli.app, [*arguments, "--csv", str(tmp_path / "rows.csv")])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["d"], row["tokens"], row["rank"], row["threads"]) for row in rows] == [(32, 1, 16, 1), (32, 3, 16, 1)]
    assert all(row[f"{name}_ms"] > 0 for row in rows for name in bench_onnx.VARIANTS)
    written = (tmp_path / "rows.csv").read_text().splitlines()
    assert [row["tokens"] for row in csv.DictReader(written)] == ["1", "3"]


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = bench_onnx.layer_variants

    def wrong(factors):
        found = variants(factors)
        with torch.no_grad():
            found["pifa"].coeff[0, 0] += 1
        return found

    monkeypatch.setattr(bench_onnx, "layer_variants", wrong)
    monkeypatch.setattr(bench_onnx, "interleaved_medians", lambda *_: pytest.fail("timed a wrong result"))
    with pytest.raises(BenchError, match=r"functions.*differ from the dense layer"):
        next(bench_onnx.onnx_rows([32], [4], [1]))

"""The kernels compiled for chips that are not there, in a process without Triton's interpreter."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from triton_interpreter import run_without_interpreter

pytest.importorskip("triton", reason="needs the package triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_figures.py"
CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compiled(*options: str) -> list[dict]:
    done = run_without_interpreter(str(SCRIPT), "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_no_faults(rows: list[dict]) -> None:
    assert rows
    assert [row for row in rows if row["faults"]] == []


@pytest.mark.parametrize("chip", CHIPS)
def test_the_fixed_tiles_keep_what_is_promised(chip: str):
    rows = compiled("--fixed-only", "--chip", chip)
    one_by_one = {"prefill", "decode1", "decode16"}
    siblings = {f"siblings_{name}" for name in one_by_one}
    assert {row["kernel"] for row in rows} == one_by_one | siblings | {"grouped", "basis"}
    assert_no_faults(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_tile_keeps_what_is_promised(chip: str):
    assert_no_faults(compiled("--chip", chip))


FAULTS = """
import dataclasses, sys
sys.path.insert(0, {folder!r})
from kernel_compile import Figures, cases, faults
case = next(c for c in cases() if c.kernel == "prefill" and c.tile.warps == 8)
good = Figures(128, 0, 65536, 0, 64, "mma.sync", 24, 0)
print(faults(case, good))
bad = {{"spills": 32, "tensor_core": 0, "wide": 0, "narrow": 3, "shared": 200000, "registers": 263}}
for name, value in bad.items():
    print(faults(case, dataclasses.replace(good, **{{name: value}})))
"""


def test_each_fault_is_said_with_its_figure():
    done = run_without_interpreter("-c", FAULTS.format(folder=str(SCRIPT.parent)))
    assert done.returncode == 0, done.stderr
    good, *bad = done.stdout.splitlines()
    assert good == "[]"
    for line, words in zip(
        bad,
        ["32 bytes", "no tensor-core", "no global load", "3 global loads", "200000 bytes", "263 registers"],
        strict=True,
    ):
        assert words in line
        assert line.count("', '") == 0


OVERLAPS = """
import itertools, re, sys
sys.path.insert(0, {folder!r})
from kernel_compile import cases, compiled_kernel
names = {{
    "launch_dependents": "signal", "griddepcontrol.wait": "wait", "prefetch.global": "prefetch",
    "ld.global": "load", "cp.async.c": "load",
}}
seen = set()
for case in cases(fixed_only=True):
    if case.chip == "sm_90" and case.dependent and (case.kernel, case.product) not in seen:
        seen.add((case.kernel, case.product))
        kernel = compiled_kernel(case)
        found = re.findall("|".join(names), kernel.asm["ptx"])
        events = [name for name, _ in itertools.groupby(names[each] for each in found)]
        print(case.product, kernel.metadata.launch_pdl, *events)
"""


def test_overlapping_launches_wait_before_they_read_and_ask_for_their_weights_before_that():
    done = run_without_interpreter("-c", OVERLAPS.format(folder=str(SCRIPT.parent)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 4  # two products; one linear and siblings, over one token and up to 16
    for line in lines:
        product, launched_dependently, *events = line.split(" ")
        if product == "pivots":
            assert (launched_dependently, events) == ("False", ["signal", "load"])
        else:  # programs that put pivots in place wait and load; all others ask for weights, wait and load
            steps = list(pairwise(["", *events]))
            assert (launched_dependently, set(events)) == ("True", {"prefetch", "wait", "load"})
            assert all(before == "wait" for before, event in steps if event == "load")
            assert all(event == "wait" for before, event in steps if before == "prefetch")

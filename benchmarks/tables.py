"""Writes the tables of README.md and docs/ from the rows in benchmarks/results and from the command line itself.

    python benchmarks/tables.py [--check]

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`, and is what `TABLES[NAME]`
gives. With --check nothing is written: files that would change are named, and the exit code is 1.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- end of table -->)", re.DOTALL)

METHODS = ("two-sided", "optimal", "mpifa+owl", "mpifa", "svd-llm", "asvd", "svd")
PRUNERS = ("sparsegpt-2:4", "wanda-2:4")
PRUNED = 0.5625  # of the bytes in half precision, which is what 2:4 pruning stores


def documents() -> list[Path]:
    """The files that tables are written into."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """A document with all of its tables as they have to be.

    Raises:
        KeyError: a table of a name that there is not.
    """
    return _TABLE.sub(lambda found: found[1] + TABLES[found["name"]]().rstrip() + "\n" + found[4], text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table; its last `numbers` columns are numbers, to the right."""
    words = len(header) - numbers
    lines = [header, ["---"] * words + ["---:"] * numbers, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quality() -> str:
    """Perplexity of SmolLM2 on WikiText-2, by method and density."""
    setting, rows = _compared("compare.json")
    (text,) = setting["tests"]
    found = {(row["method"], row["density_asked"]): row["perplexity"][text] for row in rows}
    found.update({(name, PRUNED): found.pop((name, None)) for name in PRUNERS})
    densities = sorted({density for _, density in found if density is not None}, reverse=True)
    best = {density: min(value for (_, at), value in found.items() if at == density) for density in densities}
    lines = []
    for name in (*METHODS, *PRUNERS):
        cells = [found.get((name, density)) for density in densities]
        marked = [_bold(cell, cell == best[density]) for cell, density in zip(cells, densities, strict=True)]
        lines.append([f"`{name}`", *marked])
    dense = f"The dense model has {_perplexity(found['dense', None])}. {_of(setting, rows)}"
    return f"{dense}\n\n{table(['density', *map(str, densities)], lines, len(densities))}"


def domains() -> str:
    """Perplexity where the text to calibrate on and the text to measure on are of two kinds."""
    methods = METHODS[:5]
    dense, lines = {}, []
    for file, named in (("compare.json", "WikiText-2"), ("compare_pydoc.json", "pydoc")):
        _, rows = _compared(file)
        for test, test_name in (("pydoc", "pydoc"), ("wiki.test.raw", "WikiText-2")):
            if named == test_name == "WikiText-2":
                continue  # the table of `quality`
            dense[test_name] = rows[0]["perplexity"][test]
            for density in (0.8, 0.5):
                found = {row["method"]: row["perplexity"].get(test) for row in rows if row["density_asked"] == density}
                least = min(value for value in found.values() if value is not None)
                cells = [_bold(found.get(name), found.get(name) == least) for name in methods]
                place = f"{test_name}, held out" if named == test_name else test_name
                lines.append([named, place, str(density), *cells])
    names = " and ".join(f"{_perplexity(value)} on {name}" for name, value in dense.items())
    header = ["calibrated on", "measured on", "density", *(f"`{name}`" for name in methods)]
    return f"The dense model has {names}.\n\n{table(header, lines, len(methods) + 1)}"


def quality_rows() -> str:
    """Where every row of `compare` comes from."""
    lines = []
    for file in ("compare.json", "compare_pydoc.json"):
        setting, rows = _compared(file)
        for row in rows:
            density = "" if row["density_asked"] is None else str(row["density_asked"])
            cost = [f"{row['seconds']:.0f}", f"{row['shared_seconds']:.0f}"] if row["method"] != "dense" else ["", ""]
            where = "CPU" if row["device"] == "cpu" else row["device"]
            origin = row["provenance"]
            commit = origin.get("recorded_by", origin.get("commit"))
            lines.append([
                _text(setting["calibration"]), f"`{row['method']}`", where, commit, origin["date"],
                density, f"{row['stored']:.4f}", str(row["threads"]), *cost,
            ])  # fmt: skip
    header = [
        "calibrated on", "method", "device", "recorded by", "on", "density", "stored", "threads", "s", "shared s"
    ]  # fmt: skip
    return table(header, lines, 5)


def quality_data() -> str:
    """The files that `compare` was given."""
    hashes = {**_json("compare.json")["sha256"], **_json("compare_pydoc.json")["sha256"]}
    return table(["file", "SHA-256"], [[f"`{name}`", f"`{found}`"] for name, found in hashes.items()])


def architectures() -> str:
    """The architectures that tests/test_architectures.py goes through."""
    sys.path.insert(0, str(ROOT / "tests"))
    from architectures import ARCHITECTURES

    kinds: dict[str, list[str]] = {}
    for each in ARCHITECTURES:
        kinds.setdefault(each.kind, []).append(each.shown)
    return table(["", "architectures"], [[kind, ", ".join(names)] for kind, names in kinds.items()])


def speed_models() -> str:
    """Whole models, beside the dense ones and beside low-rank pairs of the same ranks."""
    rows = _csv("bench_model.csv")
    lines = []
    for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = {row["phase"]: row for row in rows if (row["model"], row["dtype"]) == (name, dtype)}
        ratios = [own[phase][ratio] for phase in ("prefill", "decode") for ratio in _RATIOS]
        lines.append([_shape(name), dtype, *(f"{float(ratio):.3f}" for ratio in ratios)])
    header = ["model", "dtype", "prefill / dense", "/ pairs", "decode / dense", "/ pairs"]
    return f"{_measured_on(rows)}\n\n{table(header, lines, 4)}"


def speed_layers() -> str:
    """Single layers on a CPU, beside the low-rank pair."""
    rows = _csv("bench_layer.csv")
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    cells = {(row["dtype"], row["d"], row["tokens"]): float(row["pifa_over_lowrank"]) for row in rows}
    lines = [
        [dtype, d, *(f"{cells[dtype, d, count]:.3f}" for count in tokens)]
        for dtype, d in dict.fromkeys((row["dtype"], row["d"]) for row in rows)
    ]
    plain = [float(row["plain_ms"]) / float(row["lowrank_ms"]) for row in rows]
    above = [f"{value:.3f} in {dtype} at d = {d} and {n} tokens" for (dtype, d, n), value in cells.items()
             if value > 0.88]  # fmt: skip
    summary = (
        f"Geometric mean {_geometric_mean(cells.values()):.3f}; of the plain subgraph under Inductor "
        f"{_geometric_mean(plain):.3f}. Cells above 0.88, of {len(cells)}: {', '.join(above) or 'none'}."
    )
    header = ["dtype", "d", *_token_columns(tokens)]
    return f"{_measured_on(rows)}\n\n{table(header, lines, len(tokens))}\n{summary}\n"


def speed_gpu() -> str:
    """One layer on a GPU: the rows of the last commit that was timed."""
    rows = _csv("gpu.csv")
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    by = {(int(row["tokens"]), int(row["d"])): row for row in rows}
    sizes = sorted({d for _, d in by})
    lines = []
    for count in sorted({count for count, _ in by}):
        cells = []
        for d in sizes:
            names = ("pifa_ms", "pifa_no_order_ms", "lowrank_ms", "dense_ms")
            pifa, alone, pair, dense = (_microseconds(by[count, d][name]) for name in names)
            cells.append(f"{pifa} ({alone}), {pair}, {dense}")
        lines.append([str(count), *cells])
    first = rows[0]
    origin = (
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['dtype']}, r = d / 2, commit "
        f"{first['commit']}, {first['date']}. Microseconds: PIFA with an order to undo (without one), pair, dense."
    )
    return f"{origin}\n\n{table(['tokens', *(f'd = {d}' for d in sizes)], lines, len(sizes))}"


def speed_onnx() -> str:
    """One layer in onnxruntime."""
    rows = _csv("bench_onnx.csv")
    lines = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        own = [row for row in rows if row["threads"] == threads]
        for name, column in (("native", "native_over_dense"), ("functions alone", "functions_over_dense")):
            lines.append([threads, name, *(f"{float(row[column]):.2f}" for row in own)])
    counts = _token_columns(dict.fromkeys(row["tokens"] for row in rows))
    about = f"d = {rows[0]['d']}, r = {rows[0]['rank']}, float32."
    return f"{about} {_measured_on(rows)}\n\n{table(['threads', 'scatter', *counts], lines, len(counts))}"


def options(*path: str) -> str:
    """The arguments and options of a verb, as the command line has them."""
    from typer.main import get_command

    from pifa_compiler.cli import app

    command: Any = get_command(app)
    for name in path:
        command = command.commands[name]
    lines = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            name, default = f"`{parameter.metavar}`", "" if parameter.required else "none"
        else:
            value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
            written = [*parameter.opts, *parameter.secondary_opts]
            name = ", ".join(f"`{each}{value}`" for each in written)
            unset = parameter.default is None or parameter.default == () or parameter.required
            default = "" if unset or parameter.is_flag else f"`{parameter.default}`"
        annotation = parameter.type_descriptor.annotation
        names = f" One of {', '.join(get_args(annotation))}." if get_origin(annotation) is Literal else ""
        lines.append([name, default, " ".join((parameter.help or "").split()).replace("|", "\\|") + names])
    return table(["argument", "default", "meaning"], lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "architectures": architectures,
    "quality": quality,
    "domains": domains,
    "quality-rows": quality_rows,
    "quality-data": quality_data,
    "speed-models": speed_models,
    "speed-layers": speed_layers,
    "speed-gpu": speed_gpu,
    "speed-onnx": speed_onnx,
    **{
        "-".join(("options", *path)): (lambda path=path: options(*path))
        for path in (
            *(("compress",), ("distill",), ("eval",), ("inspect",), ("generate",), ("compare",), ("demo",)),
            *(("export",), ("bench", "layer"), ("bench", "model"), ("bench", "onnx")),
        )
    },
}
"""By the name in a document's comment."""

_RATIOS = ("pifa_over_dense", "pifa_over_lowrank")
_SHAPES = {"llama-16x2048": "16 layers of Llama's shape, hidden 2048, MLP 8192"}


def _compared(file: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Setting and rows of a file that `pifa compare` keeps."""
    found = _json(file)
    return found["setting"], found["rows"]


def _of(setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted({row["provenance"]["date"].split()[0] for row in rows})
    devices = sorted({"CPU" if row["device"] == "cpu" else row["device"] for row in rows})
    return (
        f"{setting['model']} in {setting['dtype']}, calibrated on {setting['samples']} windows of {setting['seqlen']} "
        f"tokens of {_text(setting['calibration'])} (seed {setting['seed']}), ranks in multiples of "
        f"{setting['rank_multiple']}, measured on the first {setting['windows']} windows of "
        f"{_text(setting['tests'][0])}; {' and '.join(devices)}, {' to '.join(dates)}."
    )


def _text(name: str) -> str:
    return {"wiki.valid.raw": "WikiText-2's validation text", "wiki.test.raw": "its test text"}.get(name, name)


def _token_columns(counts: Iterable[str]) -> list[str]:
    return [f"{count} token{'' if count == '1' else 's'}" for count in counts]


def _shape(model: str) -> str:
    return _SHAPES.get(model, f"{model.removesuffix('/config.json')}'s shape")


def _measured_on(rows: Sequence[Mapping[str, str]]) -> str:
    one = {name: " and ".join(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "torch", "commit")}
    threads = "" if len(each := {row["threads"] for row in rows}) > 1 else f", {each.pop()} threads"
    dates = " and ".join(dict.fromkeys(row["date"].split()[0] for row in rows))
    return f"{one['machine']}{threads}, torch {one['torch']}, commit {one['commit']}, {dates}."


def _perplexity(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e5 and value < 20000 else f"{value:.1e}"


def _bold(value: float | None, best: bool) -> str:
    return f"**{_perplexity(value)}**" if best else _perplexity(value)


def _microseconds(milliseconds: str) -> str:
    value = 1000 * float(milliseconds)
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _json(file: str) -> Any:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def _csv(file: str) -> list[dict[str, str]]:
    with (RESULTS / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    """Parses the options, writes or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is not as it is")
    options = parser.parse_args()
    changed = []
    for file in documents():
        text = file.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            changed.append(str(file.relative_to(ROOT)))
            if not options.check:
                file.write_text(new, encoding="utf-8")
    for name in changed:
        print(f"{name}: {'differs from' if options.check else 'written from'} its rows")
    if options.check and changed:
        sys.exit("run `make docs`")


if __name__ == "__main__":
    main()

"""What the options offer is what the package has."""

import dataclasses
from typing import Any, get_args

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pifa_compiler import CompressConfig
from pifa_compiler.bench import timing
from pifa_compiler.cli import app, options
from pifa_compiler.hf import loading
from pifa_compiler.reconstruction.allocators import ALLOCATORS
from pifa_compiler.reconstruction.methods import METHODS


def parameters(verb: str) -> dict[str, Any]:
    """The options of a verb by their names in Python."""
    group: Any = get_command(app)
    return {parameter.name: parameter for parameter in group.commands[verb].params}


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (options.MethodName, METHODS),
        (options.AllocatorName, ALLOCATORS),
        (options.DtypeName, loading.DTYPES),
        (options.ShortDtypeName, timing.DTYPES),
    ],
)
def test_the_names_offered_are_those_known(offered: Any, known: Any) -> None:
    assert list(get_args(offered)) == list(known)


def test_every_option_of_the_config_is_a_flag_with_the_same_default() -> None:
    flags = parameters("compress")
    renamed = {"ranks": "rank"}  # repeatable, one at a time
    for field in dataclasses.fields(CompressConfig):
        flag = flags[renamed.get(field.name, field.name)]
        if field.name not in ("ranks", "skip"):  # none by default, in a type of their own
            assert flag.default == field.default, field.name


@pytest.mark.parametrize(
    ("verb", "option", "names"),
    [
        ("compress", "--method", METHODS),
        ("compress", "--allocator", ALLOCATORS),
        ("compress", "--pivoting", ("lu", "qr")),
        ("compress", "--dtype", loading.DTYPES),
        ("eval", "--dtype", loading.DTYPES),
        ("export", "--dtype", ("auto", "float32", "float16")),
    ],
)
def test_an_unknown_name_is_refused_with_all_known_ones(verb: str, option: str, names: Any) -> None:
    result = CliRunner().invoke(app, [verb, "no-such-model", option, "magic"])
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2
    assert f"'magic' is not one of {', '.join(map(repr, names))}" in shown


def test_the_help_lists_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)  # no name is broken over two lines
    shown = CliRunner().invoke(app, ["compress", "--help"]).stdout
    for names in (METHODS, ALLOCATORS, ("lu", "qr"), loading.DTYPES):
        assert f"<{'|'.join(names)}>" in shown

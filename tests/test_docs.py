"""The pages are true: their programs run, and docs/api.md names whatever is public."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import fastlstm
import fastlstm.compat
from fastlstm import build
from fastlstm.cli import bench, check, info
from fastlstm.cli.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs" / "api.md").read_text()
PUBLIC = {f"fastlstm.{name}": getattr(fastlstm, name) for name in fastlstm.__all__}


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "docs/guide.md", "docs/migration.md"])
def test_the_programs_of_a_page_run(page: str) -> None:
    """One after the other, as a reader would type them."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def section(heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", API, re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/api.md has no section {heading}"
    return found[1]


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_parameters_are_described(name: str) -> None:
    text, value = section(f"`{name}`"), PUBLIC[name]
    functions = [value.__init__, value.forward] if inspect.isclass(value) else [value]
    for parameter in set().union(*map(parameters, functions)):
        assert re.search(rf"`[^`]*\b{parameter}\b[^`]*`", text), f"{name}: {parameter}"


def test_defaults_are_those_described() -> None:
    for name, value in PUBLIC.items():
        text = section(f"`{name}`").replace("\n", " ")
        for parameter in inspect.signature(value).parameters.values():
            if parameter.default is not parameter.empty:
                default = repr(parameter.default).replace("'", '"')
                assert f"{parameter.name}={default}" in text, f"{name}: {parameter}"


def test_options_of_the_command_line_are_described() -> None:
    text = section("The command line")
    for command in (info, check, bench):
        parser = Parser()
        command.add_arguments(parser)
        name = command.__name__.rpartition(".")[2]
        (described,) = re.findall(rf"`python -m fastlstm {name}([^`]*)`", text)
        options = {option for action in parser._actions for option in action.option_strings}
        assert options - {"-h", "--help"} == set(re.findall(r"--\w+", described)), name


def test_environment_variables_are_described() -> None:
    text, source = section("Environment"), Path(build.__file__).read_text()
    read = set(re.findall(r'(?:environ\.get|_named_library)\("(\w+)"', source))
    assert read == set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    for mode in build.MODES:
        assert f"`{mode}`" in text

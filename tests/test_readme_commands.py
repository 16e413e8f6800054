"""The commands and flags that the README names are those of the parsers, and what `--help` says is said there."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_l2sp import L2SPArguments, cli

from .end_to_end.recipe_harness import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))
LAUNCHERS = ("accelerate launch", "torchrun")


def parser_of(program: str) -> Any:
    return importlib.import_module(program).make_parser()


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def launches() -> list[str]:
    """The command lines of the bash blocks, in one line each and without remarks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(LAUNCHERS)]


def test_recipes_of_the_readme_are_those_that_are_there():
    assert sorted(re.findall(r"^\| `recipes/(\w+)\.py` \|", README, flags=re.MULTILINE)) == PROGRAMS


@pytest.mark.parametrize("line", [line for line in launches() if "recipes/" in line])
def test_commands_of_recipes_are_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    at = next(index for index, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word))
    program = Path(words[at]).stem
    parsed = parser_of(program).parse(words[at + 1 :])
    assert len(parsed) >= 2


def test_there_are_commands_of_most_recipes():
    text = "\n".join(launches())
    assert len([name for name in PROGRAMS if f"recipes/{name}.py" in text]) >= 5


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w-]+)", README))))
def test_flags_in_the_text_exist(flag):
    known = set().union(*(flags_of(parser_of(name)) for name in PROGRAMS))
    for parser in subcommands().values():
        known |= flags_of(parser)
    assert flag in known


def test_every_argument_of_l2sp_is_in_the_table():
    named = {
        name
        for cell in re.findall(r"^\| ((?:`l2sp_\w+`(?:, )?)+) \|", README, flags=re.MULTILINE)
        for name in re.findall(r"\w+", cell)
    }
    assert named == {field.name for field in dataclasses.fields(L2SPArguments)}


def test_every_command_of_hf_l2sp_is_named_with_its_arguments():
    found = {}
    for words in re.findall(r"`hf-l2sp (\w+ [^`]*)`", README):
        parsed = cli.make_parser().parse_args(shlex.split(words))  # or it ends the test
        found[parsed.command] = words.split()[1:]
    for name, parser in subcommands().items():
        metavars = [action.metavar for action in parser._actions if not action.option_strings]
        assert found.pop(name) == metavars, name
    assert not found


def test_what_help_says_first_is_said_in_the_readme():
    for name, parser in subcommands().items():
        assert parser.description is not None
        first = re.split(r"(?<=\.) (?=[A-Z])", parser.description)[0]
        (row,) = re.findall(rf"^\| `hf-l2sp {name} [^|]*\| (.*) \|$", README, flags=re.MULTILINE)
        assert row == first

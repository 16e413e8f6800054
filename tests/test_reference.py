"""The reference `hf_l2sp/API.md` is that of the present docstrings, and the docstrings are about the present code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GENERATOR = ROOT / ".ci" / "api_reference.py"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("api_reference", GENERATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()
MODULES = [importlib.import_module(name) for name in ("hf_l2sp", *(f"hf_l2sp.{name}" for name in generator.MODULES))]


def test_the_reference_is_up_to_date():
    # In a process of its own: an evaluate.Metric, once made, has changed the docstrings of its class.
    done = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_its_place():
    headings = re.findall(r"^### (\w+)$", generator.TARGET.read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = {name for module in MODULES for name in module.__all__}
    assert len(headings) == len(set(headings)) and set(headings) == public and len(public) > 30


@pytest.mark.parametrize("name", sorted({name for module in MODULES for name in module.__all__}))
def test_arguments_in_a_docstring_are_those_of_the_signature(name):
    value = next(getattr(module, name) for module in MODULES if name in module.__all__)
    functions = [value]
    if inspect.isclass(value):
        members = [
            getattr(m, "__func__", m)
            for c in value.__mro__
            if c.__module__.startswith("hf_l2sp")
            for m in vars(c).values()
        ]
        functions = [m for m in members if inspect.isfunction(m) and m.__module__.startswith("hf_l2sp")]
        if generator._has_constructor(value):
            functions.append(value)
    for function in functions:
        told = list(arguments_told_of(generator._own_doc(function)))
        if told:
            taken = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
            assert sorted(told) == sorted(taken), (name, function)


def arguments_told_of(text: str) -> list[str]:
    found = []
    for block in re.findall(r"^Args:\n((?:(?:    .*)?\n?)*)", text, flags=re.MULTILINE):
        found += [name.lstrip("*") for name, _, _ in generator._entries(block.splitlines())]
    return found


# --------------------------------------------------------------------------- the generator


def fake(**members: Any) -> ModuleType:
    """A module `hf_l2sp.fake` that gives out its members."""
    module = ModuleType("hf_l2sp.fake", "What it is for.")
    sys.modules[module.__name__] = module
    for value in members.values():
        value.__module__ = module.__name__
    vars(module).update(members, __all__=sorted(members))
    return module


@pytest.fixture(autouse=True)
def _no_fake_is_left():
    yield
    sys.modules.pop("hf_l2sp.fake", None)


def test_names_without_a_docstring_are_refused():
    class Whole:
        """Has one."""

        def method(self): ...

        @property
        def value(self): ...

        def _private(self): ...

    def function(): ...

    class Inherits(Whole):
        pass

    with pytest.raises(generator.Undocumented) as refused:
        generator.reference([fake(Whole=Whole, function=function, Inherits=Inherits)])
    for name in ("function", "Inherits", "Whole.method", "Whole.value"):
        assert f"hf_l2sp.fake.{name}" in str(refused.value)
    assert "_private" not in str(refused.value)


def test_sections_become_tables():
    def function(first: int | None, *rest: str, key: str = "x") -> float:
        """Does it, see [`function`].

        Args:
            first: One or
                more, `a | b`.
            rest: The rest.
            key (`str`, defaults to `"x"`):
                The key.

        Returns:
            What it is,
            in words.

        Raises:
            ValueError: It is not.

        Example:

            >>> function(1)
            2.0

        Source: somebody, 2018.
        """

    page = generator.reference([fake(function=function)])
    assert 'function(first: int | None, *rest: str, key: str = "x") -> float\n' in page
    assert "| `first` |  | One or more, `a \\| b`. |\n" in page
    assert '| `key` | `str`, defaults to `"x"` | The key. |\n' in page
    assert "\nReturns: What it is, in words.\n" in page
    assert "| error | when |\n| --- | --- |\n| `ValueError` | It is not. |\n" in page
    assert "\n```python\n>>> function(1)\n2.0\n```\n" in page
    assert "\nSource: somebody, 2018.\n" in page
    assert "see [`function`](#function)." in page
    assert "\n## hf_l2sp.fake\n\nWhat it is for.\n" in page


def test_what_is_inherited_is_told_once():
    class _Hidden:
        def inherited(self):
            """Of a base that has no place of its own."""

    class First(_Hidden):
        """The first.

        Its fields.
        """

        def shown(self):
            """Of the first."""

    class Second(First):
        """The second.

        Its fields.
        """

    _Hidden.__module__ = "hf_l2sp.fake"
    page = generator.reference([fake(First=First, Second=Second)])
    assert page.count("`First.shown`") == page.count("`First.inherited`") == 1
    assert "Second.shown" not in page and "Second.inherited" not in page and "_Hidden" not in page
    assert page.count("Its fields.") == 1 and "The fields are those of [`First`](#first)." in page

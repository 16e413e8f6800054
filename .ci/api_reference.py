"""Writes `hf_l2sp/API.md`, the reference of everything public, from signatures and docstrings.

    python .ci/api_reference.py            # make reference
    python .ci/api_reference.py --check    # exit code 1 where the file is out of date

A public name without a docstring is an error in both cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "hf_l2sp" / "API.md"
PACKAGE = "hf_l2sp"
MODULES = ("augment", "distill", "html_report", "metrics", "mixup", "publish")

_INTRODUCTION = """# Reference of hf_l2sp

Made from signatures and docstrings by `make reference`; change those, not this file. Methods that only do the work of
a trainer's method of the same name are left out. Arguments and usage are explained in the README.
"""
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Shape|Source):(.*)$")
# `name: text`, or in the form of TrainingArguments "name (`type`, defaults to `x`):" with the text below.
_ENTRY = re.compile(r"^    ([*\w]+)(?: \((.+?)\))?:(?: (.*))?$")
_WIDTH = 100


class Undocumented(Exception):
    """Public names without a docstring."""


def reference(modules: Iterable[ModuleType]) -> str:
    """The whole page.

    Args:
        modules: With `__all__`; a name that several of them give out is told of once, where it comes first.

    Raises:
        Undocumented: A public name has no docstring.
    """
    names: dict[str, list[str]] = {}
    found: dict[Any, str] = {}
    for module in modules:
        names[module.__name__] = []
        for name in module.__all__:
            value = getattr(module, name)
            if value not in found:
                found[value] = name
                names[module.__name__].append(name)
    missing: list[str] = []
    lines = [_INTRODUCTION]
    for module, own in names.items():
        lines += [f"- `{module}`: " + ", ".join(f"[`{name}`](#{name.lower()})" for name in own)]
    lines.append("")
    values = {name: value for value, name in found.items()}
    for module, own in names.items():
        lines += [f"## {module}", "", *rendered(_own_doc(sys.modules[module])), ""]
        for name in own:
            value = values[name]
            if not _own_doc(value):
                missing.append(f"{module}.{name}")
                continue
            lines += _class(name, value, found, missing) if inspect.isclass(value) else _function(name, value, 3)
    if missing:
        raise Undocumented(f"No docstring: {', '.join(missing)}. Write one: the reference is made from it.")
    page = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
    return re.sub(r"\[`(\w+)`\](?!\()", lambda told: told[0] + f"(#{told[1].lower()})", page)


def _own_doc(value: Any) -> str:
    """The docstring of the object itself; that of a base class would be about something else."""
    text = getattr(value, "__doc__", None)
    if inspect.isclass(value) and "__doc__" not in vars(value):
        text = None
    # What dataclass makes up where there is none.
    made_up = inspect.isclass(value) and str(text).startswith(f"{value.__name__}(")
    return "" if text is None or made_up else inspect.cleandoc(text)


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == PACKAGE


# --------------------------------------------------------------------------- functions and classes


def _function(name: str, value: Any, level: int, owner: str = "") -> list[str]:
    full = f"{owner}.{name}" if owner else name
    return [
        f"{'#' * level} `{full}`" if owner else f"{'#' * level} {full}",
        "",
        "```python",
        _signature(full, value, bound=bool(owner)),
        "```",
        "",
        *rendered(_own_doc(value)),
        "",
    ]


def _class(name: str, cls: type, found: dict[Any, str], missing: list[str]) -> list[str]:
    bases = list(dict.fromkeys(_bases(cls, found)))
    head = [f"class {name}({', '.join(bases)})" if bases else f"class {name}"]
    if _has_constructor(cls):
        head.append(_signature(name, cls))
    lines = [f"### {name}", "", "```python", *head, "```", "", *_class_doc(cls, found), ""]
    for method, value in _members(cls, found, missing):
        if isinstance(value, property):
            lines += [f"#### `{name}.{method}`", "", *rendered(_own_doc(value)), ""]
        else:
            lines += _function(method, getattr(cls, method), 4, name)
    return lines


def _class_doc(cls: type, found: dict[Any, str]) -> list[str]:
    """The docstring; where all but its first paragraph is that of a documented base, a link to it instead."""
    first, _, rest = _own_doc(cls).partition("\n\n")
    for base in cls.__mro__[1:]:
        if rest and base in found and _own_doc(base).partition("\n\n")[2] == rest:
            return [*rendered(first), "", f"The fields are those of [`{found[base]}`](#{found[base].lower()})."]
    return rendered(_own_doc(cls))


def _has_constructor(cls: type) -> bool:
    """Whether it is ours and says more than that it passes on what it is given."""
    if issubclass(cls, BaseException):
        return False
    if dataclasses.is_dataclass(cls):
        return all(_is_ours(base) for base in cls.__mro__ if dataclasses.is_dataclass(base))
    own = next((base for base in cls.__mro__ if "__init__" in vars(base)), object)
    named = [
        p
        for p in inspect.signature(own.__init__).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return _is_ours(own) and not own.__name__.startswith("_") and len(named) > 1


def _bases(cls: type, found: dict[Any, str]) -> Iterator[str]:
    """Names of what a class is built on; of an undocumented base of ours, what that is built on."""
    for base in cls.__bases__:
        if _is_ours(base) and base not in found:
            yield from _bases(base, found)
        elif base is not object:
            yield found.get(base, base.__name__)


def _members(cls: type, found: dict[Any, str], missing: list[str]) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, those of undocumented bases of ours too, in the order of their definition."""
    seen = set()
    for base in cls.__mro__:
        # What a documented class has inherited is told of there.
        elsewhere = any(other is not cls and issubclass(other, base) for other in cls.__mro__ if other in found)
        if not _is_ours(base) or elsewhere:
            continue
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if name in seen or not (getattr(function, "__name__", "") == name or isinstance(value, property)):
                continue
            seen.add(name)
            if base.__name__.startswith("_") and _takes_the_place_of_another(cls, name):
                continue
            if name.startswith("_"):
                # Special methods do what they always do, unless they say more.
                if name == "__call__" and _own_doc(function):
                    yield name, value
            elif _own_doc(function):
                yield name, value
            elif not _takes_the_place_of_another(cls, name):
                missing.append(f"{cls.__module__}.{cls.__name__}.{name}")


def _takes_the_place_of_another(cls: type, name: str) -> bool:
    """Whether a class that is not ours has such a member, or for a mixin: `Trainer` has, or is given it."""
    if any(hasattr(base, name) for base in cls.__mro__ if not _is_ours(base)):
        return True
    trainer = importlib.import_module("transformers").Trainer
    return cls.__name__.endswith("Mixin") and (hasattr(trainer, name) or name in inspect.signature(trainer).parameters)


def _signature(name: str, value: Any, bound: bool = False) -> str:
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    parts, keyword_only = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        annotated = p.annotation is not p.empty
        text += f": {_annotation(p.annotation)}" if annotated else ""
        if p.default is not p.empty:
            text += (" = " if annotated else "=") + _default(p.default)
        parts.append(text)
    result = signature.return_annotation
    returns = "" if inspect.isclass(value) or result is signature.empty else f" -> {_annotation(result)}"
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= _WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation).replace("'", '"')


def _default(value: Any) -> str:
    # That of a dataclass field that is made anew for each object.
    if repr(value) == "<factory>":
        return "..."
    return json.dumps(value) if isinstance(value, str) else repr(value)


# --------------------------------------------------------------------------- docstrings


def rendered(text: str) -> list[str]:
    """A Google docstring as lines of Markdown: entries as tables, doctests as code, the rest as it is."""
    lines: list[str] = []
    rest = text.splitlines()
    while rest:
        line = rest.pop(0)
        section = _SECTION.match(line)
        if line.startswith("> "):
            lines += [f"**{line[2:]}**"]
        elif line.startswith(">>> "):
            code = [line, *_taken(rest, lambda following: bool(following.strip()))]
            lines += ["```python", *code, "```"]
        elif section is None or (section[2] and section[1] != "Source"):
            lines.append(line)
        elif section[1] == "Source":
            lines.append(line)
        else:
            block = _taken(rest, lambda following: not following.strip() or following.startswith("    "))
            lines += ["", *_section(section[1], block), ""]
    return lines


def _taken(lines: list[str], fits: Any) -> list[str]:
    """Takes lines away as long as they fit."""
    taken = []
    while lines and fits(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _section(title: str, block: list[str]) -> list[str]:
    if title.startswith("Example"):
        return [f"{title}:", "", *rendered("\n".join(line[4:] for line in block).strip("\n"))]
    if title not in ("Args", "Attributes", "Raises"):
        return [f"{title}: " + " ".join(line.strip() for line in block if line.strip())]
    entries = list(_entries(block))
    typed = any(kind for _, kind, _ in entries)
    what = {"Args": "argument", "Attributes": "attribute", "Raises": "error"}[title]
    head = [what, "type, default", "meaning"] if typed else [what, "when" if title == "Raises" else "meaning"]
    rows = [[f"`{name}`", kind, meaning] if typed else [f"`{name}`", meaning] for name, kind, meaning in entries]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *map(_cells, rows))]


def _cells(row: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _entries(block: list[str]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of each."""
    name, kind, words = "", "", []
    for line in block:
        found = _ENTRY.match(line)
        if found is not None:
            if name:
                yield name, kind, " ".join(words)
            name, kind, words = found[1], found[2] or "", [found[3]] if found[3] else []
        elif line.strip():
            words.append(line.strip())
    if name:
        yield name, kind, " ".join(words)


# --------------------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the file is out of date")
    args = parser.parse_args(argv)
    modules = [importlib.import_module(name) for name in (PACKAGE, *(f"{PACKAGE}.{module}" for module in MODULES))]
    try:
        page = reference(modules)
    except Undocumented as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if not args.check:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != page:
        sys.stderr.write(f"{TARGET.relative_to(ROOT)} is out of date. Run `make reference`.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

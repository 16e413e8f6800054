"""Every message that the README's troubleshooting quotes is one that the source has."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILLED_IN = "…"


def quoted() -> list[tuple[str, str]]:
    """Message and remark, such as whose it is, of each row."""
    (section,) = re.findall(r"^## Troubleshooting\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^\| `([^`]+)`([^|]*)\|", section, flags=re.MULTILINE)


class _Messages:
    """The strings of the source but for docstrings, with `…` for what is filled in, unless that is a constant."""

    def __init__(self, *files: Path) -> None:
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
        self.constants: dict[str, set[str]] = {}
        for node in (node for tree in trees for node in tree.body):
            match node:
                case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(str(text))):
                    self.constants.setdefault(name, set()).add(text)
        self.texts = [text for tree in trees for text in self._texts(tree)]

    def _texts(self, tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                if not isinstance(node, ast.Expr) and isinstance(child, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                    yield re.sub(f"{FILLED_IN}+", FILLED_IN, self._text(child))

    def _text(self, node: ast.AST) -> str:
        match node:
            case ast.Constant(str(text)):
                return text
            case ast.JoinedStr(values):
                return "".join(map(self._text, values))
            case ast.BinOp(left, ast.Add(), right):
                return self._text(left) + self._text(right)
            case ast.FormattedValue(ast.Name(name)) if len(self.constants.get(name, ())) == 1:
                return next(iter(self.constants[name]))
            case _:
                return FILLED_IN

    def has(self, message: str) -> bool:
        return any(message in text for text in self.texts)


@pytest.fixture(scope="module")
def source() -> _Messages:
    return _Messages(*(path for folder in ("hf_l2sp", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))))


@pytest.fixture(scope="module")
def source_of_pytorch() -> _Messages:
    return _Messages(Path(inspect.getfile(torch.optim.Optimizer)))


def test_there_is_something_to_look_up(source):
    assert len(quoted()) >= 25 and len(source.texts) > 1000


@pytest.mark.parametrize(("message", "remark"), quoted())
def test_message_is_in_the_source(source, source_of_pytorch, message, remark):
    assert len(message.replace(FILLED_IN, "")) > 12, "too little to be told from another message"
    looked_up = source_of_pytorch if "of PyTorch" in remark else source
    assert looked_up.has(message), f"no message of the source reads like this: {message}"


def test_another_message_is_not(source):
    message = "l2sp_exclude: … matches no parameter."
    assert source.has(message)
    for other in ("l2sp_exclude: … matches no parameters.", "l2sp_exclude: 'x' matches no parameter."):
        assert not source.has(other)
    assert source.has("… has no l2sp_state.json: it was not saved")  # the constant's value
    assert not source.has("… has no …: it was not saved by an L2SPTrainer")

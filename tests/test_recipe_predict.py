"""Predictions of the recipes, without a model: contradictory arguments, the texts read, the file written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import sentiment  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402
from _recipe_predict import check_predict_arguments, read_texts, write_predictions  # noqa: E402


def check(*argv: str) -> None:
    model, data, augment, predict, settings = sentiment.make_parser().parse(list(argv))
    check_predict_arguments(predict, model, data, augment, settings)


BOTH = ("--predict_file", "in.txt", "--predict_output", "out.jsonl")
ONLY = ("--predict_only", *BOTH, "--model_name_or_path", "somewhere")


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "argv", [(), BOTH, ONLY, (*ONLY, "--l2sp_lambda", "0"), (*BOTH, "--compare", "--shots", "3")], ids=" ".join
)
def test_arguments_that_go_together_pass(argv: tuple[str, ...]) -> None:
    check(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (BOTH[:2], r"--predict_file 'in\.txt' needs --predict_output beside it"),
        (BOTH[2:], r"--predict_output 'out\.jsonl' needs --predict_file beside it"),
        (("--predict_only",), r"--predict_only needs --predict_file IN --predict_output OUT\.jsonl"),
        (("--predict_only", *BOTH[2:]), r"--predict_only needs --predict_file"),
        (("--predict_only", *BOTH[:2]), r"--predict_file 'in\.txt' needs --predict_output"),
        (("--predict_only", *BOTH), r"--predict_only needs --model_name_or_path: the folder of a fine-tuned model"),
        ((*ONLY, "--train_file", "t.csv"), r"trains nothing, so --train_file contradicts it"),
        ((*ONLY, "--test_file", "t.csv"), r"--test_file contradicts it"),
        ((*ONLY, "--dataset_name", "some/set"), r"--dataset_name contradicts it"),
        ((*ONLY, "--shots", "4"), r"--shots contradicts it"),
        ((*ONLY, "--compare"), r"--compare contradicts it"),
        ((*ONLY, "--augment", "swap"), r"--augment contradicts it"),
        ((*ONLY, "--resume_from_checkpoint"), r"--resume_from_checkpoint contradicts it"),
        ((*ONLY, "--push_to_hub"), r"--push_to_hub contradicts it"),
        ((*BOTH[:3], "out.csv"), r"'out\.csv' has the extension '\.csv'.*name a \.jsonl file"),
        (("--predict_file", "in.jsonl", "--predict_output", "./in.jsonl"), r"is also the --predict_file, which would"),
        ((*BOTH, "--train_file", "out.jsonl"), r"is also the --train_file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_contradictory_arguments_are_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(*argv)


def test_an_output_is_overwritten_only_when_told_so(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("dear")
    with pytest.raises(RecipeError, match=r"--predict_output 'out\.jsonl' exists; .*--overwrite_output_dir"):
        check(*BOTH)
    check(*BOTH, "--overwrite_output_dir")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl").touch()
    words = ("--predict_file", "in.jsonl", "--predict_output", "link.jsonl", "--overwrite_output_dir")
    with pytest.raises(RecipeError, match=r"'link\.jsonl' is also the --predict_file"):
        check(*words)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RecipeError, match=r"is a folder"):
        check(*BOTH[:3], "folder.jsonl")


def test_a_folder_that_can_be_made_passes_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*BOTH[:3], "new/deep/out.jsonl")
    assert not (tmp_path / "new").exists(), "made when there is something to write"
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"'file/out\.jsonl' cannot be written: '.*file' is not a folder"):
        check(*BOTH[:3], "file/out.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RecipeError, match=r"cannot be written: .* is not a folder that may be written to"):
        check(*BOTH)


# --------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.txt", "née NA\n 2nd\n"),
        ("in.csv", "id,text\n1,née NA\n2, 2nd\n"),
        ("in.jsonl", '{"text": "née NA", "id": 1}\n{"text": " 2nd"}\n'),
        ("in.json", '[{"text": "née NA"}, {"text": " 2nd"}]'),
    ],
)
def test_texts_are_read_in_their_order(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(name, "text") == ["née NA", " 2nd"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"a\n\nb\n \n", r"--predict_file 'in\.txt': 2 of 4 texts are blank \(rows 2, 4\)"),
        ("in.txt", b"", r"--predict_file 'in\.txt' holds no rows"),
        ("in.txt", "é".encode("latin-1"), r"--predict_file 'in\.txt' is not UTF-8 text"),
        ("in.csv", b"", r"--predict_file 'in\.csv' holds no rows"),
        ("in.csv", b"text\n", r"holds no rows"),
        ("in.csv", b"txt,label\na,b\n", r"has no column 'text' \(--text_column\); it has 'txt', 'label'\. Did you"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"row 2: the text is 3, a int"),
        ("in.jsonl", b'{"text": "a"}\n{"label": "b"}\n', r"row 2: the text is None"),
        ("in.jsonl", b'{"text": "a"}\n{"text"\n', r"line 2: not valid JSON"),
        ("in.md", b"a", r"'in\.md' has the extension '\.md'; give one of \.csv, .*\.txt"),
    ],
)
def test_unfit_texts_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_texts(name, "text")


def test_a_missing_file_of_texts_is_named() -> None:
    with pytest.raises(RecipeError, match=r"--predict_file 'in\.txt' does not exist"):
        read_texts("in.txt", "text")


# --------------------------------------------------------------------------- writing


def test_predictions_are_written_as_utf8_lines_into_a_new_folder(tmp_path: Path) -> None:
    rows = [{"text": "née \u2028 \n", "score": 0.5}, {"text": "b", "scores": {"ü": 1.0}}]
    write_predictions("new/deep/out.jsonl", rows)
    content = (tmp_path / "new/deep/out.jsonl").read_bytes().decode("utf-8")
    assert [json.loads(line) for line in content.split("\n")[:-1]] == rows and content.endswith("}\n")
    assert "née" in content and "ü" in content
    assert [path.name for path in (tmp_path / "new/deep").iterdir()] == ["out.jsonl"]


def test_an_interrupted_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("old")

    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions("out.jsonl", rows())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.jsonl": "old"}


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"--predict_output 'file/out\.jsonl' cannot be written: "):
        write_predictions("file/out.jsonl", [])

"""Texts of files of any size: every format, what is refused, and that no file is held as a whole."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _mlm_files  # noqa: E402
from _mlm_files import stream_texts  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402

TEXTS = ["NA", 'two, "quoted"\nlines', "dé jà vu \u2028 end", "[bracket", "{brace"]


def texts_of(path: Path, **options: Any) -> list[str]:
    return list(stream_texts(str(path), "--train_file", "text", **options))


def write_jsonl(path: Path, texts: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")


def write_list(path: Path, texts: Iterable[Any]) -> None:
    path.write_text("\ufeff " + json.dumps([{"text": text, "n": [1, {"a": "]"}]} for text in texts], indent=1))


def write_csv(path: Path, texts: Iterable[str]) -> None:
    rows = "".join('1,"{}"\n'.format(text.replace('"', '""')) for text in texts)
    path.write_text("\ufeffid,text\n" + rows, encoding="utf-8")


def write_parquet(path: Path, texts: Iterable[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)


WRITERS: dict[str, Callable[[Path, Iterable[Any]], None]] = {
    "a.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "list.json": write_list,
    "list.jsonl": write_list,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_texts_in_order(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    assert texts_of(tmp_path / name) == TEXTS


def test_a_line_of_a_txt_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone\r\n\n  \ntwo \u2028 parts\nlast".encode())
    assert texts_of(path) == ["one", "", "", "two \u2028 parts", "last"]


def test_blank_lines_separate_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n \none\nmore\n\n\n  \ntwo\n\nlast\nlines")
    assert texts_of(path, paragraphs=True) == ["one\nmore", "two", "last\nlines"]


def test_missing_and_blank_values_are_blank_texts(tmp_path: Path) -> None:
    for name, values in {
        "a.jsonl": ["x", None, " "],
        "a.parquet": ["x", None, "\t"],
        "list.json": ["x", "", None],
    }.items():
        WRITERS[name](tmp_path / name, values)
        assert texts_of(tmp_path / name) == ["x", "", ""]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"other": 1}\n')
    assert texts_of(tmp_path / "b.jsonl") == ["x", ""]


@pytest.mark.parametrize("chunk", [1, 2, 7, 30])
def test_a_json_list_is_read_in_pieces_of_any_size(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mlm_files, "_CHUNK", chunk)
    write_list(tmp_path / "a.json", [*TEXTS, "long " * 50])
    assert texts_of(tmp_path / "a.json") == [*TEXTS, "long " * 50]
    (tmp_path / "b.json").write_text("[]")
    assert texts_of(tmp_path / "b.json") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"--train_file '.*none\.txt' does not exist"),
        ("a.doc", "x", r"extension '\.doc'; give one of \.txt, \.jsonl, \.json, \.csv, \.parquet"),
        (
            "a.jsonl",
            '{"txt": "x"}',
            r"no column 'text' \(--text_column\); it has 'txt'\. Did you mean --text_column txt",
        ),
        ("a.csv", "txt,b\n1,2", r"no column 'text' \(--text_column\); it has 'txt', 'b'"),
        ("a.csv", "text,b\n1,2,3", r"line 2: 3 cells, but the header has 2"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": 3.5}', r"line 3: the text is 3\.5, a float, not a string"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"line 2: not valid JSON"),
        ("a.jsonl", '{"text": "\\ud800"}', r"line 1: the text holds half a character"),
        ("a.jsonl", '"x"', r"line 1 is 'x', not an object"),
        ("a.json", '[{"text": "x"}, 7]', r"row 2 is 7, not an object"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', r"row 1: not valid JSON \(no comma or \] after it"),
        ("a.json", '[{"text": "x"}, {"text": }]', r"row 2: not valid JSON \(Expecting value"),
        ("a.json", '[{"text": "x"}', r"row 1: not valid JSON"),
        ("a.json", '[{"text": "x"},', r"row 2: not valid JSON \(the list has no end"),
        ("a.json", '[{"text": "x"}] 1', r"something follows the list"),
        ("a.parquet", "x", r"is not a parquet file"),
        ("a.txt", b"\xff\xfe", r"is not UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "list.json", "a.csv"])
def test_no_file_is_held_as_a_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mlm_files, "_CHUNK", 1 << 14)
    text, count = "word " * 200, 4000  # 4 MB
    if name == "a.txt":
        (tmp_path / name).write_text(f"{text}\n" * count)
    else:
        WRITERS[name](tmp_path / name, [text] * count)
    size = (tmp_path / name).stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_texts(str(tmp_path / name), "--train_file", "text")) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 4e6 and peak < size / 20

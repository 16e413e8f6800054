"""Texts of files of any size, one after the other: never more than a piece of a file is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet
from _recipe_args import RecipeError
from _recipe_files import (
    check_is_file,
    check_parquet_columns,
    csv_rows,
    did_you_mean,
    listed,
    parse_json,
    reading_parquet,
    shown,
    too_much,
)

# Where a text is found in its file, and what is there.
Place = tuple[str, Any]
_CHUNK = 1 << 20  # characters of a JSON list
_WHITE = re.compile(r"[ \t\n\r]*")


def stream_texts(path: str, flag: str, column: str, paragraphs: bool = False) -> Iterator[str]:
    """The texts of a file in its order, blank ones as empty strings.

    A txt file has a text on every line, or with `paragraphs` one between blank lines. The others have it in a column;
    a missing value counts as a blank text.

    Args:
        path: A txt, jsonl, json, csv or parquet file, told by its extension.
        flag: The argument that names it, for messages.
        column: Name of the column.
        paragraphs: Whether blank lines separate the texts of a txt file.

    Raises:
        RecipeError: no such file, another extension, no such column, a value that is no text, or a content that
            cannot be read (with its place).
    """
    file, name = Path(path), f"{flag} {path!r}"
    readers: dict[str, Callable[..., Iterator[Place]]] = {
        ".txt": _paragraphs if paragraphs else _lines,
        ".jsonl": _json,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    check_is_file(file, name)
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise RecipeError(f"{name} has the extension {file.suffix!r}; give one of {', '.join(readers)}.")
    try:
        for place, text in reader(file, name, column):
            yield checked_text(text, f"{name}, {place}", column)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error}.") from error


def checked_text(text: Any, where: str, column: str) -> str:
    """A text, empty where it is missing or blank; raises `RecipeError` for what is none."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise RecipeError(
            f"{where}: the text is {shown(text)}, a {type(text).__name__}, not a string; is {column!r} the column of "
            "the texts (--text_column)?"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # \ud800 and the like, which JSON can hold and tokenizers cannot read
        raise RecipeError(f"{where}: the text holds half a character ({error.reason}); mend it.") from error
    return text if not text.isspace() else ""


def no_column(name: str, column: str, present: list[str]) -> RecipeError:
    """The error for data that have no such column."""
    hint = did_you_mean("text_column", column, present)
    return RecipeError(f"{name} has no column {column!r} (--text_column); it has {listed(present) or 'none'}.{hint}")


def _lines(path: Path, name: str, column: str) -> Iterator[Place]:
    with path.open(encoding="utf-8-sig") as file:  # \r\n and \r end a line too
        for number, line in enumerate(file, start=1):
            yield f"line {number}", line.removesuffix("\n")


def _paragraphs(path: Path, name: str, column: str) -> Iterator[Place]:
    lines: list[str] = []
    place = ""
    for where, line in _lines(path, name, column):
        if line and not line.isspace():
            place = place if lines else where
            lines.append(line)
        elif lines:
            yield place, "\n".join(lines)
            lines = []
    if lines:
        yield place, "\n".join(lines)


def _csv(path: Path, name: str, column: str) -> Iterator[Place]:
    rows = csv_rows(path, name)
    _, columns = next(rows)
    if columns and column not in columns:
        raise no_column(name, column, columns)
    for line, cells in rows:
        yield f"line {line}", cells[columns.index(column)]


def _parquet(path: Path, name: str, column: str) -> Iterator[Place]:
    with reading_parquet(name), pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        check_parquet_columns(columns, name)
        if column not in columns:
            raise no_column(name, column, columns)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(column).to_pylist():
                number += 1
                yield f"row {number}", value


# --------------------------------------------------------------------------- JSON


def _json(path: Path, name: str, column: str) -> Iterator[Place]:
    """A list of objects, or one object per line: both are found under both extensions."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start != "[":
            file.seek(0)
        rows = _listed_objects(file, name) if start == "[" else _objects_of_lines(file, name)
        for number, (place, row) in enumerate(rows):
            if not isinstance(row, dict):
                raise RecipeError(
                    f'{name}, {place} is {shown(row)}, not an object; write rows of the form {{"{column}": ...}}, one '
                    "per line or in a list."
                )
            if number == 0 and column not in row:
                raise no_column(name, column, list(row))
            yield place, row.get(column)


def _objects_of_lines(file: TextIO, name: str) -> Iterator[Place]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", parse_json(line, name, number)


def _listed_objects(file: TextIO, name: str) -> Iterator[Place]:
    """The items of a JSON list, behind its bracket, of which a chunk is read at a time."""
    decode = json.JSONDecoder().raw_decode
    text, number = file.read(_CHUNK), 0
    at = _gap(text, 0)
    while True:
        item, end, problem = None, at, "the list has no end"
        done = text.startswith("]", at)
        if not done and at < len(text):
            try:
                item, end = decode(text, at)
                end = _gap(text, end)
                problem = "no comma or ] after it"
            except json.JSONDecodeError as error:
                problem = error.msg
            except (RecursionError, ValueError) as error:
                raise RecipeError(f"{name}, row {number + 1}: {too_much(error)}") from error
        if done:
            if text[at + 1 :].strip() or file.read().strip():
                raise RecipeError(f"{name}: not valid JSON (something follows the list).")
            return
        if end > at and text[end : end + 1] in (",", "]"):
            number += 1
            yield f"row {number}", item
            at = _gap(text, end + 1) if text[end] == "," else end
            continue
        # What is there may be the beginning of an item. As much again, so that a long one is not decoded many times.
        more = "" if at < end < len(text) else file.read(max(_CHUNK, len(text) - at))
        if not more:
            raise RecipeError(f"{name}, row {number + 1}: not valid JSON ({problem}).")
        text, at = text[at:] + more, 0
        at = _gap(text, at)


def _gap(text: str, at: int) -> int:
    """The place of the next character that is no white space."""
    return _WHITE.match(text, at).end()  # type: ignore[union-attr]

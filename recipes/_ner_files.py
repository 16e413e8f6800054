"""Reading named-entity data: CoNLL files, json, jsonl and parquet with lists of tokens and tags, and the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from _ner_tags import split_tag
from _recipe_args import DataArguments, RecipeError
from _recipe_files import (
    Table,
    check_is_file,
    did_you_mean,
    listed,
    noted_features,
    read_file,
    read_hub_dataset,
    reading_parquet,
    shown,
)

CONLL = (".conll", ".bio", ".iob", ".tsv", ".txt")
OTHERS = (".json", ".jsonl", ".parquet")
_DOCUMENT = re.compile(r"-DOCSTART-(?![^ \t])")


@dataclass
class Row:
    """One sentence as it was read, not yet checked.

    Attributes:
        tokens, tags: What the file has for them, lists if all is well; no tags where none are asked for.
        places: Where it is in the file: the line of each token in a CoNLL file, otherwise one place.
        by_token: Whether there is a place per token.
    """

    tokens: Any
    tags: Any
    places: list[str]
    by_token: bool = False

    def at(self, index: int | None = None) -> str:
        """Where the sentence, or its token `index`, is found in the file."""
        if index is None:
            return self.places[0]
        return self.places[index] if self.by_token else f"{self.places[0]}, token {index + 1}"


def read_ner_file(path: str, flag: str, columns: tuple[str, str], scheme: str, tagged: bool = True) -> list[Row]:
    """Reads the sentences of a file, which the argument `flag` names.

    Args:
        path: A file of one of the formats, told by its extension.
        flag: The argument that names it, for messages.
        columns: Names of the columns of tokens and tags; of no meaning in CoNLL files.
        scheme: Tag scheme, which tells a comment from a token `#` in CoNLL files.
        tagged: Whether the tags are read; without them a CoNLL file may have a single column.

    Raises:
        RecipeError: no such file, another extension, or a content that cannot be read.
    """
    file, name = Path(path), f"{flag} {path!r}"
    suffix = file.suffix.lower()
    check_is_file(file, name)
    if suffix not in CONLL + OTHERS:
        raise RecipeError(
            f"{name} has the extension {file.suffix!r}; give {', '.join(OTHERS)} (lists of tokens and tags), or "
            f"{', '.join(CONLL)} (a token and its tag per line)."
        )
    if suffix in CONLL:
        return parse_conll(_text(file, name), name, scheme, tagged)
    columns = columns if tagged else columns[:1]
    places = None
    if suffix != ".parquet":
        text = _text(file, name)
        if not text.lstrip().startswith("["):
            places = [f"line {number}" for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    table = read_file(file, columns, flag)
    _check_columns(table, name, columns)
    features = None
    if suffix == ".parquet":
        with reading_parquet(name):
            features = noted_features(pyarrow.parquet.read_schema(file))
    return _rows(table, columns, features, places)


def read_ner_hub(data: DataArguments, columns: tuple[str, str]) -> dict[str, list[Row]]:
    """Reads the splits of a dataset on the Hub; raises `RecipeError` as `read_hub_dataset` does."""
    name, config = str(data.dataset_name), data.dataset_config_name
    tables = read_hub_dataset(name, config, columns)
    for split, table in tables.items():
        _check_columns(table, f"the {split} split of {name!r}", columns)
    # Cached by now. All splits of a dataset have the same columns.
    features = next(iter(datasets.load_dataset(name, config).values())).features
    return {split: _rows(table, columns, features, None) for split, table in tables.items()}


def _text(path: Path, name: str) -> str:
    """The text of a file with line ends as \\n; it is refused, with the line, unless it is UTF-8 without NUL."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}, line {line}: not UTF-8 text (byte {content[error.start]:#04x}); save it as UTF-8."
        ) from error
    text = re.sub(r"\r\n?", "\n", text)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise RecipeError(f"{name}, line {line}: a NUL byte, so this is no text or it is damaged; save it as UTF-8.")
    return text


def _check_columns(table: Table, name: str, columns: Sequence[str]) -> None:
    present, values = table
    for flag, column in zip(("tokens_column", "tags_column"), columns, strict=False):
        if column not in values and present:
            raise RecipeError(
                f"{name} has no column {column!r} (--{flag}); it has {listed(present)}."
                + did_you_mean(flag, column, present)
            )


def _rows(table: Table, columns: Sequence[str], features: Any, places: list[str] | None) -> list[Row]:
    tokens = table[1].get(columns[0], [])
    tags = table[1].get(columns[1], []) if len(columns) > 1 else [None] * len(tokens)
    # Lists of class ids come as integers, also where the file knows the names.
    feature = features[columns[1]] if features and len(columns) > 1 and columns[1] in features else None
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(item, datasets.ClassLabel):
        tags = [[_class_name(item, tag) for tag in row] if isinstance(row, list) else row for row in tags]
    places = places or [f"row {number}" for number in range(1, len(tokens) + 1)]
    return [Row(*values[:2], [values[2]]) for values in zip(tokens, tags, places, strict=True)]


def _class_name(feature: datasets.ClassLabel, tag: Any) -> Any:
    return feature.int2str(tag) if isinstance(tag, int) and 0 <= tag < feature.num_classes else tag


# --------------------------------------------------------------------------- CoNLL


def parse_conll(text: str, name: str, scheme: str, tagged: bool = True) -> list[Row]:
    """The sentences of a CoNLL text: a token per line, its tag in the last column, a blank line between sentences.

    Columns are separated by tabs, or, if the first line has none, by spaces; every line has as many as the first.
    Other white space, such as a no-break space, may be part of a token. `-DOCSTART-` lines are passed over. Before a
    sentence, lines that start with `#` are comments, unless they have as many columns as the others and end in a tag:
    a token may start with `#`. Without tags one column is enough, and then `# ` begins a comment.

    Raises:
        RecipeError: a line of another form.
    """
    # Not str.splitlines, which also cuts at separators that may be part of a token.
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    tokens = [line for line in lines if line and not _DOCUMENT.match(line)]
    first = next((line for line in tokens if not line.startswith("#")), tokens[0] if tokens else "")
    by_tabs = "\t" in first
    width = len(_columns(first, by_tabs))
    rows: list[Row] = []
    within = False  # a sentence
    for number, line in enumerate(lines, start=1):
        cells = _columns(line, by_tabs)
        if not line or _DOCUMENT.match(line):
            within = False
        elif within or not _is_comment(line, cells, width, scheme):
            _check_line(f"{name}, line {number}", line, cells, width, by_tabs, tagged)
            if not within:
                rows.append(Row([], [], [], by_token=True))
            within = True
            rows[-1].tokens.append(cells[0])
            rows[-1].tags.append(cells[-1])
            rows[-1].places.append(f"line {number}")
    return rows


def _columns(line: str, by_tabs: bool) -> list[str]:
    return [cell.strip(" ") for cell in line.split("\t")] if by_tabs else re.split(" +", line.lstrip(" "))


def _is_comment(line: str, cells: Sequence[str], width: int, scheme: str) -> bool:
    if not line.startswith("#"):
        return False
    of_a_token = len(cells) == width and (split_tag(cells[-1], scheme) is not None or not line.startswith("# "))
    return not of_a_token


def _check_line(where: str, line: str, cells: Sequence[str], width: int, by_tabs: bool, tagged: bool) -> None:
    separator = "tabs" if by_tabs else "spaces"
    if width == 1 and tagged:
        raise RecipeError(f"{where}: {shown(line)} has one column; write a token, a tab or spaces, and its tag.")
    if len(cells) != width:
        raise RecipeError(
            f"{where}: {shown(line)} has {len(cells)} columns, but the first line has {width}, separated by "
            f"{separator}; every line needs a token first{' and its tag last' if tagged else ''}."
        )
    if not cells[0]:
        raise RecipeError(f"{where}: {shown(line)} has no token; drop the line or write the token.")

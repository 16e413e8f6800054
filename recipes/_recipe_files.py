"""Reading the data of the recipes: csv, json, jsonl, parquet and txt files, and datasets on the Hub."""

from __future__ import annotations

import csv
import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
from _recipe_args import RecipeError, closest
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

# All column names, and the values of the wanted columns that exist.
Table = tuple[list[str], dict[str, list[Any]]]

# What Hub datasets call the three splits.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def shown(value: Any) -> str:
    """`value` for an error message: quoted and short."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(items: Iterable[Any], limit: int = 8) -> str:
    """`items` for an error message: the first `limit`, and how many more there are."""
    items = [shown(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def did_you_mean(flag: str, name: str, present: Iterable[str]) -> str:
    """The end of a message about a column that is not there: the argument with the name that was probably meant."""
    near = closest(name, present)
    return f" Did you mean --{flag} {shlex.quote(near)}?" if near and near.isprintable() else ""


def read_file(path: str | Path, wanted: Sequence[str], flag: str = "", lines: bool = False) -> Table:
    """Reads the columns `wanted` of a csv, json, jsonl or parquet file.

    Args:
        path: Path of the file.
        wanted: Names of the columns.
        flag: The argument that names the file.
        lines: Whether it may also be a txt file, whose lines are the values of the first column.

    Raises:
        RecipeError: no such file, an unknown extension, or a content that cannot be read (with the line if known).
    """
    path = Path(path)
    name = f"{flag} {str(path)!r}".lstrip()
    check_is_file(path, name)
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_parquet}
    if lines:
        readers[".txt"] = _read_lines
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"{name} has the extension {path.suffix!r}; give one of {', '.join(readers)}.")
    try:
        return reader(path, name, wanted)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error}.") from error


def check_is_file(path: Path, name: str) -> None:
    """Raises `RecipeError` unless `path`, which messages call `name`, is a file."""
    try:
        if not path.is_file():
            raise RecipeError(f"{name} {missing_path(path)}")
    except OSError as error:  # too long a name, a folder that may not be looked into
        raise RecipeError(f"{name} cannot be looked up ({error.strerror}); check the path.") from error


def missing_path(path: Path) -> str:
    """Why `path` is no file, with what its folder holds that was probably meant."""
    if path.is_dir():
        return "is a folder; give a file."
    if path.exists():
        return "is no regular file (a device or a pipe); give a file."
    if not path.parent.is_dir():
        return f"does not exist, nor does its folder; relative paths start at {str(Path.cwd())!r}."
    present = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, present, n=3, cutoff=0.5) or present
    return f"does not exist; {f'its folder has {listed(near)}' if near else 'its folder is empty'}."


def csv_rows(path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file one after the other, the header first, each with the line that it ends on.

    Raises:
        RecipeError: it is no valid CSV, or a row has more or fewer cells than the header.
    """
    # Not pandas: it turns the texts NA, None and null into missing values, and the label 01 into 1.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            if len(set(columns)) < len(columns):
                raise RecipeError(f"{name}: the header names a column twice ({listed(columns)}).")
            yield reader.line_num, columns
            for cells in reader:
                if not cells:
                    continue  # a blank line
                if len(cells) != len(columns):
                    raise RecipeError(
                        f"{name}, line {reader.line_num}: {len(cells)} cells, but the header has "
                        f"{len(columns)}; put a text that contains commas or line breaks in double quotes."
                    )
                yield reader.line_num, cells
        except csv.Error as error:
            raise RecipeError(f"{name}, line {reader.line_num}: not valid CSV ({error}).") from error


def _read_csv(path: Path, name: str, wanted: Sequence[str]) -> Table:
    rows = csv_rows(path, name)
    _, columns = next(rows)
    found = {column: columns.index(column) for column in wanted if column in columns}
    values: dict[str, list[Any]] = {column: [] for column in found}
    for _, cells in rows:
        for column, index in found.items():
            values[column].append(cells[index])
    return columns, values


def _read_json(path: Path, name: str, wanted: Sequence[str]) -> Table:
    """A list of objects, or one object per line: both are found under both extensions."""
    text = path.read_text(encoding="utf-8-sig")
    whole = text.lstrip().startswith("[")
    rows: list[Any] = []
    # Not str.splitlines, which also cuts at separators that a JSON string may hold as they are.
    for number, line in enumerate([text] if whole else text.split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, name, None if whole else number)
        rows.extend(row if whole else [row])
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise RecipeError(
                f"{name}, row {number} is {shown(row)}, not an object; write rows of the form "
                '{"text": ..., "label": ...}, one per line or in a list.'
            )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if rows and not columns:
        raise RecipeError(f"{name}: all of its {len(rows)} rows are empty objects; give them columns.")
    return columns, {column: [row.get(column) for row in rows] for column in wanted if column in columns}


def parse_json(text: str, name: str, line: int | None) -> Any:
    """The value of JSON that is `line` of the file that messages call `name`, or with None all of the file.

    Raises:
        RecipeError: it is no JSON, or a value that Python does not read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise RecipeError(f"{name}, line {at}: not valid JSON ({error.msg}).") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{name}{'' if line is None else f', line {line}'}: {too_much(error)}") from error


def too_much(error: Exception) -> str:
    """What is wrong with valid JSON at which Python gives up, and the cure."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply; write flat rows."
    return "an integer has thousands of digits; write it as a string."


def _read_lines(path: Path, name: str, wanted: Sequence[str]) -> Table:
    # Not str.splitlines, which also cuts at separators that a text may hold.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [wanted[0]], {wanted[0]: lines[:-1] if lines[-1] == "" else lines}


def _read_parquet(path: Path, name: str, wanted: Sequence[str]) -> Table:
    with reading_parquet(name):
        schema = pyarrow.parquet.read_schema(path)
        check_parquet_columns(schema.names, name)
        found = [column for column in wanted if column in schema.names]
        table = pyarrow.parquet.read_table(path, columns=found)
        values = {column: table.column(column).to_pylist() for column in found}
        features = noted_features(schema)
    return schema.names, {c: _named(features.get(c), values[c], name) for c in found}


@contextmanager
def reading_parquet(name: str) -> Iterator[None]:
    """Turns whatever pyarrow and `datasets` raise over a damaged file into a `RecipeError`."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # Arrow's errors, KeyError, UnicodeDecodeError, OverflowError, ...: no common class
        # On one line, and without the control characters that may be quoted from the file.
        cause = "".join(c if c.isprintable() else " " for c in str(error))[:200].strip() or type(error).__name__
        raise RecipeError(f"{name} is not a parquet file, or a damaged one ({cause}); write it anew.") from error


def check_parquet_columns(names: Sequence[str], name: str) -> None:
    """Raises `RecipeError` for a column that is there twice."""
    if len(set(names)) < len(names):
        raise RecipeError(f"{name} names a column twice ({listed(names)}); keep one of them.")


def noted_features(schema: pyarrow.Schema) -> dict[str, Any]:
    """The features in a file that `datasets` wrote, which know the names of class labels; empty for other files."""
    by_datasets = b"huggingface" in (schema.metadata or {})
    return dict(datasets.Features.from_arrow_schema(schema)) if by_datasets else {}


def _named(feature: Any, values: list[Any], name: str) -> list[Any]:
    """Class ids as class names; -1 is what benchmarks write where the label is not published."""
    if not isinstance(feature, datasets.ClassLabel):
        return values
    return [class_name(feature, value, f"{name}, row {row}") for row, value in enumerate(values, start=1)]


def class_name(feature: datasets.ClassLabel, value: Any, where: str) -> str | None:
    """The name of a class id, None where there is no class; raises `RecipeError` for the id of none."""
    if value is None or (isinstance(value, int) and value < 0):
        return None
    if not isinstance(value, int) or value >= feature.num_classes:
        raise RecipeError(
            f"{where}: the class {shown(value)} is none of the {feature.num_classes} that the file names "
            f"({listed(feature.names)}); write the file anew."
        )
    return feature.int2str(value)


# --------------------------------------------------------------------------- Hub


def reach_hub(repo_id: str, repo_type: str) -> str:
    """`found`, `absent` or `unreachable`, asked once: the loaders themselves retry for half a minute.

    After `unreachable` the process is in offline mode.
    """
    try:
        huggingface_hub.HfApi().repo_info(repo_id, repo_type=repo_type, timeout=10)
    except RepositoryNotFoundError:
        return "absent"
    except HFValidationError as error:
        raise RecipeError(f"{repo_id!r} is neither a local path nor a valid Hub id ({error}).") from error
    except Exception:  # the network errors of huggingface_hub have no common class over its versions
        # As HF_HUB_OFFLINE=1 does, which is read at import: from here on the local cache answers, at once.
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return "unreachable"
    return "found"


def read_hub_dataset(name: str, config: str | None, wanted: Sequence[str]) -> dict[str, Table]:
    """Reads the columns `wanted` of the splits of a dataset on the Hub; raises `RecipeError` as `hub_splits` does."""
    tables: dict[str, Table] = {}
    for split, part in hub_splits(name, config).items():
        found = [column for column in wanted if column in part.column_names]
        tables[split] = (
            part.column_names,
            {c: _named(part.features[c], list(part[c]), f"the {split} split of {name!r}") for c in found},
        )
    return tables


def hub_splits(name: str, config: str | None) -> dict[str, datasets.Dataset]:
    """The training split of a dataset on the Hub, and the validation and test split where it has them.

    Raises:
        RecipeError: the dataset does not exist, cannot be reached or has no training split.
    """
    state = reach_hub(name, "dataset")
    if state == "absent":
        raise RecipeError(
            f"--dataset_name {name!r}: no such dataset on the Hub, or it is private (then log in with "
            "'hf auth login'). Local files go to --train_file."
        )
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if state == "unreachable":
            raise RecipeError(
                f"--dataset_name {name!r}: the Hub cannot be reached and the dataset is not in the local cache. "
                "Without network, give local files with --train_file, or neither for the embedded data."
            ) from error
        raise RecipeError(f"--dataset_name {name!r} cannot be loaded: {error}") from error
    found = {split: [loaded[n] for n in names if n in loaded] for split, names in SPLIT_NAMES.items()}
    if not found["train"]:
        raise RecipeError(f"--dataset_name {name!r} has no training split; it has {listed(loaded)}.")
    return {split: parts[0] for split, parts in found.items() if parts}

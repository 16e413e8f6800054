"""Unlabelled text of the adaptation recipe: its arguments, and where the texts come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
from _mlm_files import checked_text, no_column, stream_texts
from _recipe_args import RecipeError
from _recipe_files import hub_splits

EMBEDDED = Path(__file__).parent / "data"


@dataclass
class TextArguments:
    """Which text the model is adapted to. Without any of them: the text that comes with the recipe."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset id on the Hub, with domain text."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Domain text of any size: txt (a text a line), jsonl, json, csv or parquet."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Domain text to validate on. Default: 5%% of the training texts, by seed."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Domain text for test results. Default: none."})
    general_file: str | None = field(
        default=None,
        metadata={
            "help": "General text: 20%% of it, drawn by seed, shows what is forgotten; an untrained head warms up on "
            "the rest. Default: the embedded English reviews and contract clauses."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Name of the column that holds the text."})
    paragraphs: bool = field(
        default=False, metadata={"help": "A text of a txt file ends at a blank line instead of at every line."}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Texts are packed into rows of this many tokens, special ones included."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the words that are masked."})
    max_eval_rows: int = field(
        default=512, metadata={"help": "Evaluate on no more packed rows than these of each kind of text."}
    )
    head_warmup_steps: int = field(
        default=100,
        metadata={"help": "Steps that train a head which the model's files lack, alone, before anything else."},
    )


def check_text_arguments(data: TextArguments) -> None:
    """Raises `RecipeError` for data arguments that contradict each other or are out of range."""
    if data.dataset_name and data.train_file:
        raise RecipeError(
            f"--dataset_name {data.dataset_name!r} and --train_file {data.train_file!r} both name training data; "
            "give one of them."
        )
    for flag in ("validation_file", "test_file"):
        if getattr(data, flag) and not data.train_file:
            raise RecipeError(f"--{flag} {getattr(data, flag)!r} needs --train_file beside it.")
    if data.general_file and not (data.train_file or data.dataset_name):
        raise RecipeError(
            f"--general_file {data.general_file!r} needs domain text beside it: --train_file or --dataset_name."
        )
    if data.dataset_config_name and not data.dataset_name:
        raise RecipeError(f"--dataset_config_name {data.dataset_config_name!r} needs --dataset_name.")
    if not 0 < data.mlm_probability < 1:
        raise RecipeError(f"--mlm_probability {data.mlm_probability} must be between 0 and 1; 0.15 is usual.")
    if data.max_seq_length < 8:
        raise RecipeError(
            f"--max_seq_length {data.max_seq_length} must be at least 8: words are told by their context."
        )
    if data.max_eval_rows < 1:
        raise RecipeError(f"--max_eval_rows {data.max_eval_rows} must be at least 1.")
    if data.head_warmup_steps < 0:
        raise RecipeError(f"--head_warmup_steps {data.head_warmup_steps} must be at least 1.")


# --------------------------------------------------------------------------- where texts come from


@dataclass
class Texts:
    """Texts that can be read from their beginning as often as need be.

    Attributes:
        name: What messages call them.
        read: Begins to read.
    """

    name: str
    read: Callable[[], Iterator[str]]

    def begin(self) -> None:
        """Raises `RecipeError` if there is nothing to read, or it cannot be read from its first text on."""
        if next(self.read(), None) is None:
            raise RecipeError(f"{self.name} is empty; give it some text.")


def find_texts(data: TextArguments) -> dict[str, Texts]:
    """`train`, `general`, and where they are given `validation`, `test` and `warm_up` (general text for the head).

    Raises:
        RecipeError: a source is missing, empty, or not readable from its first text on.
    """
    if data.dataset_name:
        texts = _hub_texts(data.dataset_name, data.dataset_config_name, data.text_column)
    elif data.train_file:
        files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        texts = {split: _file_texts(path, f"--{split}_file", data) for split, path in files.items() if path}
    else:
        texts = {
            "train": _embedded("medical text", "clinical_notes/train", "clinical_ner/train"),
            "validation": _embedded("medical text", "clinical_notes/validation", "clinical_ner/validation"),
        }
    if data.general_file:
        texts["general"] = _file_texts(data.general_file, "--general_file", data)
    else:
        kinds = ("shop_reviews", "contract_clauses")
        texts["general"] = _embedded("general text", *(f"{kind}/test" for kind in kinds))
        texts["warm_up"] = _embedded(
            "general text", *(f"{kind}/{split}" for kind in kinds for split in ("train", "validation"))
        )
    for part in texts.values():
        part.begin()
    return texts


def _file_texts(path: str, flag: str, data: TextArguments) -> Texts:
    return Texts(f"{flag} {path!r}", lambda: stream_texts(path, flag, data.text_column, data.paragraphs))


def _embedded(name: str, *files: str) -> Texts:
    def read() -> Iterator[str]:
        for file in files:
            with (EMBEDDED / f"{file}.jsonl").open(encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    yield row["text"] if "text" in row else " ".join(row["tokens"])

    return Texts(f"the embedded {name}", read)


def _hub_texts(name: str, config: str | None, column: str) -> dict[str, Texts]:
    texts = {}
    for split, part in hub_splits(name, config).items():
        shown = f"the {split} split of {name!r}"
        if column not in part.column_names:
            raise no_column(shown, column, part.column_names)
        rows = part.select_columns([column])
        texts[split] = Texts(shown, partial(_column, rows, column, shown))
    return texts


def _column(rows: datasets.Dataset, column: str, name: str) -> Iterator[str]:
    values = (value for batch in rows.iter(1000) for value in batch[column])  # mapped from disk
    for number, value in enumerate(values, start=1):
        yield checked_text(value, f"{name}, row {number}", column)

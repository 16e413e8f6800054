"""Text classification data of the recipes: checks before any work is done, splits, the few-shot draw, tokens."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from _recipe_args import DataArguments, RecipeError
from _recipe_files import Table, did_you_mean, listed, read_file, read_hub_dataset, shown

VALIDATION_SHARE = 0.15
# \ud800 and the like, which JSON can hold and tokenizers cannot read.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Split:
    """Texts and their labels, in the order of the file."""

    source: str  # as messages name it
    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Split:
        return Split(self.source, [self.texts[i] for i in rows], [self.labels[i] for i in rows])


def check_data_arguments(data: DataArguments) -> None:
    """Raises `RecipeError` for data arguments that contradict each other or are out of range."""
    if data.dataset_name and data.train_file:
        raise RecipeError(
            f"--dataset_name {data.dataset_name!r} and --train_file {data.train_file!r} both name training data; "
            "give one of them."
        )
    for flag in ("validation_file", "test_file"):
        if getattr(data, flag) and not data.train_file:
            raise RecipeError(f"--{flag} {getattr(data, flag)!r} needs --train_file beside it.")
    if data.dataset_config_name and not data.dataset_name:
        raise RecipeError(f"--dataset_config_name {data.dataset_config_name!r} needs --dataset_name.")
    if data.text_column == data.label_column:
        raise RecipeError(f"--text_column and --label_column are both {data.text_column!r}; name two columns.")
    if data.shots is not None and data.shots < 1:
        raise RecipeError(f"--shots {data.shots} must be at least 1; leave it out to train on all rows.")
    if data.max_seq_length < 1:
        raise RecipeError(f"--max_seq_length {data.max_seq_length} must be at least 1.")


def load_splits(data: DataArguments, embedded: Path, seed: int) -> tuple[dict[str, Split], list[str]]:
    """Loads and checks `train`, `validation` and, where there is one, `test`; draws the shots.

    Args:
        data: The data arguments, checked.
        embedded: Folder of the data that come with the recipe.
        seed: Seed of the draws.

    Returns:
        The splits, and notes about what was decided on the way.

    Raises:
        RecipeError: the data are missing, unreadable or unfit for training.
    """
    wanted = (data.text_column, data.label_column)
    notes = []
    if data.dataset_name:
        tables = read_hub_dataset(data.dataset_name, data.dataset_config_name, wanted)
        sources = {split: f"the {split} split of {data.dataset_name!r}" for split in tables}
        labels = tables["test"][1].get(data.label_column) if "test" in tables else None
        if labels and all(label is None for label in labels):
            del tables["test"]
            notes.append("The test split of the dataset carries no labels; it is left out.")
    else:
        files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        if data.train_file is None:
            files = {split: str(embedded / f"{split}.jsonl") for split in files}
        tables = {split: read_file(path, wanted, f"--{split}_file") for split, path in files.items() if path}
        sources = {split: f"--{split}_file {files[split]!r}" for split in tables}
    splits = {split: check_split(table, sources[split], data) for split, table in tables.items()}
    check_labels(splits)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], VALIDATION_SHARE, seed)
        notes.append(
            f"No validation data given: {len(splits['validation'])} rows ({VALIDATION_SHARE:.0%} of every class, by "
            f"seed {seed}) are taken from the training data."
        )
    if "test" not in splits:
        notes.append("No test data given: results are those on the validation data alone.")
    if data.shots is not None:
        splits["train"] = draw_shots(splits["train"], data.shots, seed)
        notes.append(f"--shots {data.shots}: training on {len(splits['train'])} rows, drawn by seed {seed}.")
    for split in ("validation", "test"):
        shared = len(set(splits["train"].texts) & set(splits[split].texts)) if split in splits else 0
        if shared:
            notes.append(f"{shared} {split} texts are training texts too; results on them flatter the model.")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}, notes


def check_split(table: Table, source: str, data: DataArguments) -> Split:
    """Raises `RecipeError` unless `table` has both columns and a text and a label in every row."""
    _check_column(table, source, "text_column", data.text_column)
    _check_column(table, source, "label_column", data.label_column)
    texts = check_texts(table, source, data.text_column)
    labels = table[1][data.label_column]
    names = [label_name(label, f"{source}, row {row}") for row, label in enumerate(labels, start=1)]
    missing = [row for row, name in enumerate(names, start=1) if name is None]
    if missing:
        raise RecipeError(
            f"{source}: {len(missing)} of {len(names)} labels are missing (rows {listed(missing)}); drop those rows."
        )
    return Split(source, texts, [name for name in names if name is not None])


def check_texts(table: Table, source: str, column: str) -> list[str]:
    """The texts in `column`; raises `RecipeError` unless there is one in every row."""
    _check_column(table, source, "text_column", column)
    texts = table[1].get(column)
    if not texts:
        raise RecipeError(f"{source} holds no rows; give it some.")
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise RecipeError(
                f"{source}, row {row}: the text is {shown(text)}, a {type(text).__name__}, not a string; is "
                f"{column!r} the column of the texts (--text_column)?"
            )
        if _SURROGATE.search(text):
            raise RecipeError(
                f"{source}, row {row}: the text {shown(text)} holds half a character (a lone surrogate), which is no "
                "valid Unicode; mend it."
            )
    blank = [row for row, text in enumerate(texts, start=1) if not text.strip()]
    if blank:
        raise RecipeError(f"{source}: {len(blank)} of {len(texts)} texts are blank (rows {listed(blank)}); drop them.")
    return texts


def _check_column(table: Table, source: str, flag: str, column: str) -> None:
    columns, values = table
    if column not in values and columns:
        raise RecipeError(
            f"{source} has no column {column!r} (--{flag}); it has {listed(columns)}."
            + did_you_mean(flag, column, columns)
        )


def label_name(label: Any, where: str) -> str | None:
    """The label as a string, the same for the integer 1 of JSON and the 1 of CSV; `None` where it is missing."""
    if isinstance(label, str):
        if _SURROGATE.search(label):
            raise RecipeError(
                f"{where}: the label {shown(label)} holds half a character (a lone surrogate), which is no valid "
                "Unicode; mend it."
            )
        return label if label.strip() else None
    if label is None or label != label:  # NaN
        return None
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(label) if isinstance(label, bool) else str(int(label))
    raise RecipeError(f"{where}: the label is {shown(label)}; a class is named by a string or an integer.")


def label_order(labels: Iterable[str]) -> list[str]:
    """The distinct labels: sorted as numbers if all are integers, as strings otherwise."""
    names = set(labels)
    # Not of thousands of digits, at which Python refuses to make a number of them.
    if all(re.fullmatch(r"-?\d{1,600}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def to_model_order(names: list[str], config: Any) -> list[str]:
    """`names` in the order of a model that was trained on these very labels, so that its head keeps its meaning."""
    known = getattr(config, "id2label", None) or {}
    return [known[index] for index in sorted(known)] if sorted(known.values()) == sorted(names) else names


def check_labels(splits: dict[str, Split]) -> None:
    """Raises `RecipeError` unless training has two classes and no other split has one that training lacks."""
    train = splits["train"]
    known = set(train.labels)
    if len(known) < 2:
        raise RecipeError(f"{train.source} has one label only ({listed(known)}); classification needs two or more.")
    for split in splits.values():
        strange = Counter(label for label in split.labels if label not in known)
        if strange:
            counts = ", ".join(f"{shown(label)} ({count} rows)" for label, count in strange.most_common(8))
            more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            raise RecipeError(
                f"{split.source} has labels that the training data lack: {counts}{more}. Add training rows with them "
                "or drop these rows."
            )


def _rows_by_label(split: Split, seed: int) -> dict[str, list[int]]:
    """Row numbers per label, shuffled by seed; the same texts whatever the order of the file."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(split)), key=lambda row: split.texts[row]):
        groups[split.labels[row]].append(row)
    draw = random.Random(seed)
    for label in sorted(groups):
        draw.shuffle(groups[label])
    return groups


def hold_out(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Splits off `share` of every class, but of a class with two rows or more at least one and never all."""
    taken: set[int] = set()
    for rows in _rows_by_label(split, seed).values():
        if len(rows) > 1:
            taken.update(rows[: max(1, round(share * len(rows)))])
    if not taken:
        raise RecipeError(
            f"{split.source} has one row per class: none can be held out to validate on; give --validation_file."
        )
    return split.take([i for i in range(len(split)) if i not in taken]), split.take(sorted(taken))


def draw_shots(split: Split, shots: int, seed: int) -> Split:
    """`shots` rows per class, drawn by seed, in the order of the file."""
    groups = _rows_by_label(split, seed)
    smallest = min(sorted(groups), key=lambda label: len(groups[label]))
    if len(groups[smallest]) < shots:
        raise RecipeError(
            f"--shots {shots} is more than the training data have of class {shown(smallest)}: "
            f"{len(groups[smallest])} rows; give --shots {len(groups[smallest])} or less."
        )
    return split.take(sorted(row for rows in groups.values() for row in rows[:shots]))


def tokenize(
    splits: dict[str, Split], names: list[str], tokenizer: Any, max_length: int
) -> tuple[datasets.DatasetDict, str | None]:
    """The splits as datasets of token ids and class ids, and a note about the texts that were cut, if any were."""
    ids = {name: index for index, name in enumerate(names)}
    tokenized, told = {}, {}
    for split, part in splits.items():
        encoded, told[split] = tokenize_texts(part.texts, tokenizer, max_length, split)
        column = {"label": [ids[label] for label in part.labels]}
        labels = datasets.Dataset.from_dict(column, datasets.Features(label=datasets.ClassLabel(names=names)))
        tokenized[split] = datasets.concatenate_datasets([labels, encoded], axis=1)
    return datasets.DatasetDict(tokenized), cut_note(told, {s: len(part) for s, part in splits.items()}, max_length)


def tokenize_texts(texts: list[str], tokenizer: Any, max_length: int, name: str) -> tuple[datasets.Dataset, int]:
    """The texts as a dataset of token ids, and how many of them were cut; `name` goes with the progress bar."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(batch["text"], verbose=False))
        too_long = [len(tokens) > max_length for tokens in encoded["input_ids"]]
        rows = [row for row, cut in enumerate(too_long) if cut]
        if rows:
            shortened = tokenizer([batch["text"][row] for row in rows], truncation=True, max_length=max_length)
            for name, values in encoded.items():
                for row, value in zip(rows, shortened[name], strict=True):
                    values[row] = value
        return {**encoded, "too_long": too_long}

    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset = dataset.map(encode, batched=True, remove_columns="text", desc=f"Tokenizing {name}")
    return dataset.remove_columns("too_long"), sum(dataset["too_long"])


def cut_note(cut: dict[str, int], rows: dict[str, int], max_length: int) -> str | None:
    """A note about how many of the `rows` of each split were cut, if any were."""
    told = ", ".join(f"{count} of {rows[split]} {split} texts" for split, count in cut.items() if count)
    return f"{told} are longer than --max_seq_length {max_length} tokens and are cut." if told else None

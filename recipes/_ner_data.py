"""Named-entity data of the recipes: arguments, checks before any work is done, splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _ner_draws import NerSplit, draw_shots, hold_out
from _ner_files import Row, read_ner_file, read_ner_hub
from _ner_tags import SCHEMES, TagError, entity_types, split_tag, to_iob2
from _recipe_args import DataArguments, RecipeError
from _recipe_data import VALIDATION_SHARE, check_data_arguments
from _recipe_files import listed, shown

# Both can stand in a JSON string; no tokenizer reads the second.
_UNFIT = re.compile("[\0\ud800-\udfff]")
_FORMATS = "json, jsonl, parquet (lists of tokens and tags) or conll, bio, iob, tsv, txt (a token and its tag a line)"


@dataclass
class NerDataArguments(DataArguments):
    """Which named-entity data the model is fine-tuned on. Without any of them: the data that come with the recipe."""

    # No such argument here: every token of a sentence has a tag.
    label_column: str = field(init=False, default="")
    text_column: str = field(
        default="text", metadata={"help": "Name of the column with the texts of --predict_file, if it has no tokens."}
    )
    train_file: str | None = field(default=None, metadata={"help": f"Training data: {_FORMATS}."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data. Default: 15%% of the training sentences, drawn by seed."}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Longer sentences are split into windows of this many sub-words."}
    )
    shots: int | None = field(
        default=None,
        metadata={"help": "Train on this many sentences per entity type, drawn by seed, and no others. Default: all."},
    )
    tokens_column: str = field(default="tokens", metadata={"help": "Name of the column with the lists of tokens."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Name of the column with the lists of tags."})
    # Not label_names, which is a field of TrainingArguments.
    tag_names: list[str] | None = field(
        default=None, metadata={"help": "The tags that integer tags stand for, in their order: O B-PER I-PER ..."}
    )
    tag_scheme: str = field(
        default="iob2", metadata={"help": "Scheme of the tags in the data.", "choices": list(SCHEMES)}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Train on all sub-words of a word (I- after the first), not on its first."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "How many sub-words two windows of a long sentence have in common, at most. Default: a quarter of "
            "max_seq_length."
        },
    )

    def __post_init__(self) -> None:
        if self.stride is None:
            self.stride = self.max_seq_length // 4


def check_ner_arguments(data: NerDataArguments) -> None:
    """Raises `RecipeError` for data arguments that contradict each other or are out of range."""
    check_data_arguments(data)
    if data.tokens_column == data.tags_column:
        raise RecipeError(f"--tokens_column and --tags_column are both {data.tokens_column!r}; name two columns.")
    if not 0 <= data.stride < data.max_seq_length:
        raise RecipeError(
            f"--stride {data.stride} must be at least 0 and less than --max_seq_length {data.max_seq_length}: so many "
            "sub-words of a window are those of the window before it."
        )
    if data.tag_names is not None:
        wrong = [name for name in data.tag_names if split_tag(name, data.tag_scheme) is None]
        if wrong or len(set(data.tag_names)) < len(data.tag_names):
            raise RecipeError(
                f"--tag_names {listed(data.tag_names)} must be different tags of the scheme {data.tag_scheme}, in "
                f"the order of their ids{f'; {listed(wrong)} are none' if wrong else ''}."
            )


def load_ner_splits(data: NerDataArguments, embedded: Path, seed: int) -> tuple[dict[str, NerSplit], list[str]]:
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
    columns = (data.tokens_column, data.tags_column)
    notes = []
    if data.dataset_name:
        read = read_ner_hub(data, columns)
        sources = {split: f"the {split} split of {data.dataset_name!r}" for split in read}
        if "test" in read and all(_hidden(row.tags) for row in read["test"]):
            del read["test"]
            notes.append("The test split of the dataset carries no tags; it is left out.")
    else:
        files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        if data.train_file is None:
            files = {split: str(embedded / f"{split}.jsonl") for split in files}
        sources = {split: f"--{split}_file {path!r}" for split, path in files.items() if path}
        read = {
            split: read_ner_file(str(files[split]), f"--{split}_file", columns, data.tag_scheme) for split in sources
        }
    splits = {split: check_rows(rows, sources[split], data) for split, rows in read.items()}
    check_types(splits)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], VALIDATION_SHARE, seed)
        notes.append(
            f"No validation data given: {len(splits['validation'])} sentences (about {VALIDATION_SHARE:.0%}, by seed "
            f"{seed}) are taken from the training data."
        )
    if "test" not in splits:
        notes.append("No test data given: results are those on the validation data alone.")
    if data.shots is not None:
        splits["train"] = draw_shots(splits["train"], data.shots, seed)
        notes.append(
            f"--shots {data.shots}: training on {len(splits['train'])} sentences, drawn by seed {seed} until every "
            f"entity type is in {data.shots}."
        )
    known = {tuple(tokens) for tokens in splits["train"].tokens}
    for split in ("validation", "test"):
        shared = sum(tuple(tokens) in known for tokens in splits[split].tokens) if split in splits else 0
        if shared:
            notes.append(f"{shared} {split} sentences are training sentences too; results on them flatter the model.")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}, notes


def _hidden(tags: Any) -> bool:
    return tags is None or (isinstance(tags, list) and all(tag is None or tag == -1 for tag in tags))


# --------------------------------------------------------------------------- checks


def check_rows(rows: Sequence[Row], source: str, data: NerDataArguments) -> NerSplit:
    """The sentences in IOB2; raises `RecipeError` with the place of the first that is unfit.

    Blank tokens stay where they are, so that what is predicted can be put beside the file: a tokenizer may make
    nothing of them, which the alignment knows how to treat. A sentence of blank tokens alone is refused.
    """
    if not rows:
        raise RecipeError(f"{source} holds no sentences; give at least one per entity type.")
    split = NerSplit(source, [], [])
    for row in rows:
        where = f"{source}, {row.at()}"
        check_tokens(row, source)
        _check_list(row.tags, where, "tags")
        if len(row.tokens) != len(row.tags):
            raise RecipeError(
                f"{where}: {len(row.tokens)} tokens but {len(row.tags)} tags; every token needs exactly one."
            )
        if not any(token.strip() for token in row.tokens):
            raise RecipeError(f"{where}: the sentence has no word ({shown(row.tokens)}); drop it.")
        names = [_tag_name(tag, f"{source}, {row.at(index)}", data.tag_names) for index, tag in enumerate(row.tags)]
        try:
            tags = to_iob2(names, data.tag_scheme)
        except TagError as error:
            raise RecipeError(f"{source}, {row.at(error.index)}: {error}") from error
        split.tokens.append(row.tokens)
        split.tags.append(tags)
    return split


def check_tokens(row: Row, source: str) -> None:
    """Raises `RecipeError` unless the tokens are a list of strings that every tokenizer can read."""
    _check_list(row.tokens, f"{source}, {row.at()}", "tokens")
    for index, token in enumerate(row.tokens):
        if not isinstance(token, str):
            what = f"is a {type(token).__name__}; write it as text."
        elif _UNFIT.search(token):
            what = "holds a NUL character or half a character (a lone surrogate); mend it."
        else:
            continue
        raise RecipeError(f"{source}, {row.at(index)}: the token {shown(token)} {what}")


def _check_list(values: Any, where: str, name: str) -> None:
    if not isinstance(values, list):
        raise RecipeError(
            f"{where}: the {name} are {shown(values)}, a {type(values).__name__}, not a list with an entry per word "
            f"(--{name}_column)."
        )


def _tag_name(tag: Any, where: str, names: Sequence[str] | None) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if names is None:
            raise RecipeError(
                f"{where}: the tag is the integer {tag}; name the tags in the order of their integers with "
                "--tag_names O B-PER I-PER ..."
            )
        if not 0 <= tag < len(names):
            raise RecipeError(f"{where}: the tag {tag} is none of 0 to {len(names) - 1}, which --tag_names names.")
        return names[tag]
    if not isinstance(tag, str):
        raise RecipeError(f"{where}: the tag is {shown(tag)}; write a string such as 'O' or 'B-PER'.")
    if _UNFIT.search(tag):
        raise RecipeError(
            f"{where}: the tag {shown(tag)} holds a NUL character or half a character (a lone surrogate); mend it."
        )
    if names is not None:
        raise RecipeError(f"{where}: the tag is {tag!r}, but --tag_names is for integer tags; leave it out.")
    return tag


def check_types(splits: dict[str, NerSplit]) -> None:
    """Raises `RecipeError` unless training has two labels and no other split has an entity type that it lacks."""
    train = splits["train"]
    labels = {tag for tags in train.tags for tag in tags}
    if len(labels) < 2:
        cure = "no entity is tagged" if labels == {"O"} else "every word is an entity of its own"
        raise RecipeError(f"{train.source} has one tag only ({listed(labels)}: {cure}); there is nothing to learn.")
    known = entity_types(labels)
    for split in splits.values():
        strange = Counter(kind for kinds in split.types() for kind in sorted(kinds) if kind not in known)
        if strange:
            counts = ", ".join(f"{shown(kind)} ({count} sentences)" for kind, count in strange.most_common(8))
            more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            raise RecipeError(
                f"{split.source} has entity types that the training data lack: {counts}{more}. Add training sentences "
                "with them or tag these as O."
            )

"""Named-entity data of the recipes: arguments, checks before any work is done, splits, the few-shot draw."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _ner_files import Row, read_ner_file, read_ner_hub
from _ner_tags import SCHEMES, TagError, entity_types, split_tag, to_iob2
from _recipe_args import DataArguments, RecipeError
from _recipe_data import VALIDATION_SHARE, check_data_arguments
from _recipe_files import listed, shown

_FORMATS = "json, jsonl, parquet (lists of tokens and tags) or conll, bio, iob, tsv, txt (a token and its tag a line)"


@dataclass
class NerDataArguments(DataArguments):
    """Which named-entity data the model is fine-tuned on. Without any of them: the data that come with the recipe."""

    # No such arguments here: a sentence is a list of tokens, and each has a tag.
    text_column: str = field(init=False, default="text")
    label_column: str = field(init=False, default="label")
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
    stride: int = field(
        default=32, metadata={"help": "How many sub-words two windows of a long sentence have in common, at most."}
    )


@dataclass
class NerSplit:
    """Sentences as lists of tokens and of IOB2 tags, in the order of the file."""

    source: str  # as messages name it
    tokens: list[list[str]]
    tags: list[list[str]]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Sequence[int]) -> NerSplit:
        return NerSplit(self.source, [self.tokens[i] for i in rows], [self.tags[i] for i in rows])

    def types(self) -> list[set[str]]:
        """The entity types in each sentence."""
        return [entity_types(tags) for tags in self.tags]


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
        for name, flag, values in (("tokens", "tokens_column", row.tokens), ("tags", "tags_column", row.tags)):
            if not isinstance(values, list):
                raise RecipeError(
                    f"{where}: the {name} are {shown(values)}, a {type(values).__name__}, not a list with an entry "
                    f"per word (--{flag})."
                )
        if len(row.tokens) != len(row.tags):
            raise RecipeError(
                f"{where}: {len(row.tokens)} tokens but {len(row.tags)} tags; every token needs exactly one."
            )
        for index, token in enumerate(row.tokens):
            if not isinstance(token, str) or "\0" in token:
                what = "holds a NUL character" if isinstance(token, str) else f"is a {type(token).__name__}"
                raise RecipeError(f"{source}, {row.at(index)}: the token {shown(token)} {what}; write it as text.")
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


# --------------------------------------------------------------------------- draws


def _shuffled(split: NerSplit, seed: int) -> list[int]:
    """All rows, shuffled by seed; the same sentences in the same order whatever the order of the file."""
    rows = sorted(range(len(split)), key=lambda row: (split.tokens[row], split.tags[row]))
    random.Random(seed).shuffle(rows)
    return rows


def hold_out(split: NerSplit, share: float, seed: int) -> tuple[NerSplit, NerSplit]:
    """Splits off `share` of the sentences of every type, and of those without entity, where there are two or more.

    A sentence counts for the rarest of its types. The last sentence of a type is never taken.
    """
    types = split.types()
    left = Counter(kind for kinds in types for kind in kinds)
    groups: dict[str, list[int]] = {}
    for row in _shuffled(split, seed):
        groups.setdefault(min(types[row], key=lambda kind: (left[kind], kind), default=""), []).append(row)
    taken: set[int] = set()
    for _, rows in sorted(groups.items()):
        wanted = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        for row in rows:
            if wanted and all(left[kind] > 1 for kind in types[row]):
                taken.add(row)
                left.subtract(types[row])
                wanted -= 1
    if not taken:
        raise RecipeError(
            f"{split.source} has one sentence per entity type: none can be held out to validate on; give "
            "--validation_file."
        )
    return split.take([i for i in range(len(split)) if i not in taken]), split.take(sorted(taken))


def draw_shots(split: NerSplit, shots: int, seed: int) -> NerSplit:
    """Sentences drawn by seed until every entity type is in `shots` of them, in the order of the file.

    Greedy: the rarest type first, each draws sentences at random until it has enough, and a sentence counts for all
    the types in it. A type that keeps company with others may so be in more than `shots`; what has no entity is never
    drawn.
    """
    types = split.types()
    holding: dict[str, list[int]] = {}
    for row in _shuffled(split, seed):
        for kind in types[row]:
            holding.setdefault(kind, []).append(row)
    by_rarity = sorted(holding, key=lambda kind: (len(holding[kind]), kind))
    smallest = by_rarity[0]
    if len(holding[smallest]) < shots:
        raise RecipeError(
            f"--shots {shots} is more than the training data have of type {shown(smallest)}: "
            f"{len(holding[smallest])} sentences; give --shots {len(holding[smallest])} or less."
        )
    counts: Counter[str] = Counter()
    taken: set[int] = set()
    for kind in by_rarity:
        for row in holding[kind]:
            if counts[kind] < shots and row not in taken:
                taken.add(row)
                counts.update(types[row])
    return split.take(sorted(taken))

"""Text augmentation for little labelled data: more rows by small edits that mostly keep the label."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from random import Random
from typing import Any

import datasets
from torch import nn
from transformers.utils import logging

from .word_edits import EDITS, Word, free_words, share_of
from .word_prediction import check_masked_lm, substitute
from .word_rows import Columns, Row
from .word_synonyms import check_wordnet

__all__ = ["Augmenter", "augment_dataset"]

logger = logging.get_logger(__name__)

NAMES = (*EDITS, "mask")
# How often each edit is tried for one copy before it is given up.
_TRIES = 4


@dataclass(frozen=True, eq=False)
class Augmenter:
    """Adds edited copies to the rows of a batch: `dataset.map(augmenter, batched=True, with_indices=True)`.

    Works on the text in `text_column`, or on token lists with one tag per token in `tokens_column` and `tags_column`.
    Every row is kept as it is and its copies follow it; all other columns, the label among them, are repeated. Each
    copy is made by one of the edits; a row takes them in turn, in an order of its own:

    - `swap`: two words change places.
    - `delete`: words are left out, never the last one.
    - `insert`: words of the same text are inserted at random places.
    - `synonym`: words are replaced by synonyms from WordNet (by nltk, with its corpus, in English).
    - `insert_synonym`: such synonyms are inserted at random places.
    - `mask`: words are masked and drawn anew from the `top_k` likeliest tokens of a masked language model. A
      replacement is a whole word of letters, not a special token and not the same word; it keeps the case.

    Words are what white space separates; the punctuation at their ends stays in place, and what has no letter or digit
    is never edited. Nor is text without spaces (Chinese, Thai): segment it, or give it as tokens. With tags only
    tokens that are outside of entities are edited: entity tokens and their order stay, nothing is inserted within or
    between two adjacent entity tokens, and between two entities a token remains.

    A copy never equals its row or another copy of it and is never empty. A row that is too short to be changed in
    enough ways (one word that cannot be swapped, no word at all, entities only) gets fewer copies, or none.

    The random numbers of a copy come from the seed, the content of the row and the number of the copy: batch size,
    number of processes, order and the other columns change nothing, and equal rows get equal copies. (With `mask` the
    logits' rounding depends on the batch. It decides only between tokens that are equally good to within it.)

    `swap`, `delete`, `synonym` and `insert_synonym` are the edits of EDA (Wei and Zou, 2019, arXiv 1901.11196), but
    each copy has one of them, and synonyms are those of the most frequent meaning. `mask` is substitution by a
    language model (Kobayashi, 2018, arXiv 1805.06201) with a masked one (Wu et al., 2019, arXiv 1812.06705); both
    condition the model on the label, which is not done here: it may replace the very word that the label is about.
    Keep `strength` low, and look at some copies.

    Args:
        names: The edits.
        copies: Copies per row.
        strength: Share of the editable words to edit, rounded down, at least one word.
        seed: Seed of all draws.
        model: With `mask`: a masked language model of transformers. It runs on its device, so a model on a GPU
            does not go with several processes (`num_proc`).
        tokenizer: With `mask`: its fast tokenizer.
        top_k: With `mask`: how many of the likeliest tokens a replacement is drawn from.
        batch_size: With `mask`: texts in a forward pass of the model.
        text_column: Column of the texts.
        tokens_column: Column of the token lists.
        tags_column: Column of their tags.
        outside_tag: The tag of tokens outside of entities, where tags are numbers; `augment_dataset` takes it from
            the names of a `ClassLabel`. `None`: `"O"`.

    Raises:
        ValueError: A value is out of range, or `model` or `tokenizer` are missing, unfit or useless.
        ImportError: Synonyms without nltk.
        LookupError: Synonyms without the WordNet corpus.
    """

    names: Sequence[str]
    copies: int = 1
    strength: float = 0.1
    seed: int = 0
    model: nn.Module | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    top_k: int = 10
    batch_size: int = 8
    text_column: str = "text"
    tokens_column: str = "tokens"
    tags_column: str = "ner_tags"
    outside_tag: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise ValueError(f"names={self.names!r} is not a list of edits; give some of {list(NAMES)}.")
        unknown = [name for name in self.names if name not in NAMES]
        if unknown or len(set(self.names)) < len(self.names):
            what = f"{unknown[0]!r}, which is unknown" if unknown else "one of them twice"
            raise ValueError(f"names={list(self.names)} has {what}; give some of {list(NAMES)}, each once.")
        for name in ("copies", "top_k", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number of at least 1.")
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r} is not a whole number.")
        if type(self.strength) not in (int, float) or not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength!r} is not a share of the words: give 0 < strength <= 1.")
        if "mask" in self.names:
            check_masked_lm(self.model, self.tokenizer)
        elif self.model is not None or self.tokenizer is not None:
            raise ValueError(f"model and tokenizer are used by 'mask', which names={list(self.names)} lacks; add it.")
        if "synonym" in self.names or "insert_synonym" in self.names:
            check_wordnet()

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        """The rows of the batch, each followed by its copies.

        Args:
            batch: Column name to values, as `datasets.map(batched=True)` gives it.
            indices: The numbers of the rows (`with_indices=True`); they only serve to name a row in an error.

        Raises:
            ValueError: The columns are missing, ambiguous or computed from the text, or a row is not fit.
            TypeError: A text is not a string, or tokens not a list of strings.
        """
        return self._augmented(batch, indices, originals=True)

    def copies_only(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        """As a call, without the rows themselves."""
        return self._augmented(batch, indices, originals=False)

    def _augmented(
        self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int] | None, originals: bool
    ) -> dict[str, list[Any]]:
        outside: int | str = "O" if self.outside_tag is None else self.outside_tag
        columns = Columns(self.text_column, self.tokens_column, self.tags_column, outside)
        rows = columns.rows(batch, indices)
        result: dict[str, list[Any]] = {name: [] for name in batch.keys()}
        for index, copies in enumerate(self._copies(rows)):
            original = {name: batch[name][index] for name in result}
            for words in [None, *copies] if originals else copies:
                values = original if words is None else {**original, **columns.values(words, batch)}
                for name, value in values.items():
                    result[name].append(value)
        return result

    def _copies(self, rows: Sequence[Row]) -> list[list[list[Word]]]:
        """The copies of every row; what a row gets depends on nothing but the row."""
        orders = [self._random(row.content).sample(list(self.names), len(self.names)) for row in rows]
        known = [{tuple(word.core for word in row.words)} for row in rows]
        made: list[dict[int, list[Word]]] = [{} for _ in rows]
        for attempt in range(_TRIES * len(self.names)):
            pending: dict[str, list[tuple[int, int]]] = {}
            for index, order in enumerate(orders):
                for copy in range(self.copies):
                    if copy not in made[index]:
                        pending.setdefault(order[(copy + attempt) % len(order)], []).append((index, copy))
            edited: dict[tuple[int, int], list[Word] | None] = {}
            for name, wanted in pending.items():
                randoms = [self._random(rows[index].content, copy, attempt) for index, copy in wanted]
                results = self._edit(name, [rows[index].words for index, _ in wanted], randoms)
                edited.update(zip(wanted, results, strict=True))
            for index, copy in sorted(edited):
                words = edited[index, copy]
                if words is not None and (cores := tuple(word.core for word in words)) not in known[index]:
                    known[index].add(cores)
                    made[index][copy] = words
        return [[copies[number] for number in sorted(copies)] for copies in made]

    def _edit(self, name: str, rows: Sequence[list[Word]], randoms: Sequence[Random]) -> list[list[Word] | None]:
        if name == "mask":
            assert self.model is not None
            return substitute(
                rows,
                randoms,
                strength=self.strength,
                model=self.model,
                tokenizer=self.tokenizer,
                top_k=self.top_k,
                batch_size=self.batch_size,
            )
        counts = [share_of(self.strength, len(free_words(words))) for words in rows]
        return [EDITS[name](words, count, rng) for words, count, rng in zip(rows, counts, randoms, strict=True)]

    def _random(self, *key: Any) -> Random:
        # Not by hash(), which differs from process to process, nor from repr(), which knows more characters each year.
        digest = blake2b(json.dumps([self.seed, *key]).encode(), digest_size=8).digest()
        return Random(int.from_bytes(digest, "big"))


def augment_dataset(
    dataset: datasets.Dataset, augmenter: Augmenter, *, batch_size: int = 1000, num_proc: int | None = None
) -> datasets.Dataset:
    """The dataset, followed by the edited copies of its rows.

    The first `len(dataset)` rows are those of the dataset. Augment the training data alone: a copy of a row that is
    evaluated on would flatter the model, and so would copies made before data are split.

    Args:
        dataset: Texts, or token lists with tags, as the augmenter expects them.
        augmenter: What is done to them.
        batch_size: Rows in a batch of `datasets.map`.
        num_proc: Processes of `datasets.map`.

    Raises:
        TypeError: It is not a `datasets.Dataset`.
        ValueError: The columns or a row are not fit; see `Augmenter`.
    """
    if isinstance(dataset, dict):
        raise TypeError(f"A {type(dataset).__name__} of {list(dataset)} was given; did you mean dataset['train']?")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"A {type(dataset).__name__} was given, not a datasets.Dataset; use "
            "dataset.map(augmenter, batched=True, with_indices=True)."
        )
    names = getattr(getattr(dataset.features.get(augmenter.tags_column), "feature", None), "names", None)
    if names and augmenter.outside_tag is None:
        if "O" not in names:
            raise ValueError(
                f"No tag of {augmenter.tags_column!r} is named 'O'; they are {names}. Set outside_tag to the number "
                "of the tag of tokens outside of entities."
            )
        augmenter = replace(augmenter, outside_tag=names.index("O"))
    copies = dataset.with_format(None).map(
        augmenter.copies_only,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        num_proc=num_proc,
        features=dataset.features,
        desc="Augmenting",
    )
    missing = len(dataset) * augmenter.copies - len(copies)
    if missing:
        logger.warning(
            f"{missing} of {len(dataset) * augmenter.copies} copies were not made: for that many different ones by "
            f"{list(augmenter.names)} some rows have too few words that may be edited (short, entities, no spaces)."
        )
    joined = datasets.concatenate_datasets([dataset.with_format(None), copies])
    form = dataset.format
    return joined.with_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])

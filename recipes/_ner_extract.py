"""Entities in raw text or in lists of words, with their places: words through the model, tags to entities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch
from _ner_align import encode, prepare_tokenizer, to_words
from _ner_tags import fill_gaps, repair, split_tag
from _ner_words import split_words, word_pattern
from _recipe_args import RecipeError
from _recipe_files import listed
from transformers import DataCollatorWithPadding

Entity = dict[str, Any]
# Model inputs: per name one list of integers per row.
Columns = dict[str, list[list[int]]]
# Label id and probability; `None` for a word that the model does not see.
Prediction = tuple[int, float] | None


@overload
def extract(text: str, model: Any, tokenizer: Any, **settings: Any) -> list[Entity]: ...
@overload
def extract(text: Sequence[str], model: Any, tokenizer: Any, **settings: Any) -> list[list[Entity]]: ...
def extract(
    text: str | Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    pattern: str | None = None,
    max_length: int = 128,
    stride: int = 32,
    batch_size: int = 32,
) -> list[Entity] | list[list[Entity]]:
    """The entities in raw text of any length, in the form of transformers' token classification pipeline.

    As `pipeline(..., aggregation_strategy="simple")`, but in whole words: the first sub-word speaks for its word, so
    an entity never begins or ends within one, as it never does in training. An `I-` that continues nothing opens an
    entity. The scores are means over words, and `word` is the text as it stands there.

    Args:
        text: A text or several.
        model: A token classification model whose labels are IOB2 tags; left in the mode and on the device it is in.
        tokenizer: Its fast tokenizer, which is made ready in place as `prepare_tokenizer` does.
        pattern: Splits the text into words, see `word_pattern`. Default: the model's `config.word_pattern` if there
            is one, where a recipe keeps that of its training data; otherwise that of `word_pattern()`.
        max_length: Sub-words per window, special ones included.
        stride: Sub-words that two windows of a long text have in common, at most.
        batch_size: Windows that go through the model at once.

    Returns:
        For each text its entities in order: `entity_group` (type), `score`, `word`, `start` and `end` in characters,
        with `text[start:end] == word`.

    Raises:
        RecipeError: the tokenizer is slow, the labels are no IOB2 tags, or a window has no room.
    """
    pattern = pattern or pattern_of(model.config)
    texts = [words_of_text(one, pattern) for one in ([text] if isinstance(text, str) else text)]

    def forward(columns: Columns) -> list[list[Prediction]]:
        return _through_model(columns, model, tokenizer, batch_size)

    answers = find_entities(texts, model.config, tokenizer, forward, max_length=max_length, stride=stride)
    entities = [answer.entities for answer in answers]
    return entities[0] if isinstance(text, str) else entities


def pattern_of(config: Any) -> str:
    """How raw text is split into words for a model: as in its training data, if a recipe has trained it."""
    return getattr(config, "word_pattern", None) or word_pattern()


# --------------------------------------------------------------------------- words


@dataclass
class Words:
    """A text, and start and end of every word in it."""

    text: str
    spans: list[tuple[int, int]]

    @property
    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.spans]


def words_of_text(text: str, pattern: str) -> Words:
    """Raw text, split by `pattern`."""
    return Words(text, split_words(text, pattern))


def words_of_list(words: Sequence[str]) -> Words:
    """Words as they are; their text has a space between any two."""
    ends = [past - 1 for past in accumulate(len(word) + 1 for word in words)]
    return Words(" ".join(words), [(end - len(word), end) for word, end in zip(words, ends, strict=True)])


# --------------------------------------------------------------------------- entities


@dataclass
class Answer:
    """What a model finds in a text.

    Attributes:
        entities: As `extract` returns them.
        tags: Valid IOB2, one per word. A word that the model does not see, before an entity or behind it, may be part
            of it here, as it is in the scores of a recipe; it is not in `entities`.
    """

    entities: list[Entity]
    tags: list[str]


def find_entities(
    texts: Sequence[Words],
    config: Any,
    tokenizer: Any,
    forward: Callable[[Columns], list[list[Prediction]]],
    *,
    max_length: int,
    stride: int,
) -> list[Answer]:
    """The entities in texts of any length, in their order.

    Args:
        texts: The texts. Words that are blank or empty count as not seen.
        config: Configuration of the model.
        tokenizer: Its fast tokenizer, which is made ready in place as `prepare_tokenizer` does.
        forward: Model inputs as one list of integers per row, without padding, to what the model says of each of them.
        max_length: Sub-words per row, special ones included.
        stride: Sub-words that two rows of a long text have in common, at most.

    Raises:
        RecipeError: as `extract` does.
    """
    names = tag_names(config)
    prepare_tokenizer(tokenizer)
    words = [text.words for text in texts]
    found: list[list[Prediction]] = [[None] * len(part) for part in words]
    if any(words):
        encoded = encode(words, None, tokenizer, max_length=max_length, stride=stride)
        rows = forward(encoded.columns) if encoded.placements else []
        found = to_words(encoded.placements, [len(part) for part in words], rows, [0] * len(rows))
    answers = []
    for text, part, predictions in zip(texts, words, found, strict=True):
        seen = [one if word.strip() else None for word, one in zip(part, predictions, strict=True)]
        tags = repair(fill_gaps([None if one is None else names[one[0]] for one in seen]))
        answers.append(Answer(_entities(text, seen, tags), tags))
    return answers


def tag_names(config: Any) -> list[str]:
    """The tags of a model in the order of their ids; raises `RecipeError` if its labels are no IOB2 tags."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    wrong = [name for name in names if split_tag(name) is None]
    if wrong:
        raise RecipeError(f"the labels of the model are no IOB2 tags: {listed(wrong)}; is it one for named entities?")
    return names


def _entities(text: Words, predictions: Sequence[Prediction], tags: Sequence[str]) -> list[Entity]:
    groups: list[list[int]] = []
    for word, tag in enumerate(tags):
        if tag.startswith("B-"):
            groups.append([])
        # What the model does not see is in an entity, but neither begins nor ends it.
        if tag != "O" and predictions[word] is not None:
            groups[-1].append(word)
    entities = []
    for group in groups:
        start, end = text.spans[group[0]][0], text.spans[group[-1]][1]
        scores = [one[1] for one in (predictions[word] for word in group) if one is not None]
        kind, score, word = tags[group[0]][2:], sum(scores) / len(scores), text.text[start:end]
        entities.append({"entity_group": kind, "score": score, "word": word, "start": start, "end": end})
    return entities


def _through_model(columns: Columns, model: Any, tokenizer: Any, batch_size: int) -> list[list[Prediction]]:
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in columns["input_ids"]]
    rows: list[Any] = [None] * len(lengths)
    by_length = sorted(range(len(rows)), key=lambda row: lengths[row])
    mode = model.training
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            chosen = by_length[first : first + batch_size]
            batch = collate([{name: values[row] for name, values in columns.items()} for row in chosen])
            with torch.no_grad():
                logits = model(**batch.to(device)).logits
            for row, own in zip(chosen, logits, strict=True):
                own = own[-lengths[row] :] if tokenizer.padding_side == "left" else own[: lengths[row]]
                rows[row] = most_likely(own)
    finally:
        model.train(mode)
    return rows


def most_likely(logits: torch.Tensor) -> list[Prediction]:
    """The best label of each sub-word.

    Shape:
        logits: `[sub-words, labels]`.
    """
    best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

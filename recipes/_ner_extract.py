"""Entities in raw text, with their places in it: text to words, words through the model, tags to entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, overload

import regex
import torch
from _ner_align import encode, prepare_tokenizer, to_words
from _ner_tags import fill_gaps, repair, split_tag
from _recipe_args import RecipeError
from _recipe_files import listed
from transformers import DataCollatorWithPadding

# Letters of scripts with words, their accents and vowel signs, digits. Python's \w lacks the marks (\p{M}).
_LETTER = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])"
# Soft hyphen and the joiners of Persian and Indic scripts, within a word.
_CORE = rf"{_LETTER}(?:{_LETTER}|[\u00ad\u200c\u200d])*"
_MARK = r"[^\p{L}\p{M}\p{N}\s]"


def word_pattern(sentences: Iterable[Sequence[str]] = ()) -> str:
    """The regular expression (of the package `regex`) that splits raw text into words as `sentences` are split.

    A word is a run of letters, digits and accents; a Chinese character is a word of its own, and so is every
    punctuation mark, symbol or emoji. In the sentences some marks may belong to words instead, as in `non-Hodgkin`,
    `@name`, `#tag`, `30%`: a mark between letters does if it is found within words twice or more, one in front of a
    word or behind it if that is so more often than it stands alone.

    Scripts without spaces other than Chinese (Thai, Japanese kana) need a segmentation of their own: a run of such
    letters is one word.

    Args:
        sentences: Words of training sentences. None: every mark is a word.
    """
    inner, front, back, alone = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    between = regex.compile(rf"(?<={_LETTER}){_MARK}+(?={_LETTER})")
    leading = regex.compile(rf"\A{_MARK}(?={_LETTER})")
    trailing = regex.compile(rf"(?<={_LETTER}){_MARK}\Z")
    for token in (token for tokens in sentences for token in tokens):
        if len(token) == 1:
            alone[token] += 1
        else:
            inner.update({mark for run in between.findall(token) for mark in run})
            front.update(leading.findall(token))
            back.update(trailing.findall(token))

    def chosen(marks: Iterable[str], suffix: str) -> str:
        escaped = "".join(regex.escape(mark, special_only=False) for mark in sorted(marks))
        return f"[{escaped}]{suffix}" if escaped else ""

    before = chosen((mark for mark, count in front.items() if count > max(1, alone[mark])), "?")
    after = chosen((mark for mark, count in back.items() if count > max(1, alone[mark])), "?")
    within = chosen((mark for mark, count in inner.items() if count > 1), "+")
    joined = rf"(?:{within}{_CORE})*" if within else ""
    return rf"{before}{_CORE}{joined}{after}|\p{{Han}}\p{{M}}*|(?!\s)\X"


def split_words(text: str, pattern: str | None = None) -> list[tuple[int, int]]:
    """Start and end of every word in `text`; what is between two words is white space.

    Args:
        text: Raw text.
        pattern: As `word_pattern` gives it. Default: that of `word_pattern()`.
    """
    return [match.span() for match in regex.finditer(pattern or word_pattern(), text)]


@overload
def extract(text: str, model: Any, tokenizer: Any, **settings: Any) -> list[dict[str, Any]]: ...
@overload
def extract(text: Sequence[str], model: Any, tokenizer: Any, **settings: Any) -> list[list[dict[str, Any]]]: ...
def extract(
    text: str | Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    pattern: str | None = None,
    max_length: int = 128,
    stride: int = 32,
    batch_size: int = 32,
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
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
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    wrong = [name for name in names if split_tag(name) is None]
    if wrong:
        raise RecipeError(f"the labels of the model are no IOB2 tags: {listed(wrong)}; is it one for named entities?")
    prepare_tokenizer(tokenizer)
    texts = [text] if isinstance(text, str) else list(text)
    pattern = pattern or getattr(model.config, "word_pattern", None) or word_pattern()
    spans = [split_words(one, pattern) for one in texts]
    filled = [number for number, places in enumerate(spans) if places]
    words = [[texts[number][start:end] for start, end in spans[number]] for number in filled]
    entities: list[list[dict[str, Any]]] = [[] for _ in texts]
    if words:
        found = _predict(words, model, tokenizer, max_length, stride, batch_size)
        for number, predictions in zip(filled, found, strict=True):
            entities[number] = _entities(texts[number], spans[number], predictions, names)
    return entities[0] if isinstance(text, str) else entities


def _predict(
    words: list[list[str]], model: Any, tokenizer: Any, max_length: int, stride: int, batch_size: int
) -> list[list[tuple[int, float] | None]]:
    """Label id and probability of every word, `None` where it has no sub-word."""
    encoded = encode(words, None, tokenizer, max_length=max_length, stride=stride)
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    rows: list[Any] = [None] * len(encoded.placements)
    shifts = [0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda row: len(encoded.columns["input_ids"][row]))
    mode = model.training
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            chosen = by_length[first : first + batch_size]
            batch = collate([{name: values[row] for name, values in encoded.columns.items()} for row in chosen])
            with torch.no_grad():
                logits = model(**batch.to(device)).logits
            best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
            for place, row in enumerate(chosen):
                width = len(encoded.columns["input_ids"][row])
                shifts[row] = logits.shape[1] - width if tokenizer.padding_side == "left" else 0
                rows[row] = list(zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True))
    finally:
        model.train(mode)
    return to_words(encoded.placements, [len(row) for row in words], rows, shifts)


def _entities(
    text: str, spans: list[tuple[int, int]], predictions: list[tuple[int, float] | None], names: list[str]
) -> list[dict[str, Any]]:
    tags = repair(fill_gaps([None if found is None else names[found[0]] for found in predictions]))
    groups: list[list[int]] = []
    for word, tag in enumerate(tags):
        if tag.startswith("B-"):
            groups.append([])
        # What the model does not see is in an entity, but neither begins nor ends it.
        if tag != "O" and predictions[word] is not None:
            groups[-1].append(word)
    entities = []
    for group in groups:
        start, end = spans[group[0]][0], spans[group[-1]][1]
        scores = [found[1] for found in (predictions[word] for word in group) if found is not None]
        kind = tags[group[0]][2:]
        score = sum(scores) / len(scores)
        entities.append({"entity_group": kind, "score": score, "word": text[start:end], "start": start, "end": end})
    return entities

"""Words of raw text: the expression that splits it as the sentences of the training data are split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import regex

# Letters of scripts with words, their accents and vowel signs, digits. Python's \w lacks the marks (\p{M}).
_LETTER = r"(?:(?!\p{Han})[\p{L}\p{M}\p{N}])"
# Soft hyphen and the joiners of Persian and Indic scripts, within a word.
_CORE = rf"{_LETTER}(?:{_LETTER}|[\u00ad\u200c\u200d])*"
_MARK = r"[^\p{L}\p{M}\p{N}\s]"
# Behind these a text has a space: alone between two words of a list, they say nothing about marks within words.
_BEFORE_SPACE = frozenset(".,;:!?")
# So many abbreviations at most, the most frequent ones: the expression is kept in config.json.
_MOST = 100

_BEGINS = regex.compile(rf"\A{_LETTER}")
_ENDS = regex.compile(rf"{_LETTER}\Z")
_BETWEEN = regex.compile(rf"(?<={_LETTER}){_MARK}+(?={_LETTER})")
_LEADING = regex.compile(rf"\A{_MARK}(?={_LETTER})")
_TRAILING = regex.compile(rf"(?<={_LETTER}){_MARK}\Z")
_ABBREVIATION = regex.compile(rf"\A{_LETTER}+(?:[.\-]{_LETTER}+)*\.\Z")
_ENDING = regex.compile(r"\A['’]\p{Ll}{1,2}\Z")


def word_pattern(sentences: Iterable[Sequence[str]] = ()) -> str:
    """The regular expression (of the package `regex`) that splits raw text into words as `sentences` are split.

    A word is a run of letters, digits and accents; a Chinese character is a word of its own, and so is every
    punctuation mark, symbol or emoji. In the sentences some marks may belong to words instead, as in `non-Hodgkin`,
    `@name`, `#tag`, `30%`, `Inc.`:

    - A mark between letters does if it is found within words twice or more, and more often than alone between two
      words (other than `.,;:!?`, which are found there in any text).
    - One in front of words or behind them does if it is there more often than it stands alone.
    - An abbreviation keeps its point if it does so more often than not.
    - An ending such as `'s` is a word of its own if it is one anywhere.

    Scripts without spaces other than Chinese (Thai, Japanese kana) need a segmentation of their own: a run of such
    letters is one word.

    Args:
        sentences: Words of training sentences. None: every mark is a word.
    """
    inner, front, back, alone, between = (Counter[str]() for _ in range(5))
    abbreviations, split, endings = Counter[str](), Counter[str](), set[str]()
    for tokens in sentences:
        for index, token in enumerate(tokens):
            if len(token) > 1:
                inner.update({mark for run in _BETWEEN.findall(token) for mark in run})
                front.update(_LEADING.findall(token))
                back.update(_TRAILING.findall(token))
                abbreviations.update(_ABBREVIATION.findall(token))
                endings.update(_ENDING.findall(token))
                continue
            alone[token] += 1
            if index > 0 and _ENDS.search(tokens[index - 1]):
                split[tokens[index - 1] + token] += 1
                between[token] += index + 1 < len(tokens) and _BEGINS.search(tokens[index + 1]) is not None

    before = {mark for mark, count in front.items() if count > max(1, alone[mark])}
    after = {mark for mark, count in back.items() if count > max(1, alone[mark])}
    within = {mark for mark, count in inner.items() if count > max(1, 0 if mark in _BEFORE_SPACE else between[mark])}
    whole = [word for word, count in abbreviations.items() if count > split[word]]
    whole = sorted(whole, key=lambda word: (-abbreviations[word], word))[:_MOST]
    apart = {ending for ending in endings if ending[0] in within}

    fixed = f"{_one_of([*whole, *endings])}|" if whole or endings else ""
    unless = f"(?!{_one_of(apart)})" if apart else ""
    joined = f"(?:{unless}{_any_of(within, '+')}{_CORE})*" if within else ""
    word = f"{_any_of(before, '?')}{_CORE}{joined}{_any_of(after, '?')}"
    return rf"{fixed}{word}|\p{{Han}}\p{{M}}*|(?!\s)\X"


def _any_of(marks: Iterable[str], suffix: str) -> str:
    escaped = "".join(regex.escape(mark, special_only=False) for mark in sorted(marks))
    return f"[{escaped}]{suffix}" if escaped else ""


def _one_of(words: Iterable[str]) -> str:
    """Longer ones first: of `U.S.A.` and `U.S.` the former, where it stands; nothing that goes on with a letter."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return f"(?:{'|'.join(regex.escape(word) for word in ordered)})(?!{_LETTER})"


def split_words(text: str, pattern: str | None = None) -> list[tuple[int, int]]:
    """Start and end of every word in `text`; what is between two words is white space.

    Args:
        text: Raw text.
        pattern: As `word_pattern` gives it. Default: that of `word_pattern()`.
    """
    return [match.span() for match in regex.finditer(pattern or word_pattern(), text)]

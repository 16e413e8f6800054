"""A text as words, and the edits of it that need no model: swap, deletion, insertion, synonyms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from .word_synonyms import synonyms


class Word(NamedTuple):
    """One word and what stands around it.

    `core` is what edits move; white space and punctuation at its ends are apart, so that a comma stays where it is.
    """

    core: str
    gap: str = " "
    left: str = ""
    right: str = ""
    free: bool = True  # may be moved, deleted or replaced
    inside: bool = False  # of an entity
    tag: Any = None


Edit = Callable[[Sequence[Word], int, Random], "list[Word] | None"]

# Part of the word at whose end they stand: -5, #tag, @user, 5%, 1/, **bold**.
_KEPT = frozenset("-#@&%*/\\")
# Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
# With more of them it is a phrase, which no edit should take for a word.
_LONGEST_UNSPACED = 8


def words_of_text(text: str) -> list[Word]:
    """The words that white space separates.

    One without a letter or digit is not free, nor is a phrase in a script that puts no space between words.
    """
    words: list[Word] = []
    for match in re.finditer(r"(\s*)(\S+)", text):
        gap, chunk = match.groups()
        core = chunk if chunk.isalnum() else chunk.strip("".join(filter(_punctuation, chunk)))
        if not is_word(core):
            words.append(Word(chunk, gap, free=False))
            continue
        left, _, right = chunk.partition(core)
        free = core.isascii() or len(_UNSPACED.findall(core)) <= _LONGEST_UNSPACED
        words.append(Word(core, gap, left, right, free))
    if words:
        words[-1] = words[-1]._replace(right=words[-1].right + text[len(text.rstrip()) :])
    return words


def _punctuation(character: str) -> bool:
    # Not symbols: $5, C++, <b>, and emoji, which may consist of several characters.
    return unicodedata.category(character)[0] == "P" and character not in _KEPT


def words_of_tokens(tokens: Sequence[str], tags: Sequence[Any], outside: Any) -> list[Word]:
    """The tokens of a tagged text; those of entities, and those without a letter or digit, are not free."""
    return [
        Word(token, free=tag == outside and is_word(token), inside=tag != outside, tag=tag)
        for token, tag in zip(tokens, tags, strict=True)
    ]


def text_of(words: Sequence[Word]) -> str:
    return "".join(word.gap + word.left + word.core + word.right for word in words)


def is_word(text: str) -> bool:
    return text.isalnum() or any(character.isalnum() for character in text)


def free_words(words: Sequence[Word]) -> list[int]:
    return [index for index, word in enumerate(words) if word.free]


def share_of(strength: float, number: int) -> int:
    """How many of so many words to edit: at least one."""
    return max(1, int(strength * number + 1e-9))  # 0.29 * 100 is 28.999999999999996


def keep_case(word: str, like: str) -> str:
    """`word` in lower case, capitalized or in capitals, as `like` is."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:].lower() if like[:1].isupper() else word.lower()


def swap(words: Sequence[Word], count: int, rng: Random) -> list[Word] | None:
    """Lets two free words change places, up to `count` times; no word moves twice, which could undo it."""
    free, edited = free_words(words), list(words)
    rng.shuffle(free)
    while free and count:
        one = free.pop()
        # The order is random, and so is the first other word in it.
        at = next((at for at in reversed(range(len(free))) if words[free[at]].core != words[one].core), None)
        if at is None:  # all that are left are the same word
            break
        two = free.pop(at)
        edited[one] = words[one]._replace(core=words[two].core)
        edited[two] = words[two]._replace(core=words[one].core)
        count -= 1
    return edited if edited != list(words) else None


def delete(words: Sequence[Word], count: int, rng: Random) -> list[Word] | None:
    """Deletes up to `count` free words, with their punctuation.

    A word always stays, and so does one between two entities.
    """
    before, after = list(range(-1, len(words) - 1)), list(range(1, len(words) + 1))
    remaining = sum(is_word(word.core) for word in words)
    gone: set[int] = set()
    free = free_words(words)
    for at in rng.sample(free, len(free)):
        if len(gone) == count or remaining < 2:
            break
        one, two = before[at], after[at]
        # Two entities side by side could be read as one, depending on the tagging scheme.
        if one >= 0 and two < len(words) and words[one].inside and words[two].inside:
            continue
        gone.add(at)
        remaining -= 1
        if one >= 0:
            after[one] = two
        if two < len(words):
            before[two] = one
    if not gone:
        return None
    edited = [word for index, word in enumerate(words) if index not in gone]
    edited[0] = edited[0]._replace(gap=words[0].gap)
    return edited


def insert(words: Sequence[Word], count: int, rng: Random) -> list[Word] | None:
    """Inserts `count` free words of the same text at random places."""
    free = free_words(words)
    return _inserted(words, [words[rng.choice(free)] for _ in range(count)], rng) if free else None


def synonym(words: Sequence[Word], count: int, rng: Random) -> list[Word] | None:
    """Replaces up to `count` free words by synonyms."""
    edited = list(words)
    for index, new in _drawn_synonyms(words, count, rng):
        edited[index] = words[index]._replace(core=keep_case(new, words[index].core))
    return edited if edited != list(words) else None


def insert_synonym(words: Sequence[Word], count: int, rng: Random) -> list[Word] | None:
    """Inserts synonyms of up to `count` free words at random places."""
    new = [words[index]._replace(core=new) for index, new in _drawn_synonyms(words, count, rng)]
    return _inserted(words, new, rng) if new else None


def _drawn_synonyms(words: Sequence[Word], count: int, rng: Random) -> list[tuple[int, str]]:
    """Up to `count` free words that have synonyms, with one of them."""
    drawn: list[tuple[int, str]] = []
    free = free_words(words)
    for index in rng.sample(free, len(free)):
        if len(drawn) == count:
            break
        if known := synonyms(words[index].core):
            drawn.append((index, rng.choice(known)))
    return drawn


def _inserted(words: Sequence[Word], new: Sequence[Word], rng: Random) -> list[Word]:
    end = len(words)
    outer = [at for at in range(end + 1) if not (0 < at < end and words[at - 1].inside and words[at].inside)]
    placed: dict[int, list[Word]] = {}
    for word in new:
        placed.setdefault(rng.choice(outer), []).append(word._replace(gap=" ", left="", right=""))
    edited: list[Word] = []
    for at in range(end + 1):
        edited += placed.get(at, [])
        edited += words[at : at + 1]
    if 0 in placed:
        edited[0] = edited[0]._replace(gap=words[0].gap)
        edited[len(placed[0])] = words[0]._replace(gap=" ")
    return edited


EDITS: dict[str, Edit] = {
    "swap": swap,
    "delete": delete,
    "insert": insert,
    "synonym": synonym,
    "insert_synonym": insert_synonym,
}

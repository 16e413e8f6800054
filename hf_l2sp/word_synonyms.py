"""Synonyms of single words from WordNet, read by nltk."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from typing import Any

_IMPORTED_IN = os.getpid()

# In a text they are rarely what WordNet takes them for: "will" is a volition there, "while" a spell.
_FUNCTION_WORDS = frozenset(
    "about above after around before being below between does doing done down each enough have having just like might "
    "more most much only please quite rather same some such that then this thus under using very well were while will "
    "within".split()
)


def forked() -> bool:
    """Whether this is a fork of the process that imported the package, as `datasets.map` makes them."""
    return os.getpid() != _IMPORTED_IN


def synonyms(word: str) -> list[str]:
    """The single-word synonyms that WordNet gives for a word of more than three letters, sorted.

    Those of its most frequent meaning, and for words in the form that WordNet lists: the synonyms of all meanings of
    "negative" have "veto" among them, those of "weeks" are singular. Shorter words are mostly function words.
    """
    word = word.casefold()
    if len(word) < 4 or not word.isalpha() or word in _FUNCTION_WORDS:
        return []
    return _known(_corpus(), word)


@lru_cache(maxsize=2**16)
def _known(corpus: Any, word: str) -> list[str]:
    first: dict[str, Any] = {}  # of each part of speech: they come by frequency
    for synset in corpus.synsets(word):
        for lemma in synset.lemmas():
            if lemma.name() == word:
                first.setdefault(synset.pos().replace("s", "a"), lemma)
    if not first:
        return []
    names = max(first.values(), key=lambda lemma: lemma.count()).synset().lemma_names()
    return sorted({name for name in names if len(name) > 2 and name.isalpha() and name.islower() and name != word})


def check_wordnet() -> None:
    """Loads WordNet.

    Raises:
        ImportError: NLTK is not installed.
        LookupError: Its WordNet corpus is not, or not whole.
    """
    cure = "python -m nltk.downloader wordnet (NLTK_DATA names the folder of nltk's data)"
    try:
        _corpus()
    except ImportError as error:
        raise ImportError(f"Synonyms are taken from WordNet by nltk: pip install nltk, then {cure}.") from error
    except LookupError as error:
        raise LookupError(f"Synonyms are taken from nltk's WordNet corpus, which is not there: {cure}.") from error
    except OSError as error:
        raise LookupError(f"nltk's WordNet corpus is incomplete ({error}). Load it anew: {cure}.") from error


def _corpus() -> Any:
    """NLTK's reader of WordNet, opened in this process."""
    corpus = import_module("nltk.corpus").wordnet
    _close_in_fork(corpus, os.getpid())
    corpus.ensure_loaded()
    return corpus


@lru_cache(maxsize=1)
def _close_in_fork(corpus: Any, process: int) -> None:
    # It reads from open files, whose position a fork shares with its parent.
    if forked():
        corpus._unload()

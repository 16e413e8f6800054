"""What the tests of text augmentation share: copies of a text, a small WordNet, a tiny masked language model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, set_seed

from hf_l2sp.augment import Augmenter
from hf_l2sp.word_edits import words_of_text

TEXTS = [
    "The cat, however, sat on the mat; it was GOOD.",
    "Well, done!\n\nA second line,   with (odd) gaps -- and 12 numbers. ",
    "one two three four five six seven eight nine ten eleven twelve",
    "Hello there",
    "में की कि है",
]


def words(text: str) -> list[str]:
    return [word.core for word in words_of_text(text) if word.free]


def copies_of(text: str, names: Sequence[str], **options: Any) -> list[str]:
    return Augmenter(names, **options).copies_only({"text": [text]})["text"]


def is_part_of(part: Sequence[str], whole: Sequence[str]) -> bool:
    rest = iter(whole)
    return all(any(word == other for other in rest) for word in part)


# --- synonyms -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Synset:
    part: str
    counts: dict[str, int]  # of every lemma, how often it has this meaning

    def pos(self) -> str:
        return self.part

    def lemma_names(self) -> list[str]:
        return list(self.counts)

    def lemmas(self) -> list[Any]:
        return [Lemma(name, self) for name in self.counts]


@dataclass
class Lemma:
    text: str
    of: Synset

    def name(self) -> str:
        return self.text

    def count(self) -> int:
        return self.of.counts[self.text]

    def synset(self) -> Synset:
        return self.of


@dataclass(eq=False)
class WordNet:
    """Knows a few words, as NLTK's reader would tell them."""

    known: dict[str, list[Synset]]
    missing: Exception | None = None
    unloaded: list[int] = field(default_factory=list)
    check: Callable[[WordNet], None] = lambda self: None

    def synsets(self, word: str) -> list[Synset]:
        self.check(self)
        return self.known.get(word, [])

    def ensure_loaded(self) -> None:
        if self.missing is not None:
            raise self.missing

    def _unload(self) -> None:
        self.unloaded.append(1)


def install_wordnet(monkeypatch: pytest.MonkeyPatch) -> WordNet:
    """Puts a WordNet of a few words in place of the one that NLTK loads."""
    flesh = Synset("n", {"quick": 1, "flesh": 0})
    fast = Synset("s", {"quick": 9, "Fast": 0, "fast": 3, "speedy": 1, "in_a_hurry": 0, "qk": 0})
    rare = Synset("s", {"quick": 7, "flying": 0})
    moved = Synset("v", {"move": 5, "shift": 1})
    known = {
        "quick": [flesh, fast, rare],
        "moved": [moved],  # of "move", as the reader finds out
        "helium": [Synset("n", {"helium": 0, "he": 0})],
        "will": [Synset("n", {"will": 5, "volition": 0})],
        "he": [Synset("n", {"he": 0, "helium": 0})],
    }
    wordnet = WordNet(known)
    corpus = ModuleType("nltk.corpus")
    corpus.wordnet = wordnet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    return wordnet


# --- masked language model ----------------------------------------------------------------------------------------

PIECES = "the a cat dog mouse sat ran on under mat house good bad fine play ##ing ##ed caf ##e cafe 12 , . ing".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = [*SPECIAL, *PIECES]


def make_bert_tokenizer(folder: Path) -> BertTokenizerFast:
    file = folder / "vocab.txt"
    file.write_text("\n".join(VOCAB), encoding="utf-8")
    return BertTokenizerFast(str(file), model_max_length=16)


def make_masked_lm(vocabulary: int = len(VOCAB) + 3, positions: int = 16) -> BertForMaskedLM:
    """Its vocabulary is padded, as many are."""
    set_seed(11)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    return BertForMaskedLM(config).train()


def favour(model: BertForMaskedLM, **tokens: float) -> BertForMaskedLM:
    """Raises the logits of some tokens, whatever the text."""
    with torch.no_grad():
        for token, value in tokens.items():
            model.cls.predictions.bias[VOCAB.index(token)] = value
    return model

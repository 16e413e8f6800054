"""Synonyms: which WordNet gives, how they replace words and are inserted, in forks too, and what its absence says."""

from __future__ import annotations

import os
import sys

import datasets
import pytest

from hf_l2sp.augment import Augmenter, augment_dataset
from hf_l2sp.word_synonyms import check_wordnet, forked, synonyms

from .augmentation import copies_of, install_wordnet, is_part_of, words


@pytest.fixture
def wordnet(monkeypatch):
    return install_wordnet(monkeypatch)


def test_synonyms_of_the_most_frequent_meaning(wordnet):
    assert synonyms("quick") == synonyms("Quick") == ["fast", "speedy"]
    assert synonyms("helium") == []  # no word of two letters
    assert synonyms("moved") == []  # a form that is not listed
    assert synonyms("will") == [] == synonyms("he") == synonyms("in_a_hurry") == synonyms("unknown")


def test_synonyms_replace_words(wordnet):
    made = copies_of("The (Quick) one, he ran", ["synonym"], copies=5)
    assert sorted(made) == ["The (Fast) one, he ran", "The (Speedy) one, he ran"]
    assert set(copies_of("QUICK will", ["synonym"], copies=5)) == {"FAST will", "SPEEDY will"}
    (copy,) = copies_of("quick " * 10 + "helium", ["synonym"], strength=0.3)
    assert words(copy).count("quick") == 7 and {*words(copy)} <= {"quick", "fast", "speedy", "helium"}
    assert copies_of("he ran, moved", ["synonym"]) == []
    batch = {"tokens": [["Quick", "quick"]], "ner_tags": [["B-PER", "O"]]}
    made = Augmenter(["synonym"], strength=1.0, copies=2).copies_only(batch)
    assert sorted(made["tokens"]) == [["Quick", "fast"], ["Quick", "speedy"]]
    assert made["ner_tags"] == [["B-PER", "O"]] * 2


def test_synonyms_are_inserted(wordnet):
    text = "The Quick one, he ran"
    made = copies_of(text, ["insert_synonym"], copies=40)
    assert {new for copy in made for new in set(words(copy)) - set(words(text))} == {"fast", "speedy"}
    assert {len(words(copy)) for copy in made} == {6}
    assert all(is_part_of(words(text), words(copy)) for copy in made)
    assert copies_of("he ran", ["insert_synonym"]) == []
    row = Augmenter(["insert_synonym"])({"tokens": [["Quick", "quick"]], "ner_tags": [["B-PER", "O"]]})
    assert len(row["tokens"][1]) == 3 and sorted(row["ner_tags"][1]) == ["B-PER", "O", "O"]


def test_a_fork_opens_wordnet_anew(wordnet):
    """Two processes that read from one open file disturb each other."""

    def check(self):
        assert bool(self.unloaded) == forked()

    wordnet.check = check
    data = datasets.Dataset.from_dict({"text": ["a quick one", "one quick cat", "he was quick"] * 4})
    augmenter = Augmenter(["synonym"])
    # The forks first: they would know the words that were looked up before.
    forks = augment_dataset(data.add_column("n", list(range(12))), augmenter, num_proc=2)["text"]
    assert len(forks) == 24 and augment_dataset(data, augmenter)["text"] == forks
    assert not wordnet.unloaded


@pytest.mark.parametrize("name", ["synonym", "insert_synonym"])
def test_synonyms_need_wordnet(wordnet, monkeypatch, name):
    wordnet.missing = LookupError("Resource wordnet not found")
    with pytest.raises(LookupError, match="not there: python -m nltk.downloader wordnet"):
        Augmenter([name])
    wordnet.missing = OSError("No such file or directory: '/data/lexnames'")
    with pytest.raises(LookupError, match="incomplete .*lexnames.*nltk.downloader wordnet"):
        Augmenter([name])
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        Augmenter([name])


# --- the true one -------------------------------------------------------------------------------------------------


@pytest.fixture
def true_wordnet():
    pytest.importorskip("nltk", reason="nltk is not installed")
    try:
        check_wordnet()
    except LookupError:
        pytest.skip("WordNet is not installed: python -m nltk.downloader wordnet")


def test_true_wordnet(true_wordnet):
    assert synonyms("physician") == ["doc", "doctor", "medico"]
    assert "thorax" in synonyms("Chest") and "emesis" in synonyms("vomiting")
    assert synonyms("weeks") == [] == synonyms("negative") == synonyms("while")
    text = "The physician saw a cold patient."
    made = copies_of(text, ["synonym"], copies=3)
    assert any("doctor" in copy or "medico" in copy or "doc " in copy for copy in made)
    assert all(len(words(copy)) == 6 for copy in made)


@pytest.mark.slow
def test_true_wordnet_in_two_processes(true_wordnet):
    rows = ["the physician said that the vomiting began within a week", "a large cat ate the small mouse today"] * 20
    data = datasets.Dataset.from_dict({"text": rows, "n": list(range(40))})
    augmenter = Augmenter(["synonym", "insert_synonym"], strength=0.5, copies=2, seed=os.getpid())
    expected = augment_dataset(data, augmenter)[:]
    assert len(expected["n"]) == 120
    assert augment_dataset(data.rename_column("n", "m"), augmenter, num_proc=2)["text"] == expected["text"]

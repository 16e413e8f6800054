"""Whole-word masking: rates, wholeness, and that masks are a function of seed, epoch and row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _mlm_masking import FIRST, IGNORED, LATER, OUTSIDE, MaskedRows, NewMasksEachEpoch, WholeWordMasking  # noqa: E402

MASK = 4


class FakeTokenizer:
    """Ids 0 to 4 are special, 5 to 999 ordinary."""

    mask_token_id = MASK
    all_special_ids = (0, 1, 2, 3, MASK)

    def __len__(self) -> int:
        return 1000


def masking(probability: float = 0.15) -> WholeWordMasking:
    return WholeWordMasking(FakeTokenizer(), probability)


def long_row(words: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Words of 1 to 4 tokens within special ones; ids, kinds, and the word of each token (-1: none)."""
    random = numpy.random.default_rng(1)
    lengths = random.integers(1, 5, words)
    kinds = [OUTSIDE, *(kind for n in lengths for kind in [FIRST] + [LATER] * (n - 1)), OUTSIDE]
    word = [-1, *(index for index, n in enumerate(lengths) for _ in range(n)), -1]
    ids = random.integers(5, 1000, len(kinds))
    ids[0], ids[-1] = 2, 3
    return ids, numpy.array(kinds), numpy.array(word)


def rows(count: int = 6) -> datasets.Dataset:
    ids, kinds, _ = long_row(20)
    return datasets.Dataset.from_dict({"input_ids": [ids.tolist()] * count, "kinds": [kinds.tolist()] * count})


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_rates_are_those_asked_for(probability: float) -> None:
    ids, kinds, word = long_row(40_000)
    masked, labels = masking(probability)(ids, kinds, numpy.random.default_rng(0))
    hidden = labels != IGNORED
    inside = word >= 0
    assert not hidden[~inside].any() and (masked[~inside] == ids[~inside]).all()
    assert (labels[hidden] == ids[hidden]).all() and (masked[~hidden] == ids[~hidden]).all()
    assert abs(hidden[inside].mean() - probability) < 0.01
    # Whatever the length of the word: none is preferred.
    lengths = numpy.bincount(word[inside])[word[inside]]
    for length in range(1, 5):
        assert abs(hidden[inside][lengths == length].mean() - probability) < 0.02
    share = (masked[hidden] == MASK).mean(), (masked[hidden] == ids[hidden]).mean()
    assert abs(share[0] - 0.8) < 0.02 and abs(share[1] - 0.1) < 0.02


def test_a_word_is_hidden_as_a_whole_and_in_one_way() -> None:
    ids, kinds, word = long_row(5000)
    masked, labels = masking()(ids, kinds, numpy.random.default_rng(0))
    ways = set()
    for index in range(word.max() + 1):
        of_word = word == index
        hidden = labels[of_word] != IGNORED
        assert hidden.all() or not hidden.any()
        if hidden.all() and of_word.sum() > 1:
            mask, same = masked[of_word] == MASK, masked[of_word] == ids[of_word]
            assert mask.all() or not mask.any()
            ways.add("mask" if mask.all() else "same" if same.all() else "random")
    assert ways == {"mask", "same", "random"}


def test_no_special_token_is_put_in() -> None:
    ids, kinds, _ = long_row(30_000)
    masked, labels = masking(0.9)(ids, kinds, numpy.random.default_rng(0))
    put = masked[(labels != IGNORED) & (masked != MASK)]
    assert put.min() >= 5 and put.max() == 999


def test_a_short_row_gives_one_word_and_an_empty_one_none() -> None:
    ids, kinds = numpy.array([2, 7, 8, 9, 3]), numpy.array([OUTSIDE, FIRST, LATER, FIRST, OUTSIDE])
    counts = {(masking(1e-9)(ids, kinds, numpy.random.default_rng(s))[1] != IGNORED).sum() for s in range(20)}
    assert counts == {1, 2}
    _, labels = masking()(ids, numpy.full(5, OUTSIDE), numpy.random.default_rng(0))
    assert (labels == IGNORED).all()


def test_masks_depend_on_seed_epoch_and_row_alone() -> None:
    def of(seed: int | None, epoch: int, row: int) -> Any:
        data = MaskedRows(rows(), masking(), seed)
        data.epoch.fill_(epoch)
        return data[row]

    first = of(1, 0, 3)
    assert first == of(1, 0, 3) and first["attention_mask"] == [1] * len(first["input_ids"])
    assert all(first != other for other in (of(2, 0, 3), of(1, 1, 3), of(1, 0, 4)))
    # For evaluation neither seed nor epoch count.
    assert of(None, 0, 3) == of(None, 5, 3) != of(None, 0, 4)


def test_each_epoch_has_its_masks_also_when_resumed_within_it() -> None:
    data = MaskedRows(rows(), masking(), 1)
    callback = NewMasksEachEpoch(data)
    for epoch, expected in ((None, 0), (0, 0), (1.0, 1), (2.4, 2), (3 - 1e-12, 3)):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert int(data.epoch) == expected

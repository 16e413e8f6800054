"""Windows over long sentences, by brute force: coverage, room, overlap, entities kept whole, most context."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _ner_windows import assign_words, plan_windows  # noqa: E402


def chunks(breaks: list[bool]) -> list[tuple[int, int]]:
    """The stretches from one break to the next: entities and words outside of them."""
    places = [word for word, free in enumerate(breaks) if free or word == 0] + [len(breaks)]
    return list(zip(places[:-1], places[1:], strict=True))


def random_case(rng: random.Random) -> tuple[list[int], int, int, list[bool]]:
    capacity = rng.randint(1, 14)
    counts = [min(capacity, rng.choice([0, 1, 1, 1, 2, 3, 20])) for _ in range(rng.randint(1, 50))]
    breaks = [word == 0 or rng.random() < rng.choice([0.3, 0.8]) for word in range(len(counts))]
    return counts, capacity, rng.randrange(capacity), breaks


@pytest.mark.parametrize(
    ("counts", "capacity", "overlap", "windows"),
    [
        ([1] * 5, 5, 2, [(0, 5)]),
        ([1] * 8, 4, 2, [(0, 4), (2, 6), (4, 8)]),
        ([1] * 8, 4, 0, [(0, 4), (4, 8)]),
        ([1] * 6, 4, 3, [(0, 4), (1, 5), (2, 6)]),
        ([3, 3, 3], 4, 2, [(0, 1), (1, 2), (2, 3)]),  # no whole word fits into the overlap
        ([1, 1, 9, 1], 4, 2, [(0, 2), (2, 3), (3, 4)]),  # a word longer than a window
        ([2, 0, 0, 2, 0], 2, 1, [(0, 3), (1, 5)]),  # words of no sub-word go along
        ([0, 0], 3, 1, [(0, 2)]),
    ],
)
def test_windows_counted_by_hand(
    counts: list[int], capacity: int, overlap: int, windows: list[tuple[int, int]]
) -> None:
    assert plan_windows(counts, capacity, overlap) == windows


def test_entities_are_kept_whole() -> None:
    breaks = [True, True, True, False, False, True, True, True]  # an entity of words 2 to 4
    assert plan_windows([1] * 8, 4, 1, breaks) == [(0, 2), (1, 5), (5, 8)]  # (4, 8) would begin within it
    assert plan_windows([1] * 8, 4, 3, breaks) == [(0, 2), (1, 5), (2, 6), (5, 8)]
    assert plan_windows([1] * 8, 2, 1, breaks) == [(0, 2), (2, 4), (4, 6), (5, 7), (6, 8)]  # does not fit: cut once


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("whole", [False, True])
def test_windows_cover_all_fit_overlap_and_cut_nothing_that_fits(seed: int, whole: bool) -> None:
    rng = random.Random(seed)
    several = cut = 0
    for _ in range(150):
        counts, capacity, overlap, breaks = random_case(rng)
        windows = plan_windows(counts, capacity, overlap, breaks if whole else None)
        assert windows[0][0] == 0 and windows[-1][1] == len(counts)
        for first, end in windows:
            assert first < end and sum(counts[first:end]) <= capacity
        for (first, end), (later, further) in zip(windows, windows[1:], strict=False):
            assert first <= later <= end < further
            assert sum(counts[later:end]) <= overlap
        if whole:
            for begin, end in chunks(breaks):
                inside = [place for window in windows for place in window if begin < place < end]
                assert not inside or sum(counts[begin:end]) > capacity
                cut += bool(inside)
        several += len(windows) > 2
    assert several > 50 and (cut > 10 or not whole)


@pytest.mark.parametrize("seed", range(8))
def test_every_word_is_answered_for_where_it_has_the_most_context(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        counts, capacity, overlap, breaks = random_case(rng)
        windows = plan_windows(counts, capacity, overlap)
        for word, index in enumerate(assign_words(counts, windows)):
            contexts = [
                min(sum(counts[first:word]), sum(counts[word + 1 : end])) if first <= word < end else -1
                for first, end in windows
            ]
            assert index == contexts.index(max(contexts))
        # Whole entities go to one window, which holds all of them.
        windows = plan_windows(counts, capacity, overlap, breaks)
        answering = assign_words(counts, windows, breaks)
        assert answering == sorted(answering)
        for begin, end in chunks(breaks):
            if sum(counts[begin:end]) <= capacity:
                (index,) = set(answering[begin:end])
                assert windows[index][0] <= begin and end <= windows[index][1]
        for word, index in enumerate(answering):
            assert windows[index][0] <= word < windows[index][1]

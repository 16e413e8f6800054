"""Windows over long sentences: where they begin and end, and which of them answers for a word. Numbers only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

# First word, one past the last word.
Window = tuple[int, int]


def plan_windows(
    counts: Sequence[int], capacity: int, overlap: int, breaks: Sequence[bool] | None = None
) -> list[Window]:
    """Windows that together cover all words, each reaching further than the one before.

    Args:
        counts: Sub-words per word. A word of more than `capacity` counts as that many: it fills a window of its own.
        capacity: Sub-words that fit into a window.
        overlap: Sub-words that neighboring windows have in common, at most; fewer where a whole number of words, or
            the next entity, would not fit otherwise.
        breaks: For each word whether a window may begin there, and another end before it. Where two such places are
            further apart than a window is long, the window ends between them all the same. Default: anywhere.
    """
    sums = [0, *accumulate(min(count, capacity) for count in counts)]
    n_words = len(counts)
    free = [True] * (n_words + 1) if breaks is None else [*breaks, True]
    windows: list[Window] = []
    end = 0
    while end < n_words:
        begin = bisect_left(sums, sums[end] - overlap, hi=end) if windows else 0
        for start in range(begin, end + 1):
            furthest = bisect_right(sums, sums[start] + capacity) - 1
            stop = next((place for place in range(furthest, end, -1) if free[place]), None)
            if stop is not None and (free[start] or start == end):
                break
        else:
            start, stop = end, bisect_right(sums, sums[end] + capacity) - 1
        windows.append((start, stop))
        end = stop
    return windows


def assign_words(counts: Sequence[int], windows: Sequence[Window], breaks: Sequence[bool] | None = None) -> list[int]:
    """For each word the index of the window that answers for it: the one in which it has the most context.

    The context of a word is the smaller number of sub-words on its two sides within the window; of equal windows the
    earlier answers.

    Args:
        counts: Sub-words per word.
        windows: Windows as `plan_windows` makes them.
        breaks: The same as there. A word without break goes to the window of the word before it, if that holds it.
    """
    sums = [0, *accumulate(counts)]
    context = [-1] * len(counts)
    answering = [0] * len(counts)
    for index, (first, end) in enumerate(windows):
        for word in range(first, end):
            least = min(sums[word] - sums[first], sums[end] - sums[word + 1])
            if least > context[word]:
                context[word], answering[word] = least, index
    for word in range(1, len(counts)):
        if breaks is not None and not breaks[word] and word < windows[answering[word - 1]][1]:
            answering[word] = answering[word - 1]
    return answering

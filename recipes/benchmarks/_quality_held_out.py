"""Rows that the held-out slope is measured on: which ones, when training gets them back, and in what portions."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Sampler

# Part of the training after which held-out training rows are trained on like the others: the first where rows are
# hardly learned by heart, and the model needs every one; the second where they are. See `by_heart`.
RELEASE = 0.35, 0.55
# Part of what is left of the training then in which they are seen twice as often as the others.
CATCH_UP = 0.5
# Part of the training before which nothing is measured: next to θ0 a slope is noise.
BURN_IN = 0.2
# Rows measured per row trained on, over the whole training: of those held out of it; and of an evaluation set, where
# every measurement is of fewer rows and the walks over the weights count for more.
BUDGET, EVALUATION_BUDGET = 0.08, 0.07
# Rows of an evaluation set that are looked at, by turns.
EVALUATION_ROWS = 64
# Of fewer training rows none are held out, and never fewer than this: three rows do not tell a λ.
FEWEST_ROWS, FEWEST_HELD = 20, 4
# Times that rows are seen in a training that learns them by heart.
FULL_EPOCHS = 20


def by_heart(rows: int, draws: int) -> float:
    """How far a training learns its rows by heart, 0 to 1.

    Args:
        rows: Rows of the training set.
        draws: Rows that are drawn over the whole training.

    Returns:
        1 where every row is seen `FULL_EPOCHS` times or more, in the square less below.
    """
    return min(1.0, draws / max(1, rows) / FULL_EPOCHS) ** 2


@dataclass
class HeldOut:
    """Training rows that are held out, each with one that stands in for it until it is released.

    Once released, a row first takes the place of its stand-in as well, to make up for lost time; in the last part of
    the training there is no difference between them and the others.

    Attributes:
        stand_ins: Held-out row → stand-in.
        draws: Rows that the sampler will draw over the whole training.
        release: Part of the training after which they are released.
    """

    stand_ins: dict[int, int]
    draws: int
    release: float

    def __post_init__(self) -> None:
        self._back = {stand_in: row for row, stand_in in self.stand_ins.items()}

    def row(self, index: int, position: int) -> int:
        """The row that is trained on where the sampler says `index` as the `position`-th draw of the training."""
        if position < self.release * self.draws:
            return self.stand_ins.get(index, index)
        if position < (self.release + CATCH_UP * (1.0 - self.release)) * self.draws:
            return self._back.get(index, index)
        return index


def _wanted(rows: int, draws: int) -> int:
    """How many rows to hold out: about 1.2·√rows, and no greater part of them than the number of epochs allows."""
    if rows < FEWEST_ROWS:
        return 0
    return max(FEWEST_HELD, min(math.floor(rows / 5 * by_heart(rows, draws)), round(1.2 * math.sqrt(rows))))


def hold_out(rows: int, draws: int, seed: int, labels: Sequence[Any] | None = None) -> HeldOut:
    """Chooses rows in turn from every class; each gets a stand-in of its class.

    They are about 1.2·√rows, at most a fifth of all, and of a training of few epochs fewer, but four at least.

    Args:
        rows: Rows of the training set.
        draws: Rows that the sampler will draw over the whole training.
        seed: Of the choice; the global random state stays as it is.
        labels: A class per row, where there are classes.

    Returns:
        The choice; no rows where there are fewer than `FEWEST_ROWS`.
    """
    wanted = _wanted(rows, draws)
    draw = random.Random(seed)
    classes: dict[Any, list[int]] = defaultdict(list)
    for row in range(rows):
        classes[None if labels is None else labels[row]].append(row)
    piles = [classes[name] for name in sorted(classes, key=str)]
    for pile in piles:
        draw.shuffle(pile)
    draw.shuffle(piles)
    stand_ins: dict[int, int] = {}
    while len(stand_ins) < wanted:
        before = len(stand_ins)
        for pile in piles:
            # A class of one keeps it: the model could not learn it otherwise.
            if len(pile) >= 2 and len(stand_ins) < wanted:
                stand_ins[pile.pop()] = pile.pop()
        if len(stand_ins) == before:
            break
    first, last = RELEASE
    return HeldOut(stand_ins, draws, first + (last - first) * by_heart(rows, draws))


class HeldOutSampler(Sampler[int]):
    """A sampler in which held-out rows are replaced by their stand-ins until their release.

    What it gives depends on the position in the whole training alone: neither on how far a loader reads ahead, nor on
    whether the training was resumed.
    """

    def __init__(self, sampler: Sampler[int], held: HeldOut) -> None:
        self.sampler = sampler
        self.held = held
        self.epoch = 0

    def __len__(self) -> int:
        return len(cast(Sized, self.sampler))

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self)
        for offset, index in enumerate(self.sampler):
            yield self.held.row(int(index), start + offset)

    def set_epoch(self, epoch: int) -> None:
        """As `torch.utils.data.DistributedSampler.set_epoch`."""
        self.epoch = epoch
        inner = getattr(self.sampler, "set_epoch", None)
        if inner is not None:
            inner(epoch)

    def __getattr__(self, name: str) -> Any:
        # Loaders ask a sampler for its `generator`, `data_source` and the like.
        return getattr(self.__dict__["sampler"], name)


@dataclass(frozen=True)
class Portions:
    """How often and on how many rows to measure.

    Attributes:
        every: Optimizer steps between measurements.
        rows: Rows of one measurement, on each process.
        start: Step before which nothing is measured.
        until: Step from which on nothing is measured.
    """

    every: int
    rows: int
    start: int
    until: int

    @classmethod
    def plan(cls, rows: int, batch: int, steps: int, share: float, budget: float, processes: int) -> Portions:
        """Spreads a budget over the part of the training from `BURN_IN` to `share`.

        Args:
            rows: Rows there are to measure on.
            batch: Rows per optimizer step, over all processes.
            steps: Optimizer steps of the training.
            share: Part of the steps after which nothing is measured, `BURN_IN` to 1.
            budget: Rows measured per row trained on.
            processes: Processes that share the rows of a measurement.
        """
        start, until = max(1, math.ceil(BURN_IN * steps)), math.ceil(share * steps)
        # Every second step of a short training, every fourth of a longer one, sixty times in a long one.
        every = max(2, min(4, (until - start) // 12), (until - start) // 60)
        allowed = budget / (share - BURN_IN) * batch
        count = max(1, math.floor(allowed * every / processes))
        count = min(count, max(1, rows // processes))
        return cls(max(every, math.ceil(count * processes / allowed)), count, start, until)

    def due(self, step: int) -> bool:
        """Whether to measure before optimizer step `step`."""
        return self.start <= step < self.until and (step - self.start) % self.every == 0

    def positions(self, step: int, rows: int, process: int, processes: int) -> list[int]:
        """Which of the rows this process measures, by turns."""
        first = (step - self.start) // self.every * self.rows * processes + process * self.rows
        return [(first + offset) % rows for offset in range(self.rows)]

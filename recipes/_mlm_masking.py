"""Whole-word masking that depends on the seed, the epoch and the row alone."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

# What a token of a packed row is: the first of a word, a later one of the same word, or none of a word.
FIRST, LATER, OUTSIDE = 1, 0, -1
IGNORED = -100
# Evaluation rows are masked alike in every run, whatever its seed: perplexities compare over epochs, models and runs.
EVALUATION_SEED = 20180206


class WholeWordMasking:
    """Chooses words with a fixed probability and hides each with all its tokens.

    Every word is drawn on its own, so that every token is masked with that probability, whatever the length of its
    word. Of the drawn words 80 % become mask tokens, 10 % random tokens and 10 % stay as they are, a word as a whole.
    A row of which no word was drawn gives one.

    transformers' collators do not do this: with whole words they never put random or unchanged ones.

    Args:
        tokenizer: Has a mask token; its special tokens are neither drawn nor put in.
        probability: Share of the words that is drawn.
    """

    def __init__(self, tokenizer: Any, probability: float) -> None:
        self.probability = probability
        self.mask_id = tokenizer.mask_token_id
        special = set(tokenizer.all_special_ids)
        self.ordinary = numpy.array([token for token in range(len(tokenizer)) if token not in special])

    def __call__(
        self, ids: numpy.ndarray, kinds: numpy.ndarray, random: numpy.random.Generator
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Masked tokens, and as labels the hidden ones.

        Shape:
            ids, kinds and both results: [tokens]
        """
        ids, labels = ids.copy(), numpy.full(len(ids), IGNORED)
        places = numpy.flatnonzero(kinds != OUTSIDE)
        words = numpy.cumsum(kinds[places] == FIRST) - 1  # of each place
        if not len(places):
            return ids, labels
        count = words[-1] + 1
        drawn = random.random(count) < self.probability
        if not drawn.any():
            drawn[random.integers(count)] = True
        fate = random.random(count)
        hidden = drawn[words]
        labels[places[hidden]] = ids[places[hidden]]
        ids[places[hidden & (fate < 0.8)[words]]] = self.mask_id
        changed = places[hidden & ((fate >= 0.8) & (fate < 0.9))[words]]
        ids[changed] = random.choice(self.ordinary, len(changed))
        return ids, labels


class MaskedRows(Dataset):
    """Packed rows as a `Trainer` takes them, masked anew in each epoch.

    The masks of a row are a function of seed, epoch and row: the same for any batch size, accumulation, number of
    processes and of loading workers, and after resuming.

    Args:
        rows: Columns `input_ids` and `kinds`.
        masking: Masks one row.
        seed: Of the masks; `None` for evaluation, whose masks never change.
    """

    def __init__(self, rows: Any, masking: WholeWordMasking, seed: int | None = None) -> None:
        self.rows = rows.with_format("numpy")
        self.masking = masking
        self.seed = seed
        # Shared with loading workers that live for several epochs.
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        key = (EVALUATION_SEED, index) if self.seed is None else (self.seed, int(self.epoch), index)
        row = self.rows[index]
        ids, labels = self.masking(row["input_ids"], row["kinds"], numpy.random.default_rng(key))
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}


class NewMasksEachEpoch(TrainerCallback):
    """Tells the training rows which epoch it is."""

    def __init__(self, rows: MaskedRows) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Reached before the epoch's first batch is made; a fraction where a run is resumed within an epoch.
        self.rows.epoch.fill_(int((state.epoch or 0) + 1e-9))

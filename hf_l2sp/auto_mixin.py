"""`l2sp_schedule="auto"` in a trainer: the entropy of its labels, the loss of every optimizer step, λ from both."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .auto import AutoStrength
from .fisher_rows import NO_LABEL
from .state import read_state
from .traceless import own_randomness

# Training examples of whose labels the entropy is taken.
LABELLED_ROWS = 256


class L2SPAutoMixin:
    """The part of `L2SPMixin` that finds λ. See `AutoStrength` for the rule."""

    args: Any
    state: Any
    _l2sp_auto: AutoStrength | None = None
    _l2sp_loader: DataLoader[Any] | None = None
    # Loss of the micro-batches so far of the step that is under way; of the last whole one, before it is taken up.
    _l2sp_partial: Tensor | None = None
    _l2sp_loss: Tensor | None = None

    @property
    def _l2sp_is_auto(self) -> bool:
        return bool(self._l2sp_on) and self._l2sp_arg("l2sp_schedule") == "auto"  # type: ignore[attr-defined]

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
        self._l2sp_loader = loader if self._l2sp_is_auto else None
        return loader

    def _l2sp_begin_auto(self, checkpoint: str | None) -> None:
        """At the start of training: λ next to 0, or as the checkpoint left it."""
        self._l2sp_auto = self._l2sp_partial = self._l2sp_loss = None
        if not self._l2sp_is_auto:
            return
        state = None if checkpoint is None else read_state(checkpoint)
        kept = None if state is None else state.get("strength", {}).get("auto")
        if kept is None:
            self._l2sp_auto = AutoStrength(self._l2sp_label_entropy())
        else:
            self._l2sp_auto = AutoStrength.from_state(kept)
        self._l2sp_loader = None

    def _l2sp_label_entropy(self) -> float:
        """Of the labels of some training rows, as the loader would give them; infinite where they are no classes."""
        loader = self._l2sp_loader
        if loader is None or not isinstance(loader.dataset, Sized) or isinstance(loader.dataset, IterableDataset):
            return math.inf
        data: Any = loader.dataset
        rows = random.Random(self.args.seed).sample(range(len(data)), min(len(data), LABELLED_ROWS))
        with own_randomness(self.args.seed):  # a collator may draw masks
            batch: Any = loader.collate_fn([data[row] for row in rows])
        named = batch if isinstance(batch, Mapping) else {}
        labels = next((named[name] for name in self.label_names if name in named), None)  # type: ignore[attr-defined]
        return label_entropy(labels) if isinstance(labels, Tensor) else math.inf

    def _l2sp_note_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, which is its share of that of the step."""
        if self._l2sp_auto is None:
            return
        loss = loss.detach().to(torch.float32)
        self._l2sp_partial = loss if self._l2sp_partial is None else self._l2sp_partial + loss
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            # The mean over the processes now, but read later, when a GPU has long come to know it.
            self._l2sp_loss = self.accelerator.reduce(self._l2sp_partial, "mean")  # type: ignore[attr-defined]
            self._l2sp_partial = None

    def _l2sp_update_auto(self) -> None:
        """Takes up the loss of the last step, if that was not done already."""
        if self._l2sp_auto is not None and self._l2sp_loss is not None:
            loss, self._l2sp_loss = float(self._l2sp_loss), None
            self._l2sp_auto.update(loss, self.state.max_steps)


def label_entropy(labels: Tensor) -> float:
    """Entropy of classes, in nats.

    Args:
        labels: One class per example or per token, -100 where there is none. Shape: any.

    Returns:
        Infinity for anything but classes.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return math.inf
    counts = labels[labels != NO_LABEL].unique(return_counts=True)[1].to(torch.float64)
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum()) if len(counts) else math.inf

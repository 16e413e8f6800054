"""What a look at the model in between takes from a training, and gives back: randomness, modes, collected metrics."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draws of its own; those of the training go on as if nothing had been drawn.

    Args:
        seed: Of what is drawn within.
    """
    kept = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            numpy.random.set_state(kept[1])


@contextmanager
def own_metrics(trainer: Any) -> Iterator[None]:
    """What passes through the trainer within leaves no trace in the metrics that TRL's trainers collect."""
    kept = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if kept is not None:
            trainer._metrics = kept


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

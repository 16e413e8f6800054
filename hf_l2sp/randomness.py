"""Random numbers beside those of a training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


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

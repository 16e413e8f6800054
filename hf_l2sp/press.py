"""How much of some labels a model's representations leave unexplained: leave-one-out error of a ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of the regression, as parts of the mean squared length of a representation; the best of them counts.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Examples that it takes.
FEWEST = 8


class LeftOut(NamedTuple):
    """Squared errors of examples that are predicted from all the others.

    Attributes:
        missed: By a ridge regression. Shape: (n,).
        mean: By the others' mean. Shape: (n,).
    """

    missed: Tensor
    mean: Tensor


def left_out(features: Tensor, targets: Tensor) -> LeftOut | None:
    """Predicts every example from all the others.

    In closed form from one fit (Allen, "The Relationship Between Variable Selection and Data Augmentation and a Method
    for Prediction", Technometrics 16, 1974), with the ridge that has the least sum of errors.

    Args:
        features: Representations. Shape: (n, d).
        targets: What to predict, such as one-hot classes. Shape: (n, k).

    Returns:
        None of fewer examples than `FEWEST`, numbers that are not finite, or targets that are all the same.
    """
    x, y = features.double(), targets.double()
    count = len(x)
    if count < FEWEST or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()) or bool((y == y[0]).all()):
        return None
    mean = (y - y.mean(0)).square().sum(1) * (count / (count - 1)) ** 2
    x = x - x.mean(0)
    gram = x @ x.T
    size = float(gram.diagonal().mean())
    if size == 0.0:
        return LeftOut(mean, mean)
    values, vectors = torch.linalg.eigh(gram / size)
    values = values.clamp(min=0.0)
    errors = []
    for ridge in RIDGES:
        # With H the matrix that takes y to its fit, an example that was left out is missed by (y − Hy)ᵢ / (1 − Hᵢᵢ).
        fit = (vectors * (values / (values + ridge))) @ vectors.T + 1.0 / count  # the mean is not shrunk
        errors.append(((y - fit @ y) / (1.0 - fit.diagonal())[:, None]).square().sum(1))
    return LeftOut(min(errors, key=lambda missed: float(missed.sum())), mean)


def unexplained(features: Tensor, targets: Tensor) -> float | None:
    """Share of the targets' variance that a ridge regression misses in examples that it was not fitted to.

    PRESS / SST, 1 − predictive R². See `left_out` for the arguments.

    Returns:
        0 (the representations say all) to 1 (they say nothing) and, of few examples, a little above; None where there
        are too few to tell, as in `left_out`.
    """
    found = left_out(features, targets)
    return None if found is None else float(found.missed.sum() / found.mean.sum())


def last_layer_adds(layers: Sequence[Tensor], targets: Tensor) -> float | None:
    """Share of the targets' variance that only the last of several representations explains, at the least.

    By how much less the last one misses than the best of those before it, or than the mean if that is better, less one
    standard error of that difference over the examples.

    Args:
        layers: Representations of the same examples, the last one last. Shape of each: (n, d).
        targets: What to predict, such as one-hot classes. Shape: (n, k).

    Returns:
        Up to 1; below 0 where the last one is not seen to add anything. None of fewer than two, or where there are too
        few examples to tell, as in `left_out`.
    """
    found = [left_out(layer, targets) for layer in layers]
    known = [one for one in found if one is not None]
    if len(known) < max(2, len(found)):
        return None
    before = min([known[0].mean, *(one.missed for one in known[:-1])], key=lambda missed: float(missed.sum()))
    gain = before - known[-1].missed
    return float((gain.sum() - len(gain) ** 0.5 * gain.std()) / known[0].mean.sum())

"""How much of some labels a model's representations leave unexplained: leave-one-out error of a ridge regression."""

from __future__ import annotations

import math
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


class Told(NamedTuple):
    """What representations tell of some targets, judged by examples that were left out.

    Attributes:
        unexplained: Share of the targets' variance that a ridge regression on the last layer misses, PRESS / SST or
            1 − predictive R²: 0 (it says all) to 1 (it says nothing) and, of few examples, a little above.
        significance: By how many standard errors over the examples that regression misses less than the mean does.
        added: Share of the variance that only the last layer explains, at the least: by how much less it misses than
            the best of those before it, or than the mean if that is better, less one standard error of the difference.
            Below 0 where it is not seen to add anything; 0 of one layer.
    """

    unexplained: float
    significance: float
    added: float


def told(layers: Sequence[Tensor], targets: Tensor) -> Told | None:
    """What the last of several representations says of some targets, by itself and beside those before it.

    Args:
        layers: Representations of the same examples, the last one last. Shape of each: (n, d).
        targets: What to predict, such as one-hot classes. Shape: (n, k).

    Returns:
        None without layers, or where one of them cannot be told of, as in `left_out`.
    """
    found = [left_out(layer, targets) for layer in layers]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    missed, mean = known[-1]
    before = min([mean, *(one.missed for one in known[:-1])], key=lambda errors: float(errors.sum()))
    beside_mean, beside_others = mean - missed, before - missed
    share = 1.0 / float(mean.sum())
    return Told(
        unexplained=share * float(missed.sum()),
        significance=_in_errors(beside_mean),
        added=share * (float(beside_others.sum()) - _error_of_sum(beside_others)) if len(known) > 1 else 0.0,
    )


def _error_of_sum(gains: Tensor) -> float:
    return float(gains.std()) * math.sqrt(len(gains))


def _in_errors(gains: Tensor) -> float:
    total, error = float(gains.sum()), _error_of_sum(gains)
    if error == 0.0:
        return math.copysign(math.inf, total) if total else 0.0
    return total / error

"""How much of some labels a model's representations leave unexplained: leave-one-out error of a ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the regression, as parts of the mean squared length of a representation; the best of them counts.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Examples that it takes.
FEWEST = 8


def unexplained(features: Tensor, targets: Tensor) -> float | None:
    """Share of the targets' variance that a ridge regression misses in examples that it was not fitted to.

    PRESS / SST (Allen, "The Relationship Between Variable Selection and Data Augmentation and a Method for
    Prediction", Technometrics 16, 1974), 1 − predictive R²: every example is predicted from all the others, in closed
    form from one fit, and set against the prediction by the others' mean.

    Args:
        features: Representations. Shape: (n, d).
        targets: What to predict, such as one-hot classes. Shape: (n, k).

    Returns:
        0 (the representations say all) to 1 (they say nothing) and, of few examples, a little above; None of fewer
        examples than `FEWEST`, numbers that are not finite, or targets that are all the same.
    """
    x, y = features.double(), targets.double()
    count = len(x)
    if count < FEWEST or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()) or bool((y == y[0]).all()):
        return None
    x = x - x.mean(0)
    gram = x @ x.T
    size = float(gram.diagonal().mean())
    if size == 0.0:
        return 1.0
    values, vectors = torch.linalg.eigh(gram / size)
    values = values.clamp(min=0.0)
    errors = []
    for ridge in RIDGES:
        # With H the matrix that takes y to its fit, an example that was left out is missed by (y − Hy)ᵢ / (1 − Hᵢᵢ).
        fit = (vectors * (values / (values + ridge))) @ vectors.T + 1.0 / count  # the mean is not shrunk
        errors.append(float(((y - fit @ y) / (1.0 - fit.diagonal())[:, None]).square().sum()))
    # The others' mean misses by that much.
    total = float((y - y.mean(0)).square().sum()) * (count / (count - 1)) ** 2
    return min(errors) / total

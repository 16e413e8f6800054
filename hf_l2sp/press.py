"""How much of some labels a model's representations leave unexplained: leave-one-out error of a ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the regression, as parts of the mean squared length of a representation; the best of them counts.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Examples that it takes.
FEWEST = 8


def unexplained(features: Tensor, targets: Tensor, examples: Tensor) -> float | None:
    """Share of the targets' variance that a ridge regression misses in examples that it was not fitted to.

    PRESS / SST (Allen, "The Relationship Between Variable Selection and Data Augmentation and a Method for
    Prediction", Technometrics 16, 1974), 1 − predictive R²: every example is predicted from all the others, in closed
    form from one fit, and set against the prediction by the others' mean.

    Args:
        features: Representations. Shape: (n, d).
        targets: What to predict, such as one-hot classes. Shape: (n, k).
        examples: Which example each row is of; the rows of one example, such as the words of a sentence, are left out
            together. Shape: (n,).

    Returns:
        0 (the representations say all) to 1 (they say nothing) and, of few examples, a little above; None of fewer
        examples than `FEWEST`, numbers that are not finite, or targets that are all the same.
    """
    x, y = features.double(), targets.double()
    parts = [(examples == example).nonzero()[:, 0] for example in examples.unique()]
    if len(parts) < FEWEST or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        return None
    count = len(x)
    total = 0.0
    for part in parts:
        others = (y.sum(0) - y[part].sum(0)) / (count - len(part))
        total += float((y[part] - others).square().sum())
    x = x - x.mean(0)
    gram = x @ x.T
    size = float(gram.diagonal().mean())
    if total <= 0.0 or float((y - y[0]).abs().max()) == 0.0:
        return None
    if size == 0.0:
        return 1.0
    values, vectors = torch.linalg.eigh(gram / size)
    return min(_press(values, vectors, y, parts, ridge) for ridge in RIDGES) / total


def _press(values: Tensor, vectors: Tensor, y: Tensor, parts: list[Tensor], ridge: float) -> float:
    """Sum of the squared errors of all parts, each left out of the fit.

    With H the matrix that takes y to its fit, that of a part that was left out misses by (I − H_part)⁻¹ (y − Hy)_part.
    """
    shrunk = values.clamp(min=0.0)
    fit = (vectors * (shrunk / (shrunk + ridge))) @ vectors.T + 1.0 / len(y)  # the mean is not shrunk
    missed = y - fit @ y
    if len(parts) == len(y):
        return float((missed / (1.0 - fit.diagonal())[:, None]).square().sum())
    error = 0.0
    for part in parts:
        own = torch.eye(len(part), dtype=y.dtype, device=y.device) - fit[part][:, part]
        error += float(torch.linalg.solve(own, missed[part]).square().sum())
    return error

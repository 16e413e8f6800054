"""Differences of two methods on the same draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Mean of the differences, and the interval that holds 95 % of its bootstrap over the draws."""
    drawn = numpy.random.default_rng(0).choice(list(differences), (10000, len(differences))).mean(1)
    low, high = numpy.quantile(drawn, (0.025, 0.975)).tolist()
    return {"mean": statistics.mean(differences), "low": low, "high": high}


def paired_in_groups(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean of the groups' means, and the 95 % interval of a bootstrap over the groups and the draws in each."""
    random = numpy.random.default_rng(0)
    means = [
        numpy.mean([random.choice(groups[chosen], len(groups[chosen])).mean() for chosen in row])
        for row in random.integers(len(groups), size=(2000, len(groups)))
    ]
    low, high = numpy.quantile(means, (0.025, 0.975)).tolist()
    return {"mean": statistics.mean(statistics.mean(group) for group in groups), "low": low, "high": high}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation; 0 for a single value."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}

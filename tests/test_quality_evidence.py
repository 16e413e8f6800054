"""The quality study's evidence update against a linear-Gaussian model, whose evidence has a closed form."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

from _quality_evidence import EvidenceTrainer  # noqa: E402  # isort: skip

ROWS, DIMENSIONS = 400, 120


class Model:
    """y = Xθ + unit noise with uncorrelated columns of X, so that the curvature of the mean loss is a diagonal."""

    def __init__(self, seed: int, prior: float) -> None:
        draw = numpy.random.default_rng(seed)
        self.curvature = draw.uniform(0.05, 3.0, DIMENSIONS)
        scale = numpy.sqrt(self.curvature)
        # What the rows say of √h·θ: the truth and noise of variance 1/N.
        truth = prior * draw.normal(size=DIMENSIONS)
        self.seen = scale * truth + draw.normal(size=DIMENSIONS) / math.sqrt(ROWS)

    def minimiser(self, strength: float) -> numpy.ndarray:
        """Of ½·Σ (√h·θ − seen)² + λ‖θ‖²."""
        return numpy.sqrt(self.curvature) * self.seen / (self.curvature + 2 * strength)

    def log_evidence(self, strength: float) -> float:
        """`seen` is Gaussian with variance h/(2Nλ) + 1/N."""
        variance = self.curvature / (2 * ROWS * strength) + 1 / ROWS
        return float(-0.5 * (numpy.log(variance) + self.seen**2 / variance).sum())


def update(model: Model, strength: float) -> tuple[float, float]:
    """What `EvidenceTrainer` makes of a model at its minimum: λ, and γ as its formula implies."""
    theta = model.minimiser(strength)
    squared = float((theta**2).sum())
    trainer = EvidenceTrainer.__new__(EvidenceTrainer)
    trainer.strength, trainer.train_dataset = strength, range(ROWS)
    trainer.squares = {"theta": torch.tensor(model.curvature)}
    trainer.l2sp_anchor = SimpleNamespace(
        apply=lambda *args, **kwargs: SimpleNamespace(total=torch.tensor(squared, dtype=torch.float64)),
        active_names=lambda: ["theta"],
    )
    trainer._update(10**9)
    return trainer.strength, trainer.strength**2 / strength * 2 * ROWS * squared


@pytest.mark.parametrize("prior", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("start", [1e-4, 10.0])
def test_it_finds_the_largest_evidence(prior, start):
    model, strength = Model(3, prior), start
    for _ in range(400):
        strength, gamma = update(model, strength)
    grid = numpy.exp(numpy.linspace(math.log(1e-5), math.log(10.0), 20001))
    best = grid[numpy.argmax([model.log_evidence(value) for value in grid])]
    assert strength == pytest.approx(best, rel=0.05)
    # Well determined parameters: the trace of (H + 2λ)⁻¹H.
    assert gamma == pytest.approx(float((model.curvature / (model.curvature + 2 * best)).sum()), rel=0.05)

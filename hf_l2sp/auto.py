"""The rule behind `l2sp_schedule="auto"`: λ from what held-out examples say of the way from θ0."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# "Never 0": the anchor stays in use, and a λ of this size does nothing.
SMALLEST = 1e-6
# With more a model hardly leaves θ0 (recipes/benchmarks/results/quality.json).
LARGEST = 1.0
# ‖θ − θ0‖² falls by about λ^-0.6 as λ rises, so that a Newton step in λ alone would come short by such a factor. Where
# that is too much λ swings; each turn makes the steps smaller (Kesten, "Accelerated Stochastic Approximation", 1958).
GAIN = 3.0
# At most so many times λ in a measurement, beyond a plain Newton step: θ follows λ with a lag.
FASTEST = 2.0
# ‖θ − θ0‖² is kept above this part of the largest that was seen, by as much less λ in each measurement: a handful of
# held-out examples that are wrong all the time must not nail θ to θ0.
LEAST_LEFT, LESS = 0.05, 0.7
# Of the moving average over measurements: one alone is that of a few examples.
MEMORY = 0.3


@dataclass
class AutoStrength:
    """λ as an integral controller: it rises while held-out examples want θ nearer to θ0, and falls while they don't.

    Let a = ⟨∇L_held-out(θ), θ − θ0⟩, the change of the held-out loss along the way from θ0. Where a > 0 the last
    part of that way fits the training examples alone; where a < 0 the model has still to learn. At a minimum of task
    loss + λ·Σ w‖θ − θ0‖² the same product with the *training* gradient is −2λ·Σ w‖θ − θ0‖², so that a change of λ by
    a / (2·Σ w‖θ − θ0‖²) makes up for a. With the optimism a − ⟨∇L_train, θ − θ0⟩ put as γ/N, the fixed point is
    MacKay's evidence update λ = γ / (2N‖θ − θ0‖²) (MacKay, "A Practical Bayesian Framework for Backpropagation
    Networks", 1992), with γ measured instead of computed from a Hessian at an optimum that training may be far from.

    Attributes:
        value: λ now.
        slope: Moving average of a, in units of the loss, that began at 0; see `average`.
        deepest: Smallest moving average so far.
        largest: Largest Σ w‖θ − θ0‖² so far.
        turns: How often the moving average has changed its sign after the first rise of λ.
        measured: Measurements so far.
        early: Whether held-out training rows were released early, since the model had still to learn.
    """

    value: float = SMALLEST
    slope: float = 0.0
    deepest: float = 0.0
    largest: float = 0.0
    turns: int = 0
    measured: int = 0
    early: bool = False

    @property
    def average(self) -> float:
        """The moving average over the measurements there are; 0 before the first."""
        return self.slope / (1.0 - MEMORY**self.measured) if self.measured else 0.0

    @property
    def has_to_learn(self) -> bool:
        """Whether held-out examples want θ farther from θ0, and not much less so than they ever did."""
        return self.slope < 0.0 and self.average < 0.8 * self.deepest

    def update(self, slope: float, squared: float) -> float:
        """Takes a measurement up.

        Args:
            slope: a.
            squared: Σ w‖θ − θ0‖².

        Returns:
            λ from now on. A measurement that is not finite, or taken at θ0, changes nothing.
        """
        if not (math.isfinite(slope) and math.isfinite(squared)) or squared <= 0.0:
            return self.value
        before = self.slope
        self.slope = MEMORY * self.slope + (1.0 - MEMORY) * slope
        self.measured += 1
        average = self.average
        self.deepest = min(self.deepest, average)
        # At first λ is as low as it gets, and a first rise is no turn.
        self.turns += self.slope * before < 0.0 and self.value > SMALLEST
        change = GAIN / (1 + self.turns) * average / (2.0 * squared)
        value = min(self.value + change, max(FASTEST * self.value, average / (2.0 * squared)))
        self.largest = max(self.largest, squared)
        if squared < LEAST_LEFT * self.largest:
            value = min(value, LESS * self.value)
        self.value = min(max(value, SMALLEST), LARGEST)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """For `l2sp_state.json`; floats survive JSON bit for bit."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> AutoStrength:
        """What `state_dict` gave.

        Raises:
            ValueError: Something is missing or no number.
        """
        try:
            numbers = {name: float(state[name]) for name in ("value", "slope", "deepest", "largest")}
            return cls(
                **numbers, turns=int(state["turns"]), measured=int(state["measured"]), early=bool(state["early"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of l2sp_schedule='auto' is damaged ({error!r}).") from None

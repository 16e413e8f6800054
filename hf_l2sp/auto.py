"""The rule behind `l2sp_schedule="auto"`: λ from what held-out examples say of the way from θ0."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# "Never 0": the anchor stays in use, and a λ of this size does nothing.
SMALLEST = 1e-6
# With more a model hardly leaves θ0 (recipes/benchmarks/results/quality.json).
LARGEST = 1.0
# How much a counts against b, by its sign. Where held-out examples want θ nearer to θ0 one takes a step of Newton's;
# where they still gain by the way from θ0, λ has to give way for good, not to be merely small.
_AWAY, _BACK = 3.0, 1.0
# A handful of held-out examples that are wrong all the time must not nail θ to θ0: λ is as found while ‖θ − θ0‖² is
# more than a quarter of the largest that was seen, falls as it does, and is off where an eighth is left.
FREE, LEAST_LEFT = 0.25, 0.125
# Of the moving averages of slopes over measurements, and of λ: one alone is that of a few examples.
MEMORY, INERTIA = 0.3, 0.5


@dataclass
class AutoStrength:
    """λ from two slopes along the way from θ0: of the loss of held-out examples, and of the loss that is trained on.

    Let a = ⟨∇L_held-out(θ), θ − θ0⟩ and b = ⟨∇L_train(θ), θ − θ0⟩. At a minimum of L_train + λ·Σ w‖θ − θ0‖² it is
    b = −2λ·Σ w‖θ − θ0‖², so that −b / (2·Σ w‖θ − θ0‖²) is the λ that θ answers to now, whatever λ is set to. Where
    a > 0 the last part of the way from θ0 fits the training examples alone; a / (2·Σ w‖θ − θ0‖²) more makes up for
    it. Where a < 0 the model has still to learn, and λ falls. With the optimism a − b put as γ/N this is MacKay's
    evidence update λ = γ / (2N‖θ − θ0‖²) (MacKay, "A Practical Bayesian Framework for Backpropagation Networks",
    1992), with γ measured instead of computed from a Hessian at an optimum that training may be far from. λ is not
    summed up over time: θ follows it with a lag, in which a sum would grow beyond all need.

    Attributes:
        value: λ now.
        held: Moving average of a, in units of the loss, that began at 0; see `average`.
        trained: The same of b.
        deepest: Smallest average of a so far.
        largest: Largest Σ w‖θ − θ0‖² so far.
        measured: Measurements so far.
        early: Whether held-out training rows were released early, since the model had still to learn.
    """

    value: float = SMALLEST
    held: float = 0.0
    trained: float = 0.0
    deepest: float = 0.0
    largest: float = 0.0
    measured: int = 0
    early: bool = False

    @property
    def average(self) -> float:
        """The moving average of a over the measurements there are; 0 before the first."""
        return self._filled(self.held) if self.measured else 0.0

    def _filled(self, moving: float) -> float:
        """A moving average that began at 0, as if it had begun with the first measurement."""
        return moving / (1.0 - MEMORY**self.measured)

    @property
    def has_to_learn(self) -> bool:
        """Whether held-out examples want θ farther from θ0, and about as much so as they ever did."""
        return self.held < 0.0 and self.average < 0.95 * self.deepest

    def update(self, held: float, trained: float, squared: float) -> float:
        """Takes a measurement up.

        Args:
            held: a.
            trained: b.
            squared: Σ w‖θ − θ0‖².

        Returns:
            λ from now on. A measurement that is not finite, or taken at θ0, changes nothing.
        """
        if not all(map(math.isfinite, (held, trained, squared))) or squared <= 0.0:
            return self.value
        self.held = MEMORY * self.held + (1.0 - MEMORY) * held
        self.trained = MEMORY * self.trained + (1.0 - MEMORY) * trained
        self.measured += 1
        average, trained = self.average, self._filled(self.trained)
        self.deepest = min(self.deepest, average)
        value = ((_BACK if average > 0.0 else _AWAY) * average - trained) / (2.0 * squared)
        self.largest = max(self.largest, squared)
        value *= min(max((squared / self.largest - LEAST_LEFT) / (FREE - LEAST_LEFT), 0.0), 1.0)
        value = min(max(value, SMALLEST), LARGEST)
        self.value = INERTIA * self.value + (1.0 - INERTIA) * value
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
            numbers = {name: float(state[name]) for name in ("value", "held", "trained", "deepest", "largest")}
            return cls(**numbers, measured=int(state["measured"]), early=bool(state["early"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of l2sp_schedule='auto' is damaged ({error!r}).") from None

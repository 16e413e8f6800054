"""The rule behind `l2sp_schedule="auto"`: λ from what held-out examples say of the way from θ0."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# "Never 0": the anchor stays in use, and a λ of this size does nothing.
SMALLEST = 1e-6
# With more macro-F1 falls on every data set (recipes/benchmarks/results/quality.json).
LARGEST = 0.3
# λ before the first measurement, of a training in which rows are learned by heart. Far from θ0 a model comes to know
# them by small steps to the side, which asks for a λ so small that it does not bring the model back; near θ0 the same
# optimism asks for a larger one, with better models, and lets go at once where there is none.
START = 0.05
# How much a counts against b where held-out examples still gain by the way from θ0: λ has to give way for good there,
# not to be merely small.
_AWAY = 1.5
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
        held: Moving average of a, in units of the loss, that began at 0.
        trained: The same of b.
        largest: Largest Σ w‖θ − θ0‖² so far.
        measured: Measurements so far.
    """

    value: float = SMALLEST
    held: float = 0.0
    trained: float = 0.0
    largest: float = 0.0
    measured: int = 0

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
        filled = 1.0 - MEMORY**self.measured  # as if the averages had begun with the first measurement
        held, trained = self.held / filled, self.trained / filled
        value = ((1.0 if held > 0.0 else _AWAY) * held - trained) / (2.0 * squared)
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
            numbers = {name: float(state[name]) for name in ("value", "held", "trained", "largest")}
            return cls(**numbers, measured=int(state["measured"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of l2sp_schedule='auto' is damaged ({error!r}).") from None

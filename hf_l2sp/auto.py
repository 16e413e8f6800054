"""The rule behind `l2sp_schedule="auto"`: λ from how well the training examples are fitted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .press import Told

# "Never 0": the anchor stays in use, and a λ of this size does nothing.
SMALLEST = 1e-6
# With more macro-F1 falls on every data set (recipes/benchmarks/results/quality.json).
LARGEST = 0.3
# Upper bound of λ where θ0 says nothing of the labels, and λ from the start. With `LARGEST` there the late rule swings
# between 0 and 0.2.
LARGEST_UNEXPLAINED = 0.03
# Part of the labels' entropy: a training loss below it is that of labels learned by heart, if θ0 says nothing of them.
FITTED = 0.1
# Share of the labels' variance that θ0 leaves unexplained, where it cannot be measured: as of many data sets.
UNKNOWN = 0.7
# Parts of the training over which the early and the late pull are let go.
HELD, HELD_LATE = 0.8, 0.6
# What the last layer adds to the labels, times what it leaves open, from which the early pull is `LARGEST`.
WORTH = 0.06
# Passes over the data up to which there is no pull from the start, for it takes time, and from which on there is all.
FEW_PASSES, MANY_PASSES = 8.0, 16.0
# Standard errors of what θ0 explains: up to which it may be chance, and from which on it is none.
CHANCE, CERTAIN = 1.0, 3.0
# Optimizer steps that the moving average of the loss looks back on: part of the training, and the fewest.
SPAN, SHORTEST = 1 / 16, 4


@dataclass
class AutoStrength:
    """λ from the loss that is trained on, and a pull from the start where little or nothing of θ0 knows the labels.

    Late: next to 0 until the examples are fitted, the larger the better they are. With L the moving average of the
    training loss and δ = `FITTED` · u² times the entropy of the labels, λ = m · max(0, 1 − L/δ). u is the share of the
    labels' variance that θ0's representations leave unexplained (`press.Told`): 1 where all that is learned is
    by heart, next to 0 where θ0 tells the classes apart and a small loss is well earned. θ0 is worth what it explains:
    m = 1 − u, within `LARGEST_UNEXPLAINED` and `LARGEST`.

    This is the discrepancy principle (Morozov, "On the Solution of Functional Equations by the Method of
    Regularization", Soviet Mathematics Doklady 7, 1966): a model should not be fitted to its data better than the
    noise in them allows, and of all that are fitted as well, the one nearest to the prior guess, here θ0, is to be
    taken. Below δ a training set says next to nothing of the model any more; what still makes the loss smaller is
    larger logits. Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?" (2020), keep the
    loss at such a level by turning its gradient round; here the pull to θ0 does.

    The late rule has no state to wind up: where λ was too large the loss rises, and λ falls. A loss that cannot come
    near 0, as with label smoothing, leaves λ next to 0.

    What is pulled back is no longer where the head has learned to read it, and it takes learning rate to fit it anew:
    with a pull to the end macro-F1 falls. So m falls to 0 over the first `HELD_LATE` of the steps, but for a part of
    it, `kept`: all of m where everything is learned by heart, or where the last layer is worth it.

    Early: λ falls from `early` (`early_pull`) to 0 over the first `HELD` of the steps. Where everything is learned by
    heart there is nothing to wait for, and λ is never below `steady`. The largest of the three counts.

    Attributes:
        entropy: Of the labels, in units of the loss; infinite where it is not known, 0 to leave λ next to 0. δ is
            relative to it, or to the largest average of the loss so far, if that is less.
        unexplained: u.
        worth: What θ0's last layer knows of the labels and no lower one does, 0 to 1 (`last_layer_worth`).
        by_heart: How much is learned by heart, for want of anything that θ0 tells, 0 to 1 (`learned_by_heart`).
        early: What the early pull begins with.
        steady: What λ does not fall below.
        value: λ now.
        loss: Moving average of the training loss, that began at 0.
        weight: Sum of the average's weights.
        largest: Largest average so far.
    """

    entropy: float = math.inf
    unexplained: float = UNKNOWN
    worth: float = 0.0
    by_heart: float = 0.0
    early: float = 0.0
    steady: float = 0.0
    value: float = SMALLEST
    loss: float = 0.0
    weight: float = 0.0
    largest: float = 0.0

    @property
    def most(self) -> float:
        """Upper bound of λ."""
        return min(LARGEST, max(LARGEST_UNEXPLAINED, 1.0 - self.unexplained))

    @property
    def kept(self) -> float:
        """Part of the late pull that stays to the end."""
        return max(self.worth, self.by_heart)

    def begin(self, told: Told, passes: float) -> None:
        """Takes up what θ0 tells of the labels, and sets λ for the first step.

        Args:
            told: By its representations of some training examples.
            passes: Over the training examples, in all of the training; 0 to leave out the pulls from the start.
        """
        self.unexplained = told.unexplained
        self.worth, self.by_heart = last_layer_worth(told), learned_by_heart(told)
        time = _risen(passes, FEW_PASSES, MANY_PASSES)
        self.early, self.steady = time * early_pull(self.worth), time * LARGEST_UNEXPLAINED * self.by_heart
        self.value = max(SMALLEST, self.early, self.steady)

    def update(self, loss: float, step: int, steps: int) -> float:
        """Takes the loss of an optimizer step up.

        Args:
            loss: Task loss of the step.
            step: Optimizer steps so far.
            steps: Optimizer steps of the whole training.

        Returns:
            λ from now on. A loss that is not finite changes nothing.
        """
        if not math.isfinite(loss):
            return self.value
        new = 1.0 / max(SHORTEST, SPAN * steps)
        self.loss += new * (loss - self.loss)
        self.weight += new * (1.0 - self.weight)
        average = self.loss / self.weight
        self.largest = max(self.largest, average)
        fitted = FITTED * min(1.0, self.unexplained) ** 2 * min(self.entropy, self.largest)
        late = self.most * (1.0 - average / fitted) if fitted > 0.0 else 0.0
        late *= max(self.kept, 1.0 - step / (HELD_LATE * steps))
        self.value = max(SMALLEST, self.steady, late, self.early * (1.0 - step / (HELD * steps)))
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """For `l2sp_state.json`; floats survive JSON bit for bit."""
        state = asdict(self)
        return {**state, "entropy": self.entropy if math.isfinite(self.entropy) else None}  # JSON has no infinity

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> AutoStrength:
        """What `state_dict` gave.

        Raises:
            ValueError: Something is missing or no number.
        """
        try:
            entropy = math.inf if state["entropy"] is None else float(state["entropy"])
            others = [one.name for one in fields(cls) if one.name != "entropy"]
            return cls(entropy=entropy, **{name: float(state[name]) for name in others})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of l2sp_schedule='auto' is damaged ({error!r}).") from None


def last_layer_worth(told: Told) -> float:
    """How much there is to lose in θ0's last layer.

    Little where the embeddings or a lower layer tell as much of the labels, and little where all is known of them.

    Returns:
        0 to 1.
    """
    return min(1.0, min(1.0, told.unexplained) * max(0.0, told.added) / WORTH)


def learned_by_heart(told: Told) -> float:
    """How much of what is to be learned is learned by heart: all of it, where θ0 may as well tell nothing.

    Returns:
        1 up to `CHANCE` standard errors of what θ0 explains, 0 from `CERTAIN` on.
    """
    return 1.0 - _risen(told.significance, CHANCE, CERTAIN)


def early_pull(worth: float) -> float:
    """λ to begin with: what θ0's last layer knows of the labels is lost first, and must be worth the slower start.

    A new head begins at random, and its gradients turn the representations away from what they told of the labels
    before the head has learned to read it (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", 2022).

    Args:
        worth: `last_layer_worth`.

    Returns:
        0 to `LARGEST`.
    """
    return LARGEST * worth**4


def _risen(value: float, low: float, high: float) -> float:
    """0 up to low, 1 from high on, a straight line between them."""
    return min(1.0, max(0.0, (value - low) / (high - low)))

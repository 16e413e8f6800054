"""The pull θ ← θ − f·w(θ − θ0) of `l2sp_mode="decoupled"`, and how much of it a training's settings amount to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .penalty import PenaltySums, Tally, Term, walk

# Below, all pulls of a training together take back less than 1 % of the drift.
NO_EFFECT = 0.01
# Above, one step moves a weight past θ0.
OVERSHOOTS = 1.0
# Rounding of a bfloat16 number; a smaller part of it that is subtracted leaves it as it is.
ROUNDING_16 = 2.0**-8
# At most so many steps of a course are looked at.
_SAMPLES = 10_000


@torch.no_grad()
def pull_pass(terms: Sequence[Term], factors: Sequence[float | Tensor]) -> PenaltySums:
    """Moves every θ by −f·w(θ − θ0), in place, and returns the sums from before, reading every number once.

    Works in chunks, as `penalty_pass` does, without a temporary of a parameter's size. Where f is the number 0 nothing
    is written.

    Args:
        terms: The summands.
        factors: f of every term: learning rate · 2λ; a tensor where the host must not wait for it. Shape: [].
    """
    tally = Tally(terms)
    for chunk in walk(terms):
        tally.add(chunk)
        factor = factors[chunk.term]
        if isinstance(factor, Tensor):
            chunk.theta.sub_(chunk.pull.mul_(factor.to(chunk.pull.device) * chunk.scalar))
        elif factor:
            chunk.theta.add_(chunk.pull, alpha=-factor * chunk.scalar)
    return tally.sums()


class Course(NamedTuple):
    """What the pulls of a whole training amount to, for w = 1.

    Attributes:
        total: Σ lr·2λ over all steps: without a task, e^−total of a distance would be left.
        peak: The largest lr·2λ of a step.
    """

    total: float
    peak: float


def course_of(scheduler: Any, groups: Collection[int], strength: Callable[[int], float], steps: int) -> Course | None:
    """Looks ahead through a training; the scheduler stays as it is.

    Args:
        scheduler: Of the learning rate.
        groups: Which of the optimizer's parameter groups are pulled.
        strength: λ of a step.
        steps: Optimizer steps of the training.

    Returns:
        The largest values among the groups. None where the learning rates are not known before: of schedulers that
        are no function of the step, and of a training without a known end.
    """
    scheduler = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    if not isinstance(scheduler, LambdaLR) or steps <= 0 or not groups:
        return None
    stride = max(1, steps // _SAMPLES)
    looked_at = range(0, steps, stride)
    pulls = [2.0 * strength(step) for step in looked_at]
    courses = []
    for group in groups:
        # Lambdas may be objects that remember things.
        rate_of = copy.deepcopy(scheduler.lr_lambdas[group])
        base = float(scheduler.base_lrs[group])
        factors = [base * float(rate_of(step)) * pull for step, pull in zip(looked_at, pulls, strict=True)]
        courses.append(Course(stride * sum(factors), max(factors)))
    return Course(max(c.total for c in courses), max(c.peak for c in courses))


def remarks(course: Course | None, strength: float, weights: Sequence[float | Tensor], in_16_bits: int) -> list[str]:
    """What a user should know before a decoupled training begins.

    Args:
        course: What the pulls amount to, where that is known.
        strength: λ as the user set it.
        weights: w of every pulled parameter.
        in_16_bits: How many of the parameters are kept in 16 bits.
    """
    means, peaks = [1.0], [1.0]
    if weights:
        means = [_of(w, torch.mean) for w in weights]
        peaks = [_of(w, torch.max) for w in weights]
    said = []
    if course is not None:
        total, peak = course.total * max(means), course.peak * max(peaks)
        if 0.0 < total < NO_EFFECT:
            said.append(
                f"l2sp_mode='decoupled' has next to no effect: the pulls of the whole training, Σ lr·2·λ·w, add up to "
                f"{total:.2g} and take back that part of the drift. Where they add up to 1 (l2sp_lambda="
                f"{strength / total:.3g} here), e^-1 of it would be left. λ of this mode is not that of "
                "l2sp_mode='loss'."
            )
        if peak > OVERSHOOTS:
            said.append(
                f"l2sp_mode='decoupled' overshoots: lr·2·λ·w reaches {peak:.3g}, and above 1 one step moves a weight "
                "past θ0 (above 2 farther away than it was). Lower l2sp_lambda"
                f" to {strength / peak:.2g} or less, or the learning rate or the weights w."
            )
    if in_16_bits and (course is None or course.peak * max(peaks) < ROUNDING_16):
        said.append(
            f"l2sp_mode='decoupled': {in_16_bits} of the pulled parameters are kept in 16 bits, where a pull of less "
            f"than {ROUNDING_16:.1%} of a weight's own size is rounded away. Load the model in float32 (bf16=True "
            "computes in bfloat16 all the same), or set l2sp_mode='loss'."
        )
    return said


def _of(weight: float | Tensor, what: Callable[[Tensor], Tensor]) -> float:
    if not isinstance(weight, Tensor):
        return weight
    return float(what(weight)) if weight.numel() else 0.0  # a rank may hold nothing of it

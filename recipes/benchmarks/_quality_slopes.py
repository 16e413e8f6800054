"""The second candidate for `l2sp_schedule="auto"`, which lost: λ from held-out examples. Kept to be measured."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from _quality_held_out import (
    BUDGET,
    EVALUATION_BUDGET,
    EVALUATION_ROWS,
    HeldOut,
    HeldOutSampler,
    Portions,
    by_heart,
    hold_out,
)
from torch import Tensor

from hf_l2sp import L2SPTrainer

SMALLEST, LARGEST = 1e-6, 0.3
# λ before the first measurement, of a training in which rows are learned by heart.
START = 0.05
# How much a counts against b where held-out examples still gain by the way from θ0.
AWAY = 1.5
# λ is as found while ‖θ − θ0‖² is more than a quarter of the largest that was seen, and off where an eighth is left.
FREE, LEAST_LEFT = 0.25, 0.125
# Of the moving averages of slopes over measurements, and of λ.
MEMORY, INERTIA = 0.3, 0.5


class SlopeRule:
    """λ from two slopes along the way from θ0: of the loss of held-out examples, and of the loss that is trained on.

    Let a = ⟨∇L_held-out(θ), θ − θ0⟩ and b = ⟨∇L_train(θ), θ − θ0⟩. At a minimum of L_train + λ·‖θ − θ0‖² it is
    b = −2λ·‖θ − θ0‖². Where a > 0 the last part of the way from θ0 fits the training examples alone, and
    λ = (a − b) / 2‖θ − θ0‖² makes up for it. With the optimism a − b put as γ/N this is MacKay's evidence update,
    with γ measured instead of computed.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        self.held = self.trained = self.largest = 0.0
        self.measured = 0

    def update(self, held: float, trained: float, squared: float) -> None:
        """Takes a, b and ‖θ − θ0‖² up; what is not finite, or measured at θ0, changes nothing."""
        if not all(map(math.isfinite, (held, trained, squared))) or squared <= 0.0:
            return
        self.held = MEMORY * self.held + (1.0 - MEMORY) * held
        self.trained = MEMORY * self.trained + (1.0 - MEMORY) * trained
        self.measured += 1
        filled = 1.0 - MEMORY**self.measured  # as if the averages had begun with the first measurement
        held, trained = self.held / filled, self.trained / filled
        value = ((1.0 if held > 0.0 else AWAY) * held - trained) / (2.0 * squared)
        self.largest = max(self.largest, squared)
        value *= min(max((squared / self.largest - LEAST_LEFT) / (FREE - LEAST_LEFT), 0.0), 1.0)
        self.value = INERTIA * self.value + (1.0 - INERTIA) * min(max(value, SMALLEST), LARGEST)


class SlopeTrainer(L2SPTrainer):
    """Measures on the evaluation rows, or holds training rows out for a third to a half of the training.

    In one process, for models that are whole and trained without accumulation or loss scale. Of fewer than 20 rows it
    holds none out, and λ is `l2sp_lambda`.
    """

    rule: SlopeRule | None = None
    held: HeldOut | None = None
    waiting: tuple[float, float] | None = None

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        rows, steps = len(loader.dataset), self.args.max_steps
        draws = steps * self.args.per_device_train_batch_size
        if self.eval_dataset is not None:
            given = len(self.eval_dataset)
            self.rows = random.Random(self.args.seed).sample(range(given), min(given, EVALUATION_ROWS))
            self.portions = Portions.plan(len(self.rows), draws // steps, steps, 1.0, EVALUATION_BUDGET, 1)
        else:
            labels = self.train_dataset["labels"]
            self.held = hold_out(rows, draws, self.args.seed, labels if isinstance(labels[0], int) else None)
            self.rows = list(self.held.stand_ins)
            if not self.rows:
                return loader
            loader.set_sampler(HeldOutSampler(loader.get_sampler(), self.held))
            self.portions = Portions.plan(len(self.rows), draws // steps, steps, self.held.release, BUDGET, 1)
        alike = isinstance(self.train_dataset["labels"][0], int)  # one class per row
        self.rule = SlopeRule(max(SMALLEST, START * by_heart(rows, draws)) if alike else SMALLEST)
        return loader

    def _l2sp_strength(self) -> float:
        return super()._l2sp_strength() if self.rule is None else self.rule.value

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        if self.rule is not None and self.portions.due(step):
            data = self.train_dataset if self.held is not None else self.eval_dataset
            found = [data[self.rows[at]] for at in self.portions.positions(step, len(self.rows), 0, 1)]
            self.model.eval()
            loss = self.compute_loss(self.model, self._prepare_inputs(self.data_collator(found)))
            loss.backward()
            self.waiting = self._slope()
            self.model.zero_grad()
        return super().get_batch_samples(*args, **kwargs)

    def _l2sp_add_penalty(self) -> Tensor:
        if self.rule is not None and self.waiting is not None:
            (held, squared), self.waiting = self.waiting, None
            self.rule.update(held, self._slope()[0], squared)
        return super()._l2sp_add_penalty()

    @torch.no_grad()
    def _slope(self) -> tuple[float, float]:
        """⟨∇L, θ − θ0⟩ of the gradients that are there, and ‖θ − θ0‖²."""
        assert self.l2sp_anchor is not None
        start, along, squared = dict(self.l2sp_anchor.items()), 0.0, 0.0
        for name, parameter in self.model.named_parameters():
            if name in start:
                difference = parameter - start[name]
                squared += float(difference.square().sum(dtype=torch.float64))
                if parameter.grad is not None:
                    along += float((difference * parameter.grad).sum(dtype=torch.float64))
        return along, squared

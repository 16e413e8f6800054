"""The first candidate for `l2sp_schedule="auto"`, which lost: λ by MacKay's evidence update. Kept to be measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_l2sp import L2SPTrainer


class EvidenceTrainer(L2SPTrainer):
    """λ ← γ / (2N‖θ − θ0‖²) with γ = Σ h / (h + 2λ), h the diagonal Fisher information of the mean task loss.

    h is the moving average of squared mini-batch gradients times the batch size, before penalty and clipping; from
    step 10 on λ is moved every 5 steps to the geometric mean of the old and the new one. In one process, for models
    that are whole.

    Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", 1992; for networks while they
        train: Immer et al., "Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning", 2021
        (arXiv 2104.04975).
    """

    BEGIN, EVERY, MEMORY = 10, 5, 0.9

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.squares: dict[str, Tensor] = {}
        self.strength = float(self.args.l2sp_lambda)

    def _l2sp_strength(self) -> float:
        return self.strength

    def _l2sp_add_penalty(self) -> Tensor:
        self._see()
        step = self.state.global_step
        if step >= self.BEGIN and step % self.EVERY == 0:
            self._update(step + 1)
        return super()._l2sp_add_penalty()

    @torch.no_grad()
    def _see(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.float().square() * self.args.train_batch_size
                kept = self.squares.setdefault(name, torch.zeros_like(square))
                kept.lerp_(square, 1.0 - self.MEMORY)

    def _update(self, seen: int) -> None:
        assert self.l2sp_anchor is not None
        distance = float(self.l2sp_anchor.apply(0.0, gradient=False).total)
        unbiased = 1.0 - self.MEMORY**seen
        curvatures = [
            self.squares[name] / unbiased for name in self.l2sp_anchor.active_names() if name in self.squares
        ]
        gamma = sum(float((h / (h + 2.0 * self.strength)).sum(dtype=torch.float64)) for h in curvatures)
        if distance > 0.0 and gamma > 0.0:
            self.strength = (self.strength * gamma / (2.0 * len(self.train_dataset) * distance)) ** 0.5

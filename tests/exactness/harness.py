"""Runs a trainer with learning rate 0 and records the gradients that its optimizer sees; a naive float64 reference.

With learning rate 0 the weights stay where the test moved them after the anchor was taken, so that a plain Trainer
and an L2SPTrainer see the same weights, batches and dropout at every step, and their gradients differ by the pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

from ..helpers import quick


@dataclass
class Recorder(TrainerCallback):
    """Moves the weights at the beginning, then keeps θ and gradients of every optimizer step."""

    noise: float = 0.02
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        generator = torch.Generator().manual_seed(1234)
        with torch.no_grad():
            for parameter in bare(model).parameters():
                if parameter.requires_grad:
                    parameter.add_((torch.randn(parameter.shape, generator=generator) * self.noise).to(parameter))
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(lambda *_: self._record(bare(model)))

    def _record(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self.weights.append({n: p.detach().clone() for n, p in named.items()})
        self.gradients.append({n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None})


def bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


@dataclass
class Run:
    trainer: Trainer
    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    result: Any


def run(
    cls: type[Trainer],
    make_model: Callable[[], nn.Module],
    data: Any,
    folder: Path,
    *,
    model_init: bool = False,
    callbacks: tuple[TrainerCallback, ...] = (),
    prepare: Callable[[Trainer], None] | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **arguments: Any,
) -> Run:
    l2sp = issubclass(cls, L2SPTrainer)
    if not l2sp:
        arguments = {k: v for k, v in arguments.items() if not k.startswith("l2sp_")}
    settings: dict[str, Any] = {
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
    }
    settings = quick(folder, **{**settings, **arguments})
    args = (L2SPTrainingArguments if l2sp else TrainingArguments)(**settings)
    recorder = Recorder()
    torch.manual_seed(0)
    model = {"model_init": make_model} if model_init else {"model": make_model()}
    trainer = cls(**model, args=args, train_dataset=data, callbacks=[recorder, *callbacks], **(trainer_kwargs or {}))
    if prepare is not None:
        prepare(trainer)
    result = trainer.train()
    return Run(trainer, recorder.gradients, recorder.weights, result)


def schedule(name: str, base: float, step: int, total: int) -> float:
    if name == "linear":
        return base * (total - step) / total
    if name == "cosine":
        return base * (1 + math.cos(math.pi * step / total)) / 2
    return base


@dataclass
class Reference:
    """What the pull must be, from the test's own knowledge of the case; float64, one parameter after the other."""

    origin: dict[str, Tensor]
    lam: float
    weight: Callable[[str], float | Tensor] = lambda name: 1.0
    beta: float = 0.0
    new: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    course: str = "constant"

    def pull(self, name: str, theta: Tensor, step: int, total: int) -> Tensor:
        theta = theta.double()
        if name in self.new:
            return 2 * self.beta * theta
        difference = theta - self._origin(name, theta)
        w = self.weight(name)
        return (
            2
            * schedule(self.course, self.lam, step, total)
            * (w.double() if isinstance(w, Tensor) else w)
            * difference
        )

    def penalty(self, weights: dict[str, Tensor], trainable: set[str], step: int, total: int) -> float:
        lam, value = schedule(self.course, self.lam, step, total), 0.0
        for name in trainable:
            theta = weights[name].double()
            if name in self.new:
                value += self.beta * float((theta**2).sum())
            else:
                w = self.weight(name)
                w = w.double() if isinstance(w, Tensor) else w
                value += lam * float((w * (theta - self._origin(name, theta)) ** 2).sum())
        return value

    def _origin(self, name: str, theta: Tensor) -> Tensor:
        origin = self.origin[name].double()
        if name in self.rows:  # rows without a pretrained value are at distance 0 of themselves
            kept = theta.clone()
            kept[: self.rows[name]] = origin[: self.rows[name]]
            return kept
        return origin


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys(), set(got) ^ set(expected)
    error = sum(float(((got[n].double() - expected[n].double()) ** 2).sum()) for n in got)
    size = sum(float((expected[n].double() ** 2).sum()) for n in got)
    return math.sqrt(error / size)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def expected_gradients(
    plain: Run, reference: Reference, trainable: Callable[[int], set[str]]
) -> list[dict[str, Tensor]]:
    """Task gradient of the plain run plus the pull, for every step."""
    total = len(plain.gradients)
    steps = []
    for step, (weights, gradient) in enumerate(zip(plain.weights, plain.gradients, strict=True)):
        steps.append(
            {
                n: gradient.get(n, torch.zeros_like(weights[n])).double() + reference.pull(n, weights[n], step, total)
                for n in sorted(trainable(step))
            }
        )
    return steps

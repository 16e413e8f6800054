"""Methods of others that keep a model near its start, written from their formulas, for the quality study."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _TowardsStart(torch.optim.AdamW):
    """AdamW that knows where the parameters of groups with `pretrained` began."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0)
        self.start = {
            p: p.detach().clone() for group in self.param_groups if group["pretrained"] for p in group["params"]
        }

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.no_grad():
            known = self.before()
        loss = super().step(closure)
        with torch.no_grad():
            self.after(known)
        return loss

    def before(self) -> Any:
        raise NotImplementedError

    def after(self, known: Any) -> None:
        raise NotImplementedError


class RecAdam(_TowardsStart):
    """Adam on λ(t)·task loss, and a pull of (1 − λ(t))·γ per learning rate on the other side, λ a sigmoid of time.

    Args:
        params: Groups with `pretrained`: whether they are pulled.
        lr: Learning rate.
        middle: Step at which λ(t) is ½; the authors' t0.
        speed: Of the change; the authors' k.
        pull: The authors' γ.

    Source: Chen et al., "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting", 2020
        (arXiv 2004.12651).
    """

    def __init__(self, params: Iterable[Any], lr: float, middle: int, speed: float, pull: float) -> None:
        super().__init__(params, lr)
        self.middle, self.speed, self.pull, self.taken = middle, speed, pull, 0

    def before(self) -> dict[Tensor, Tensor]:
        self.taken += 1
        return {parameter: parameter.clone() for parameter in self.start}

    def after(self, known: dict[Tensor, Tensor]) -> None:
        share = 1.0 / (1.0 + math.exp(-self.speed * (self.taken - self.middle)))
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        for parameter, old in known.items():
            adam = parameter - old
            pull = rates[parameter] * (1.0 - share) * self.pull
            parameter.copy_(old + share * adam - pull * (old - self.start[parameter]))


class AdamSPD(_TowardsStart):
    """Adam that takes part of a tensor's step back where the gradient says that it leads away from θ0 in vain.

    Args:
        params: Groups with `pretrained`: whether they are pulled.
        lr: Learning rate.
        strength: The authors' λ.

    Source: Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", 2024
        (arXiv 2411.01713).
    """

    def __init__(self, params: Iterable[Any], lr: float, strength: float) -> None:
        super().__init__(params, lr)
        self.strength = strength

    def before(self) -> dict[Tensor, float]:
        """The distance of every tensor whose gradient points back, before the step."""
        away = {p: p - start for p, start in self.start.items() if p.grad is not None}
        return {p: float(d.norm()) for p, d in away.items() if float((p.grad * d).sum()) > 0.0}

    def after(self, known: dict[Tensor, float]) -> None:
        for parameter, distance in known.items():
            difference = parameter - self.start[parameter]
            now = float(difference.norm())
            ratio = min(max((now - distance) / now, 0.0), 1.0) if now > 0.0 else 0.0
            parameter.sub_(difference, alpha=self.strength * ratio)


def with_pretrained(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: what the model was loaded with, and the new head."""
    base = list(model.base_model.parameters())  # type: ignore[operator, union-attr]
    inside = {id(parameter) for parameter in base}
    head = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [{"params": base, "pretrained": True}, {"params": head, "pretrained": False}]


def layer_groups(model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
    """A group per layer of a BERT, whose learning rate falls by `decay` from each layer to the one below.

    Source: Zhang et al., "Revisiting Few-sample BERT Fine-tuning", 2021 (arXiv 2006.05987).
    """
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    depths: dict[int, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        depths.setdefault(_depth(name, layers), []).append(parameter)
    return [{"params": params, "lr": rate * decay ** (layers + 1 - depth)} for depth, params in sorted(depths.items())]


def freeze_below(model: nn.Module, layer: int) -> None:
    """Freezes the embeddings and so many layers of a BERT."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_depth(name, model.config.num_hidden_layers) > layer)  # type: ignore[union-attr]


def _depth(name: str, layers: int) -> int:
    """0: embeddings; 1 to `layers`: encoder layers; one more: what comes after them."""
    _, found, rest = name.partition(".encoder.layer.")
    return int(rest.split(".")[0]) + 1 if found else (0 if ".embeddings." in name else layers + 1)

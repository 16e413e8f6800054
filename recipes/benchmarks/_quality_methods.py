"""The methods of the quality study, by name: each trains in a cell and gives its scores."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from _quality_cell import TRAINING, Cell, course
from _quality_evidence import EvidenceTrainer
from _quality_rivals import AdamSPD, RecAdam, freeze_below, layer_groups, with_pretrained
from _quality_slopes import SlopeTrainer
from transformers import PreTrainedModel, TrainerCallback

from hf_l2sp import L2SPTrainer

Method = Callable[[Cell], dict[str, Any]]

GRID = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Of another unit: this λ meets the learning rate, and no gradient (Σ lr·2λ is 0.18 and 1.8 for 10 and 100 here).
DECOUPLED = (1.0, 10.0, 100.0, 1000.0)
DECAYS = (0.01, 0.1, 1.0)
FISHER = (0.01, 0.1, 1.0)
# The authors' defaults are for a learning rate of 2e-5 and thousands of steps: here their sigmoid has its middle after
# a quarter of the steps, and the pull is as strong per step.
RECADAM = {"middle": TRAINING["max_steps"] // 4, "speed": 0.2, "pull": 500.0}
SPD = (0.3, 1.0)
LAYER_DECAY = 0.8
STEPS, RATE = TRAINING["max_steps"], TRAINING["learning_rate"]


def found_by(cell: Cell, trainer: L2SPTrainer) -> dict[str, Any]:
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"scores": cell.scores(trainer), "course": course(trainer), "train_loss": round(losses[-1], 5)}


def fitted(cell: Cell, **settings: Any) -> dict[str, Any]:
    return found_by(cell, cell.fit(**settings))


def plain(cell: Cell, **settings: Any) -> dict[str, Any]:
    return fitted(cell, l2sp_lambda=0.0, **settings)


class _Best(TrainerCallback):
    """Keeps the weights with the lowest validation loss."""

    def __init__(self) -> None:
        self.loss, self.weights = float("inf"), None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs["metrics"]["eval_loss"] < self.loss:
            self.loss, self.weights = kwargs["metrics"]["eval_loss"], copy.deepcopy(kwargs["model"].state_dict())


def early_stopping(cell: Cell) -> dict[str, Any]:
    """The best of ten evaluations on a fifth of the labelled rows, which are not trained on."""
    best = _Best()
    every = {"eval_strategy": "steps", "eval_steps": STEPS // 10}
    trainer = cell.fit(data=cell.halves, callbacks=[best], l2sp_lambda=0.0, **every)
    trainer.model.load_state_dict(best.weights)
    return found_by(cell, trainer)


def probe_first(cell: Cell) -> dict[str, Any]:
    """The head alone, with a learning rate of its own, then everything (Kumar et al. 2022, arXiv 2202.10054)."""
    model = cell.model()
    model.base_model.requires_grad_(False)
    cell.fit(model=model, l2sp_lambda=0.0, learning_rate=1e-2)
    model.base_model.requires_grad_(True)
    return found_by(cell, cell.fit(model=model, l2sp_lambda=0.0))


def frozen_half(cell: Cell) -> dict[str, Any]:
    model = cell.model()
    freeze_below(model, model.config.num_hidden_layers // 2)
    return found_by(cell, cell.fit(model=model, l2sp_lambda=0.0))


def validated(cell: Cell, **settings: Any) -> dict[str, Any]:
    """A fifth of the labelled rows validates."""
    return found_by(cell, cell.fit(data=cell.halves, **settings))


def interpolated(cell: Cell, **settings: Any) -> dict[str, Any]:
    """The same, and chooses how far to go from θ0 to the fine-tuned weights."""
    trainer = cell.fit(data=cell.halves, **settings)
    alpha = trainer.select_interpolation().alpha
    return {**found_by(cell, trainer), "alpha": alpha}


def towards_start(cell: Cell, make: Callable[..., torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    def optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
        return make(with_pretrained(model), lr=RATE, **options)

    return plain(cell, optimizer=optimizer)


def layerwise(cell: Cell) -> dict[str, Any]:
    def optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW(layer_groups(model, RATE, LAYER_DECAY), lr=RATE, weight_decay=0.0)

    return plain(cell, optimizer=optimizer)


def _methods() -> dict[str, Method]:
    def method(function: Callable[..., dict[str, Any]], **settings: Any) -> Method:
        return functools.partial(function, **settings)

    methods: dict[str, Method] = {"plain": plain}
    methods |= {f"weight decay {decay:g}": method(plain, weight_decay=decay) for decay in DECAYS}
    methods["twice the steps"] = method(plain, max_steps=2 * STEPS)
    methods["early stopping"] = early_stopping
    methods[f"layer-wise lr {LAYER_DECAY:g}"] = layerwise
    methods["probe first"] = probe_first
    methods["lower half frozen"] = frozen_half
    methods["RecAdam"] = method(towards_start, make=RecAdam, **RECADAM)
    methods |= {f"AdamSPD {strength:g}": method(towards_start, make=AdamSPD, strength=strength) for strength in SPD}
    methods |= {f"l2sp {strength:g}": method(fitted, l2sp_lambda=strength) for strength in GRID}
    methods |= {f"{name} 0.1": method(fitted, l2sp_lambda=0.1, l2sp_schedule=name) for name in ("linear", "cosine")}
    for strength in DECOUPLED:
        methods[f"decoupled {strength:g}"] = method(fitted, l2sp_lambda=strength, l2sp_mode="decoupled")
    for strength in FISHER:
        # As many as the rows are taken where there are less.
        methods[f"Fisher {strength:g}"] = method(fitted, l2sp_lambda=strength, l2sp_fisher_samples=256)
    methods["evidence"] = method(fitted, trainer_class=EvidenceTrainer, l2sp_lambda=0.1)
    slopes = {"trainer_class": SlopeTrainer, "l2sp_lambda": 0.01}
    methods["held-out slope"] = method(fitted, **slopes)
    methods["validation slope"] = method(validated, **slopes)
    methods["validation slope, interpolated"] = method(interpolated, **slopes)
    methods["auto"] = method(fitted, l2sp_schedule="auto")
    for start in (0.001, 10.0):
        methods[f"auto from {start:g}"] = method(fitted, l2sp_schedule="auto", l2sp_lambda=start)
    methods["auto, interpolated"] = method(interpolated, l2sp_schedule="auto")
    # So little that it only keeps θ0.
    methods["plain, interpolated"] = method(interpolated, l2sp_lambda=1e-6)
    return methods


METHODS = _methods()

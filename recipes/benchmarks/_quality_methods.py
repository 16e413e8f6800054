"""The methods of the quality study, by name: each trains in a cell and gives its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _quality_cell import Cell, course

GRID = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Of another unit: this λ meets the learning rate, and no gradient (Σ lr·2λ is 0.18 and 1.8 here).
DECOUPLED = (10.0, 100.0)


def fitted(cell: Cell, **settings: Any) -> dict[str, Any]:
    trainer = cell.fit(**settings)
    found: dict[str, Any] = {"scores": cell.scores(trainer)}
    found["course"] = course(trainer)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found["train_loss"] = round(losses[-1], 5)
    return found


def _methods() -> dict[str, Callable[[Cell], dict[str, Any]]]:
    methods: dict[str, Callable[[Cell], dict[str, Any]]] = {"plain": lambda cell: fitted(cell, l2sp_lambda=0.0)}
    for strength in GRID:
        methods[f"l2sp {strength:g}"] = lambda cell, s=strength: fitted(cell, l2sp_lambda=s)
    for strength in DECOUPLED:
        methods[f"decoupled {strength:g}"] = lambda cell, s=strength: fitted(
            cell, l2sp_lambda=s, l2sp_mode="decoupled"
        )
    for schedule in ("linear", "cosine"):
        methods[f"{schedule} 0.1"] = lambda cell, s=schedule: fitted(cell, l2sp_lambda=0.1, l2sp_schedule=s)
    methods["auto"] = lambda cell: fitted(cell, l2sp_schedule="auto")
    for start in (0.001, 10.0):
        methods[f"auto from {start:g}"] = lambda cell, s=start: fitted(cell, l2sp_schedule="auto", l2sp_lambda=s)
    return methods


METHODS = _methods()

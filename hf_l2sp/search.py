"""The space that a hyperparameter search looks through by default."""

from __future__ import annotations

from typing import Any


def l2sp_hp_space(trial: Any) -> dict[str, float]:
    """λ and the learning rate, for `trainer.hyperparameter_search(hp_space=l2sp_hp_space, backend="optuna")`.

    λ lies between 1e-4 and 10, the learning rate between 1e-5 and 5e-4, both on a logarithmic scale: the best λ
    depends on the learning rate, and each trial gets θ0 anew from `model_init`. For `l2sp_mode="decoupled"`, whose λ
    is larger by the optimizer's step sizes, give bounds of your own. More is searched by a function of yours:

        def space(trial):
            return {**l2sp_hp_space(trial), "l2sp_schedule": trial.suggest_categorical("l2sp_schedule", [...])}

    Args:
        trial: Optuna's.

    Raises:
        TypeError: It is the trial of another backend.
    """
    if not hasattr(trial, "suggest_float"):
        raise TypeError(
            f"l2sp_hp_space is for optuna and cannot draw from a {type(trial).__name__}: pass backend='optuna' to "
            "hyperparameter_search (pip install 'hf-l2sp[optuna]'), or a hp_space of your own for another backend."
        )
    return {
        "l2sp_lambda": trial.suggest_float("l2sp_lambda", 1e-4, 10.0, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 5e-4, log=True),
    }

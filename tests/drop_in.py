"""One training done three ways, with Trainer, at λ = 0 and at a small λ, and all that can be seen of it afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

L2SP_KEYS = {"task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda"}
# Differ from run to run, whatever the trainer.
MEASURED = ("runtime", "per_second", "mem_")


def train(trainer: Trainer) -> Any:
    return trainer.train().training_loss


@dataclass
class Case:
    """A behaviour of Trainer that people rely on.

    Args:
        arguments: What differs from the arguments of `run`; a field that this version of transformers does not have is
            left out, so that both spellings of one setting can stand here.
        trainer: Makes the keyword arguments of the trainer, model aside, anew for every run.
        act: What is done with the trainer, and what comes out of it.
        prepare: Changes the model before the trainer gets it.
        bases: Classes put before the trainer's, as a person's own subclass would.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    act: Callable[[Trainer], Any] = train
    prepare: Callable[[nn.Module], Any] = lambda model: None
    bases: tuple[type, ...] = ()


@dataclass
class Outcome:
    trainer: Trainer
    returned: Any
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    logs: list[dict[str, Any]]
    files: dict[str, list[str]]
    events: list[tuple[str, int]]
    random: Tensor


def events_into(seen: list[tuple[str, int]]) -> TrainerCallback:
    """A callback that writes down every event with the step it came at."""

    def noted(name: str) -> Callable[..., None]:
        return lambda self, args, state, control, **kwargs: seen.append((name, state.global_step))

    names = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    return type("Events", (TrainerCallback,), {name: noted(name) for name in names})()


def run(case: Case, strength: float | None, pretrained: str, data: Any, folder: Path) -> Outcome:
    """Does what the case says; `strength` None with Trainer."""
    known = {f.name for f in fields(TrainingArguments)}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    settings |= {name: value for name, value in case.arguments.items() if name in known}
    base, config = (Trainer, TrainingArguments) if strength is None else (L2SPTrainer, L2SPTrainingArguments)
    if strength is not None:
        settings["l2sp_lambda"] = strength
    cls = type("Own", (*case.bases, base), {}) if case.bases else base

    set_seed(3)
    model = BertForSequenceClassification.from_pretrained(pretrained, num_labels=3)
    case.prepare(model)
    seen: list[tuple[str, int]] = []
    given = {"model": model, "train_dataset": data, "eval_dataset": data[:7], **case.trainer()}
    given["callbacks"] = [*given.get("callbacks", ()), events_into(seen)]
    trainer = cls(args=config(**settings), **given)
    returned = case.act(trainer)
    return Outcome(
        trainer=trainer,
        returned=returned,
        weights={name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        optimizer=trainer.optimizer.state_dict() if trainer.optimizer is not None else None,
        logs=[without_measurements(entry) for entry in trainer.state.log_history],
        files={os.path.relpath(at, folder): sorted(names) for at, _, names in sorted(os.walk(folder)) if names},
        events=seen,
        random=torch.get_rng_state(),
    )


def without_measurements(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not any(word in key for word in MEASURED)}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through containers; NaN equals NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return isinstance(b, numpy.ndarray) and numpy.array_equal(a, b, equal_nan=True)
    return a == b or (a != a and b != b)


def all_finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in weights.values())

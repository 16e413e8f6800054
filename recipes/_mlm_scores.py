"""Perplexities on domain and general text: at the start, during training and at the end, exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import torch
from _mlm_masking import IGNORED
from _mlm_sparse import masked_logits
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction

PICTURE = "perplexity.png"
_BLUE, _ORANGE = "#2f6db3", "#d9722e"


def row_sums(logits: Any, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the masked tokens of each row, and their number, for `perplexity`.

    Shape:
        labels: [rows, tokens]; result: [rows, 2]
    """
    chosen, hidden = masked_logits(logits[0] if isinstance(logits, tuple) else logits, labels)
    losses = nn.functional.cross_entropy(chosen.float(), hidden, reduction="none")
    rows = labels.ne(IGNORED).nonzero()[:, 0]
    sums = torch.zeros(len(labels), 2, device=losses.device)
    return sums.index_add_(0, rows, torch.stack([losses, torch.ones_like(losses)], 1))


def perplexity(predicted: EvalPrediction) -> dict[str, float]:
    """exp of the mean negative log-likelihood over all masked tokens, whatever the batches."""
    total, count = numpy.asarray(predicted.predictions, dtype=numpy.float64).sum(0)
    with numpy.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return {"perplexity": float(numpy.exp(total / count))}


class PerplexityMixin:
    """Put before a trainer: evaluates on general text too, and once before the first step.

    Scores on general text begin with `general_`, those before the first step with `start_` and `start_general_`. The
    loss is the mean over all masked tokens, in training over those of a step and in evaluation over all: rows and
    batches differ in their number, so that `Trainer`'s mean of the batches' means is another one.

    Attributes:
        general: Rows of general text; None: not evaluated.
        entries: The trainer's log, in a list that may outlive the trainer.
    """

    general: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.entries: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)
        self.add_callback(_AtStart(self))  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the trainer; the scores of the start are among the metrics, also those of a run that was resumed."""
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        for entry in self.state.log_history:  # type: ignore[attr-defined]
            output.metrics.update({name: value for name, value in entry.items() if name in _START})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if any(name in logs for name in _START):  # without the rest, which would look like an evaluation of the result
            logs = {name: value for name, value in logs.items() if name in _START}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
        self.entries[:] = self.state.log_history  # type: ignore[attr-defined]

    def predict(self, *args: Any, metric_key_prefix: str = "test", **kwargs: Any) -> Any:
        """As of the trainer, which does not log these scores."""
        output = super().predict(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        self.log(output.metrics)
        return output

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As of the trainer; of a step with several batches or processes, the batch's share in the mean of all."""
        count = inputs["labels"].ne(IGNORED).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)  # type: ignore[misc]
        if num_items_in_batch is not None:
            loss = loss * (count / num_items_in_batch)
            if self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
                loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As of the trainer; during training on general text too."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        if self.is_in_train and eval_dataset is None and self.general is not None:  # type: ignore[attr-defined]
            general = "start_general" if metric_key_prefix == "start" else "general"
            metrics.update(super().evaluate(self.general, ignore_keys, general))  # type: ignore[misc]
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        exact = output.metrics.get(f"{metric_key_prefix}_perplexity")
        if exact is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = math.log(exact) if exact > 0 else exact
        return output


_START = ("start_perplexity", "start_general_perplexity")


class _AtStart(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here the model is wrapped and sharded as it is trained. A resumed run finds these scores in its log.
        if state.global_step == 0:
            self.trainer.evaluate(metric_key_prefix="start")


def with_perplexity(trainer_class: type[Trainer]) -> type[Trainer]:
    """The trainer class with `PerplexityMixin` before it."""
    return type(trainer_class.__name__, (PerplexityMixin, trainer_class), {})


# --------------------------------------------------------------------------- picture


def courses(log: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Step -> perplexity on domain and on general text, from a trainer's log."""
    found: dict[str, dict[int, float]] = {"domain": {}, "general": {}}
    names = {"start_perplexity": "domain", "start_general_perplexity": "general"}
    names |= {"eval_perplexity": "domain", "general_perplexity": "general"}
    for entry in log:
        for name, text in names.items():
            if name in entry:  # the first of a step is that of training; a best model may be loaded after it
                found[text].setdefault(entry["step"], entry[name])
    return found


def draw_courses(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the course of both perplexities, a panel each, with a line for every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    for axis, text in zip(figure.subplots(1, 2), ("domain", "general"), strict=True):
        for (name, log), color in zip(logs.items(), (_ORANGE, _BLUE)[-len(logs) :], strict=True):
            course = courses(log)[text]
            axis.plot(list(course), list(course.values()), marker="o", markersize=4, color=color, label=name)
        axis.set_title(f"perplexity on {text} text (lower is better)", fontsize=10)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    if len(logs) > 1:
        figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)

"""Evaluation results for the model card's metadata (`model-index`)."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .public import is_local

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSeq2SeqLM": "text2text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForImageClassification": "image-classification",
}
# What `Trainer` measures of the machine, and counts of texts.
_NOT_SCORES = ("runtime", "per_second", "samples", "_time", "num_tokens_seen")
# Where a metric has a name of its own on the Hub.
_METRICS = {"mcc": "matthews_correlation"}


def scores_by_split(state: Any, folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """The scores of the model that a trainer holds: those logged last, and further ones in `all_results.json`.

    That file is what `Trainer.save_metrics` and the recipes write; scores on a test set, which are not logged, are
    found there. One of another run is passed over.

    Args:
        state: The trainer's state.
        folder: Its output folder.

    Returns:
        Prefix of the scores (`eval`, `test`) → metric → value.
    """
    logged: dict[str, Any] = {}
    for entry in _of_model(state):
        logged.update(entry)
    file = Path(folder) / "all_results.json"
    written: dict[str, Any] = {}
    if file.is_file():
        try:
            written = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            written = {}
    runs = {entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry}
    if written.get("train_runtime") in runs:
        logged = {**written, **logged}
    # `Trainer` measures the time of every evaluation. The longest first: eval_notes_loss is not notes_loss of eval.
    prefixes = sorted((key.removesuffix("_runtime") for key in logged if key.endswith("_runtime")), key=len)[::-1]
    splits: dict[str, dict[str, float]] = {prefix: {} for prefix in prefixes if prefix != "train"}
    for key, value in logged.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(f"{prefix}_")), None)
        if prefix in splits and _is_score(key, value):
            splits[prefix][key.removeprefix(f"{prefix}_")] = float(value)
    return {prefix: splits[prefix] for prefix in sorted(splits) if splits[prefix]}


def _of_model(state: Any) -> list[dict[str, Any]]:
    """Logged evaluations, up to that of the present weights."""
    history = state.log_history
    ends = [index for index, entry in enumerate(history) if "train_runtime" in entry]
    after = history[ends[-1] + 1 :] if ends else []
    evaluations = [entry for entry in history if any(_is_evaluation(key) for key in entry)]
    best = getattr(state, "best_global_step", None)
    if best and getattr(state, "best_model_checkpoint", None) and not any(entry in after for entry in evaluations):
        evaluations = [entry for entry in evaluations if entry.get("step") == best]
    return evaluations


def _is_evaluation(key: str) -> bool:
    return key.endswith("_runtime") and key != "train_runtime"


def _is_score(key: str, value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and not key.endswith(_NOT_SCORES)


def add_scores(card: ModelCard, scores: dict[str, dict[str, float]], model: str, about: dict[str, Any]) -> None:
    """Puts scores into a card's `model-index`, beside those that are there; without a task there is no place for them.

    Args:
        card: The card.
        scores: As of `scores_by_split`.
        model: Name of the model's class, which tells the task.
        about: `tasks` and `dataset` (or `dataset_name`), as given to `create_model_card`.
    """
    data: Any = card.data
    present: list[EvalResult] = data.eval_results or []
    named = about.get("tasks") or next((task for end, task in _TASKS.items() if model.endswith(end)), None)
    task = present[0].task_type if present else named if isinstance(named, str) or not named else named[0]
    if task and scores:
        present = [*present, *_results(scores, task, present, _dataset(about))]
    data.eval_results = present or None
    # Without results no index is written, and the name belongs to it.
    data.model_name = (data.model_name or model) if present else None


def _results(
    scores: dict[str, dict[str, float]], task: str, present: list[EvalResult], dataset: str
) -> list[EvalResult]:
    known = present[0] if present else None
    there = {result.metric_type for result in present}
    results = []
    for prefix, metrics in scores.items():
        # transformers names the split of a data set from the Hub; it is the one that was evaluated.
        same = known is not None and prefix == "eval"
        for name, value in metrics.items():
            metric = "f1" if name.startswith("f1") else _METRICS.get(name, name)
            if same and name in there:
                continue
            results.append(
                EvalResult(
                    task_type=task,
                    task_name=known.task_name if known else None,
                    # Its Hub id, where it has one.
                    dataset_type=known.dataset_type if known else "unknown",
                    dataset_name=known.dataset_name if known else dataset,
                    dataset_config=known.dataset_config if known else None,
                    dataset_split=known.dataset_split if same and known else _split(prefix),
                    dataset_args=known.dataset_args if known else None,
                    metric_type=metric,
                    metric_name=name.replace("_", " "),
                    metric_value=value,
                )
            )
    return results


def _split(prefix: str) -> str:
    return "validation" if prefix == "eval" else prefix.removeprefix("eval_")


def _dataset(about: dict[str, Any]) -> str:
    named = about.get("dataset") or about.get("dataset_name") or about.get("dataset_tags") or "unknown"
    name = str(named[0] if isinstance(named, list) else named)
    return Path(name).name if is_local(name) else name

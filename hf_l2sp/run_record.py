"""What a run writes down for its report beside scores and logs: counts of its predictions, its command, the versions.

Counts and means only: no text and no example can be read out of them.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .scores import N_BINS, compute_classification_metrics, confusion_matrix

PREDICTIONS_NAME = "eval_predictions.json"
RUN_NAME = "run.json"

_PACKAGES = ("hf-l2sp", "torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "safetensors")
# Told only where they were used.
_ADDED_PACKAGES = ("peft", "trl", "sentence-transformers", "deepspeed")
_SECRET_FLAG = re.compile(r"--?[\w-]*(token|password|secret|api[_-]key)", flags=re.IGNORECASE)
_SECRET_WORD = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_HIDDEN = "***"


def describe_predictions(logits: Any, labels: Any, names: Sequence[str]) -> dict[str, Any]:
    """What the confusion matrix and the reliability diagram of one split need.

    `eval_predictions.json` holds such an entry for each split: `{"eval": ..., "test": ...}`.

    Args:
        logits: Of a classifier, or a tuple that starts with them.
        labels: True label ids.
        names: Label names in the order of the ids.

    Shape:
        logits: `[examples, classes]`; labels: `[examples]`.

    Returns:
        `labels`, the names; `examples`; `confusion`, counts by true (row) and predicted (column) label; `bins` of
        equal width in the confidence, each with `low`, `high`, `count` and, unless it is empty, mean `confidence` and
        `accuracy`; `ece`, the calibration error over these bins.

    Raises:
        ValueError: As `compute_classification_metrics`, and where there are not as many names as classes.
    """
    scores = compute_classification_metrics(EvalPrediction(logits, labels))
    values = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    if values.shape[1] != len(names):
        raise ValueError(f"{len(names)} label names for logits of {values.shape[1]} classes: pass one name per class.")
    true, predicted, every = np.asarray(labels), values.argmax(axis=1), np.arange(len(names))
    # Every label once on the diagonal and off again: a label that does not occur has its row and column, too.
    matrix = confusion_matrix(np.append(true, every), np.append(predicted, every)) - np.eye(len(names), dtype=np.int64)
    confidence = 1 / np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1)
    # The bins of expected_calibration_error: closed on the right.
    places = np.searchsorted(np.arange(1, N_BINS) / N_BINS, confidence, side="left")
    counts = np.bincount(places, minlength=N_BINS)
    sums = [np.bincount(places, weights=w, minlength=N_BINS) for w in (confidence, predicted == true)]
    bins: list[dict[str, Any]] = []
    for index, count in enumerate(counts.tolist()):
        means = {
            name: float(s[index] / count) for name, s in zip(("confidence", "accuracy"), sums, strict=True) if count
        }
        bins.append({"low": index / N_BINS, "high": (index + 1) / N_BINS, "count": count, **means})
    return {
        "labels": [str(name) for name in names],
        "examples": len(true),
        "confusion": matrix.tolist(),
        "bins": bins,
        "ece": scores["ece"],
    }


def describe_run(argv: Sequence[str]) -> dict[str, Any]:
    """Content of `run.json`: the command, where it ran and with which versions.

    Args:
        argv: Words of the command, the program first (`sys.argv`). Tokens and passwords in it are not written down.
    """
    words = _without_secrets(argv)
    packages = [*_PACKAGES, *(name for name in _ADDED_PACKAGES if name.replace("-", "_") in sys.modules)]
    return {
        "command": shlex.join(words),
        "argv": words,
        "processes": int(os.environ.get("WORLD_SIZE") or 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": platform.platform(),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{n: v for n in packages if (v := _version(n))}},
    }


def _without_secrets(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    follows = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if follows and not word.startswith("--"):
            word = _HIDDEN
        secret = _SECRET_FLAG.fullmatch(flag) is not None
        words.append(f"{flag}={_HIDDEN}" if secret and equals else _SECRET_WORD.sub(_HIDDEN, word))
        follows = secret and not equals
    return words


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

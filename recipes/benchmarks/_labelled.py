"""Labelled texts or sentences of a data set's folder, and the scores of predictions on them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from _bench import RECIPES
from transformers import EvalPrediction

from hf_l2sp.metrics import compute_classification_metrics

sys.path.insert(0, str(RECIPES))
from _ner_draws import NerSplit  # noqa: E402
from _ner_draws import draw_shots as draw_sentences  # noqa: E402
from _ner_tags import label_names  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402
from _recipe_data import Split, draw_shots  # noqa: E402
from _recipe_files import read_file  # noqa: E402

__all__ = [
    "SCORES",
    "NerSplit",
    "RecipeError",
    "Split",
    "draw_sentences",
    "draw_shots",
    "label_names",
    "read",
    "read_sentences",
    "sample",
    "scores_of",
]

SCORES = ("f1_macro", "nll", "ece", "accuracy")


def read(folder: Path, split: str) -> Split:
    _, values = read_file(folder / f"{split}.jsonl", ("text", "label"))
    return Split(split, values["text"], values["label"])


def read_sentences(folder: Path, split: str) -> NerSplit:
    _, values = read_file(folder / f"{split}.jsonl", ("tokens", "ner_tags"))
    return NerSplit(split, values["tokens"], values["ner_tags"])


def sample(split: Any, rows: int) -> Any:
    """The same rows for every seed and method."""
    drawn = random.Random(0).sample(range(len(split)), min(rows, len(split)))
    return split.take(sorted(drawn))


def scores_of(logits: numpy.ndarray, labels: Any) -> dict[str, float]:
    labels = numpy.array(labels)
    found = compute_classification_metrics(EvalPrediction(logits, labels))
    found["nll"] = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    return {name: float(found[name]) for name in SCORES}

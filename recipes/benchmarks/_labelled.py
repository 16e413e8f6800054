"""Labelled texts or sentences of a data set's folder, a model and settings to train on them, scores of predictions."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from _bench import RECIPES, embedded_model
from transformers import AutoModelForSequenceClassification, EvalPrediction, PreTrainedModel, set_seed

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
    "new_model",
    "passing",
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


def new_model(names: Sequence[str], seed: int, kind: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """The pretrained model with a head for these labels, whose first values the seed sets."""
    set_seed(seed)
    model: PreTrainedModel = kind.from_pretrained(
        embedded_model(), num_labels=len(names), id2label=dict(enumerate(names))
    )
    model.accepts_loss_kwargs = False  # see the recipes
    return model


def passing(folder: str, seed: int) -> dict[str, Any]:
    """Arguments of a training of which nothing is kept but the scores."""
    return {
        "output_dir": folder,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "per_device_eval_batch_size": 50,
    }


def scores_of(logits: numpy.ndarray, labels: Any) -> dict[str, float]:
    labels = numpy.array(labels)
    found = compute_classification_metrics(EvalPrediction(logits, labels))
    found["nll"] = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    return {name: float(found[name]) for name in SCORES}

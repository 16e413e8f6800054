"""One cell of the quality study: a data set, a number of labelled texts per class, a seed; trains and tests in it."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from _bench import RECIPES, embedded_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.metrics import compute_classification_metrics

sys.path.insert(0, str(RECIPES))
from _recipe_data import Split, draw_shots  # noqa: E402
from _recipe_files import read_file  # noqa: E402

SCORES = ("f1_macro", "nll", "ece", "accuracy")
# The same for every method that does not say otherwise.
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "max_steps": 80,
    "per_device_train_batch_size": 16,
    "warmup_steps": 8,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "bf16": True,
}
MAX_LENGTH = 64
TEST_ROWS = 400


def read(folder: Path, split: str) -> Split:
    _, values = read_file(folder / f"{split}.jsonl", ("text", "label"))
    return Split(split, values["text"], values["label"])


def sample(split: Split, rows: int) -> Split:
    """The same rows for every seed and method."""
    drawn = random.Random(0).sample(range(len(split)), min(rows, len(split)))
    return split.take(sorted(drawn))


@dataclass(frozen=True)
class Cell:
    """Where methods are compared, pairwise: same texts, same first values of the head, same order of batches.

    Attributes:
        folder: Folder with train.jsonl and test.jsonl of `text` and `label`.
        shots: Labelled texts per class; 0: all.
        seed: Of the draw, the head and the order.
    """

    folder: Path
    shots: int
    seed: int

    @cached_property
    def labelled(self) -> Split:
        train = read(self.folder, "train")
        return draw_shots(train, self.shots, self.seed) if self.shots else train

    @cached_property
    def names(self) -> list[str]:
        return sorted(set(read(self.folder, "train").labels))

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(embedded_model())

    @cached_property
    def test(self) -> Dataset:
        return self.tokens(sample(read(self.folder, "test"), TEST_ROWS))

    @cached_property
    def train(self) -> Dataset:
        return self.tokens(self.labelled)

    def tokens(self, split: Split) -> Dataset:
        coded = self.tokenizer(split.texts, truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**coded, "labels": [self.names.index(label) for label in split.labels]})

    def held_out(self, share: float) -> tuple[Dataset, Dataset]:
        """The labelled texts in two parts: some of every class, at least one, in the second."""
        rows = list(range(len(self.labelled)))
        random.Random(self.seed).shuffle(rows)
        second: list[int] = []
        for name in self.names:
            own = [row for row in rows if self.labelled.labels[row] == name]
            second += own[: max(1, round(share * len(own)))]
        first = [row for row in rows if row not in set(second)]
        return self.tokens(self.labelled.take(first)), self.tokens(self.labelled.take(second))

    def model(self) -> PreTrainedModel:
        set_seed(self.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            embedded_model(), num_labels=len(self.names), id2label=dict(enumerate(self.names))
        )
        model.accepts_loss_kwargs = False  # see the recipes
        return model

    def fit(
        self,
        trainer_class: type[Trainer] = L2SPTrainer,
        model: nn.Module | None = None,
        train: Dataset | None = None,
        arguments_class: Any = L2SPTrainingArguments,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Trainer:
        """Trains; `settings` are arguments beside TRAINING, `options` further ones of the trainer."""
        with tempfile.TemporaryDirectory() as folder:
            args = arguments_class(
                output_dir=folder,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                per_device_eval_batch_size=50,
                seed=self.seed,
                **{"save_strategy": "no", "logging_steps": 10, **TRAINING, **settings},
            )
            trainer = trainer_class(
                model=self.model() if model is None else model,
                args=args,
                train_dataset=self.train if train is None else train,
                processing_class=self.tokenizer,
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=compute_classification_metrics,
                **(options or {}),
            )
            trainer.train()
        return trainer

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Of the test texts."""
        return score(trainer.predict(self.test).predictions, self.test["labels"])


def score(logits: numpy.ndarray, labels: Any) -> dict[str, float]:
    labels = numpy.array(labels)
    found = compute_classification_metrics(EvalPrediction(logits, labels))
    found["nll"] = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    return {name: float(found[name]) for name in SCORES}


def course(trainer: Trainer) -> dict[str, list[float]]:
    """What the logs say of λ, drift and task loss over time."""
    logs = [log for log in trainer.state.log_history if "l2sp_lambda" in log]
    return {key: [round(log[key], 6) for log in logs] for key in ("l2sp_lambda", "l2sp_drift", "task_loss")}


def timed(work: Any) -> tuple[Any, float]:
    """The result and the CPU time of the process, which other processes on the machine change less than the clock."""
    start = time.process_time()
    return work(), time.process_time() - start


def parameters_of(model: nn.Module, patterns: tuple[str, ...]) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if any(pattern in name for pattern in patterns)]

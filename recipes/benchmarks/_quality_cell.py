"""One cell of the quality study: a data set, a number of labelled texts per class, a seed; trains and tests in it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _bench import embedded_model
from _labelled import Split, draw_shots, read, sample, scores_of
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.metrics import compute_classification_metrics

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

    def model(self) -> PreTrainedModel:
        set_seed(self.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            embedded_model(), num_labels=len(self.names), id2label=dict(enumerate(self.names))
        )
        model.accepts_loss_kwargs = False  # see the recipes
        return model

    def fit(self, **settings: Any) -> L2SPTrainer:
        """Trains; `settings` are arguments beside TRAINING."""
        with tempfile.TemporaryDirectory() as folder:
            args = L2SPTrainingArguments(
                output_dir=folder,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                per_device_eval_batch_size=50,
                seed=self.seed,
                save_strategy="no",
                logging_steps=10,
                **{**TRAINING, **settings},
            )
            trainer = L2SPTrainer(
                model=self.model(),
                args=args,
                train_dataset=self.train,
                processing_class=self.tokenizer,
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=compute_classification_metrics,
            )
            trainer.train()
        return trainer

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Of the test texts."""
        return scores_of(trainer.predict(self.test).predictions, self.test["labels"])


def course(trainer: Trainer) -> dict[str, list[float]]:
    """What the logs say of λ, drift and task loss over time."""
    logs = [log for log in trainer.state.log_history if "l2sp_lambda" in log]
    return {key: [round(log[key], 6) for log in logs] for key in ("l2sp_lambda", "l2sp_drift", "task_loss")}


def timed(work: Any) -> tuple[Any, float]:
    """The result and the CPU time of the process, which other processes on the machine change less than the clock."""
    start = time.process_time()
    return work(), time.process_time() - start

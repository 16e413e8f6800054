"""One cell of the quality study: a data set, a number of labelled texts per class, a seed; trains and tests in it."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from _bench import embedded_model
from _labelled import (
    NerSplit,
    draw_sentences,
    draw_shots,
    label_names,
    new_model,
    passing,
    read,
    read_sentences,
    sample,
    scores_of,
)
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.entity_scores import IGNORED
from hf_l2sp.metrics import make_entity_metrics

# The same for every method that does not say otherwise.
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "max_steps": 80,
    "per_device_train_batch_size": 16,
    "warmup_steps": 8,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
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
        bf16: Whether to train in bfloat16, or in float32.
    """

    folder: Path
    shots: int
    seed: int
    bf16: bool

    @cached_property
    def labelled(self) -> Any:
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

    @cached_property
    def halves(self) -> tuple[Dataset, Dataset]:
        """The labelled rows without a fifth of every class, and that fifth: for methods that need validation rows."""
        piles: dict[str, list[int]] = {}
        for row, kind in enumerate(self.kinds):
            piles.setdefault(kind, []).append(row)
        draw = random.Random(self.seed)
        held: set[int] = set()
        for _, pile in sorted(piles.items()):
            held.update(draw.sample(pile, max(1, len(pile) // 5) if len(pile) > 1 else 0))
        rest = [row for row in range(len(self.train)) if row not in held]
        return self.train.select(rest), self.train.select(sorted(held))

    @property
    def kinds(self) -> list[str]:
        return list(self.labelled.labels)

    @property
    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    model_class: ClassVar[Any] = AutoModelForSequenceClassification

    def tokens(self, split: Any) -> Dataset:
        coded = self.tokenizer(split.texts, truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**coded, "labels": [self.names.index(label) for label in split.labels]})

    def model(self) -> PreTrainedModel:
        return new_model(self.names, self.seed, self.model_class)

    def fit(
        self,
        model: PreTrainedModel | None = None,
        data: tuple[Dataset, Dataset | None] | None = None,
        optimizer: Callable[[PreTrainedModel], torch.optim.Optimizer] | None = None,
        trainer_class: type[L2SPTrainer] = L2SPTrainer,
        callbacks: Sequence[TrainerCallback] = (),
        **settings: Any,
    ) -> L2SPTrainer:
        """Trains.

        Args:
            model: Default: the pretrained one with a new head.
            data: Training and validation rows. Default: all labelled rows to train on.
            optimizer: Makes one for the model. Default: AdamW of the arguments.
            trainer_class: Of the trainer.
            callbacks: Of the trainer.
            **settings: Arguments beside TRAINING.
        """
        model = self.model() if model is None else model
        train, validation = (self.train, None) if data is None else data
        with tempfile.TemporaryDirectory() as folder:
            chosen = {**TRAINING, "bf16": self.bf16, "logging_steps": 10, **settings}
            args = L2SPTrainingArguments(**passing(folder, self.seed), **chosen)
            trainer = trainer_class(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=validation,
                processing_class=self.tokenizer,
                data_collator=self.collator,
                optimizers=(None if optimizer is None else optimizer(model), None),
                callbacks=list(callbacks),
            )
            trainer.train()
        return trainer

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Of the test texts."""
        return scores_of(trainer.predict(self.test).predictions, self.test["labels"])


class EntityCell(Cell):
    """The same for named entities: train.jsonl and test.jsonl have `tokens` and `ner_tags`.

    `shots` counts sentences per entity type; a word's label is on its first sub-word. `f1_macro` is the mean over the
    entity types, of entities with both ends right; the likelihood is that of a word's label.
    """

    model_class: ClassVar[Any] = AutoModelForTokenClassification

    @cached_property
    def labelled(self) -> NerSplit:
        train = read_sentences(self.folder, "train")
        return draw_sentences(train, self.shots, self.seed) if self.shots else train

    @cached_property
    def names(self) -> list[str]:
        return label_names(set().union(*read_sentences(self.folder, "train").types()))

    @cached_property
    def test(self) -> Dataset:
        return self.tokens(sample(read_sentences(self.folder, "test"), TEST_ROWS))

    @property
    def kinds(self) -> list[str]:
        return [min(types, default="") for types in self.labelled.types()]

    @property
    def collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tokenizer)

    def tokens(self, split: NerSplit) -> Dataset:
        coded = self.tokenizer(split.tokens, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
        labels = []
        for row, tags in enumerate(split.tags):
            words = coded.word_ids(row)
            first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
            labels.append([self.names.index(tags[w]) if f else IGNORED for w, f in zip(words, first, strict=True)])
        return Dataset.from_dict({**coded, "labels": labels})

    def scores(self, trainer: Trainer) -> dict[str, float]:
        found = trainer.predict(self.test)
        entities = make_entity_metrics(self.names)(EvalPrediction(found.predictions, found.label_ids))
        labelled = found.label_ids != IGNORED
        words = scores_of(found.predictions[labelled], found.label_ids[labelled])
        return {**words, "f1_macro": entities["f1_macro"]}


def cell_of(folder: Path, shots: int, seed: int, bf16: bool) -> Cell:
    """The cell of a data set, by what its rows have."""
    with open(folder / "train.jsonl", encoding="utf-8") as file:
        kind = EntityCell if "tokens" in json.loads(file.readline()) else Cell
    return kind(folder, shots, seed, bf16)


def course(trainer: Trainer) -> dict[str, list[float]]:
    """What the logs say of λ, drift and task loss over time."""
    logs = [log for log in trainer.state.log_history if "l2sp_lambda" in log]
    return {key: [round(log[key], 6) for log in logs] for key in ("l2sp_lambda", "l2sp_drift", "task_loss")}


def timed(work: Any) -> tuple[Any, float]:
    """The result and the CPU time of the process, which other processes on the machine change less than the clock."""
    start = time.process_time()
    return work(), time.process_time() - start

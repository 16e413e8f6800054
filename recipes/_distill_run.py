"""The run that a student is distilled in: who is trained before it, on what it is trained, what is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import datasets
from _distill_args import ENSEMBLE, TEACHER_EPOCHS, DistillArguments
from _distill_teachers import Answers, Teacher, ask, average, mean_of, scores_of, with_answers
from _recipe import Build, Run, free_memory
from _recipe_data import tokenize_texts
from _recipe_launch import agreed, say
from _recipe_model import ModelSource
from _recipe_output import clear_output_dir, differences, drop_checkpoints
from transformers import TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.distill import L2SPDistillationArguments, L2SPDistillationTrainer

ALONE = "labels alone"
# Folders in the output folder: of the teachers, and of the student that has none.
TEACHERS, WITHOUT = "teachers", "without_teacher"
NO_LABEL = -100


@dataclass
class DistillRun(Run):
    """A `Run` whose model learns from teachers too, on labelled and unlabelled texts.

    Attributes:
        distill: The distillation arguments.
        sources: Where the given teachers come from.
        labels: The labels, in the student's order.
        given: The given teachers, if there are any; each is let go once it was asked.
        texts: All texts of each split; the unlabelled ones are last in `train`.
        unlabelled: Token ids of the unlabelled texts.
        max_length: Longer texts are cut.
    """

    trainer_class = L2SPDistillationTrainer
    arguments_class = L2SPDistillationArguments

    distill: DistillArguments = field(default_factory=DistillArguments)
    sources: Sequence[ModelSource] = ()
    # Known after the output folder has been checked.
    labels: list[str] = field(default_factory=list)
    given: list[Teacher] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    unlabelled: Any = None
    max_length: int = 0

    def reads(self) -> tuple[str | None, ...]:
        return (*super().reads(), *(source.path for source in self.sources))

    def column(self) -> str:
        return "distilled"

    def clear(self) -> None:
        super().clear()
        for folder in self.output_dir.glob(f"{TEACHERS}/seed-*"):
            clear_output_dir(str(folder))
            drop_checkpoints(folder, remove_empty=True)
        drop_checkpoints(self.output_dir / WITHOUT, remove_empty=True)
        drop_checkpoints(self.output_dir / TEACHERS, remove_empty=True)

    def beside(self, build: Build, datasets: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Trains the student without a teacher (`--compare`) and the teachers; asks the teachers about every text."""
        seeds = [] if self.given else [self.args.seed + n for n in range(self.distill.ensemble or ENSEMBLE)]
        todo = int(self.settings["compare"]) + len(seeds) + 1
        say()
        results: dict[str, dict[str, Any]] = {}
        if self.settings["compare"]:
            steps = optimizer_steps(self.args, len(datasets["train"]) + len(self.unlabelled))
            self.about["optimizer_steps"] = steps
            say(f"1 of {todo}: the student without a teacher, {steps} steps on the labelled texts")
            classes = (L2SPTrainer, L2SPTrainingArguments)
            _, results[ALONE] = self.train_apart(WITHOUT, build, *classes, datasets, max_steps=steps)
            free_memory()
        learned = {**datasets, "train": joined(datasets["train"], self.unlabelled)}
        answers, seconds = [], []
        for seed in seeds:
            say(f"{len(results) + len(answers) + 1} of {todo}: teacher, seed {seed}")
            answer, its_seconds = self._ask_own(build, datasets, learned, seed)
            answers.append(answer)
            seconds.append(its_seconds)
            free_memory()
        while self.given:
            answers.append(self._ask_given(self.given.pop(0)))
            free_memory()
        known = {split: rows["label"][:] for split, rows in datasets.items() if split != "train"}
        scores = mean_of([scores_of(answer, known) for answer in answers])
        scores |= {"train_runtime": fmean(seconds)} if seconds else {}
        results["teachers, mean" if len(answers) > 1 else "teacher"] = scores
        if len(answers) > 1:
            results[f"ensemble of {len(answers)}"] = scores_of(average(answers), known)
        say(f"{todo} of {todo}: the student")
        return results, {**learned, "train": with_answers(learned["train"], [answer["train"] for answer in answers])}

    def _ask_own(
        self, build: Build, datasets: dict[str, Any], learned: dict[str, Any], seed: int
    ) -> tuple[Answers, float]:
        """What a teacher says that is fine-tuned for it on the labelled texts; and how long that took."""
        folder = f"{TEACHERS}/seed-{seed}"
        changes = {"seed": seed, "num_train_epochs": self.distill.teacher_epochs or TEACHER_EPOCHS}
        labelled = {split: datasets[split] for split in ("train", "validation")}
        trainer, scores = self.train_apart(folder, build, L2SPTrainer, L2SPTrainingArguments, labelled, **changes)
        if self.distill.keep_teachers:
            trainer.save_model()
        else:
            agreed(lambda: drop_checkpoints(self.output_dir / TEACHERS, remove_empty=True))
        teacher = Teacher(f"of seed {seed}", trainer.model, trainer.processing_class)
        tokenized = {split: rows.remove_columns("label") for split, rows in learned.items()}
        return ask(teacher, tokenized, self.labels, self.args), scores["train_runtime"]

    def _ask_given(self, teacher: Teacher) -> Answers:
        """What a given teacher says, who reads the texts with a tokenizer of its own."""
        say(f"Asking the teacher {teacher.name} about {sum(map(len, self.texts.values()))} texts")
        teacher.model.to(self.args.device)
        tokenized = {
            split: tokenize_texts(texts, teacher.tokenizer, self.max_length, split)[0]
            for split, texts in self.texts.items()
        }
        return ask(teacher, tokenized, self.labels, self.args)

    def compared(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        alone, *teaching, distilled = results.values()
        names = ("teachers_mean", "ensemble") if len(teaching) > 1 else ("teacher",)
        runs = {"labels_alone": alone, **dict(zip(names, teaching, strict=True)), "distilled": distilled}
        return {**runs, "difference": differences(alone, distilled)}

    def headline(self) -> str:
        steps = self.about.get("optimizer_steps")
        taught = f"alpha {self.args.distill_alpha:g}, temperature {self.args.distill_temperature:g}"
        return f"{super().headline()}, {taught}" + (f"\nstudents: {steps} optimizer steps each" if steps else "")


def joined(labelled: datasets.Dataset, unlabelled: datasets.Dataset) -> datasets.Dataset:
    """All rows to learn from; those without a label have the label that no task loss is computed for."""
    rows = datasets.concatenate_datasets([labelled.remove_columns("label"), unlabelled])
    labels = [*labelled["label"], *[NO_LABEL] * len(unlabelled)]
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict({"label": labels})], axis=1)


def optimizer_steps(args: TrainingArguments, rows: int) -> int:
    """How many steps `Trainer` takes on so many rows."""
    if args.max_steps > 0:
        return args.max_steps
    batches = rows / (args.train_batch_size * args.world_size)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(whole / args.gradient_accumulation_steps)))

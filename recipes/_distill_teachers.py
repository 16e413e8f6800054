"""What the teachers say in the recipes: loaded and checked, asked once about every text, scored, put into the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import datasets
import torch
from _recipe_args import RecipeError
from _recipe_launch import is_main_process
from _recipe_model import ModelSource
from _textcls import load_classifier
from torch import Tensor
from transformers import DataCollatorWithPadding, EvalPrediction, TrainingArguments
from transformers.utils import logging

from hf_l2sp.distill import cache_teacher_logits
from hf_l2sp.metrics import compute_classification_metrics
from hf_l2sp.teachers import label_order

COLUMN = "teacher_logits"
# Logits of the texts of every split, in the student's order of labels.
Answers = dict[str, Tensor]


@dataclass
class Teacher:
    """A fine-tuned model with the tokenizer that it reads with."""

    name: str
    model: Any
    tokenizer: Any


def load_teachers(sources: Sequence[ModelSource], labels: Sequence[str], max_length: int) -> list[Teacher]:
    """The fine-tuned models as they are.

    Raises:
        RecipeError: one is no text classifier, was never trained, or has other labels than the data.
    """
    teachers = []
    for source in sources:
        advice = "Fine-tune it first, for example with recipes/medical_textcls.py."
        model, tokenizer = load_classifier(source, max_length, advice)
        try:
            label_order(model, labels)
        except ValueError as error:
            raise RecipeError(f"{source.flag} {source.shown!r}: {error}") from error
        teachers.append(Teacher(source.shown, model, tokenizer))
    return teachers


def ask(
    teacher: Teacher, tokenized: Mapping[str, datasets.Dataset], labels: Sequence[str], args: TrainingArguments
) -> Answers:
    """What a teacher says about every split.

    Args:
        teacher: Who is asked.
        tokenized: The texts of each split as tokens of the teacher's tokenizer, and nothing else.
        labels: The labels, in the student's order.
        args: Training arguments, which say how many texts are asked about at a time and whether a bar is shown.

    Raises:
        RecipeError: its logits are no numbers.
    """
    rows = datasets.concatenate_datasets(list(tokenized.values()))
    # Texts of a length share a batch: little padding. The longest come first, so that what is too much fails at once.
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    ordered = datasets.Dataset.from_dict(rows[order], features=rows.features)
    collator, id2label = DataCollatorWithPadding(teacher.tokenizer), dict(enumerate(labels))
    try:
        with _progress_bar(is_main_process() and not args.disable_tqdm):
            asked = cache_teacher_logits(ordered, teacher.model, collator, args.eval_batch_size, id2label=id2label)
    except ValueError as error:
        raise RecipeError(f"teacher {teacher.name}: {error}") from error
    logits = torch.empty(len(rows), len(labels))
    logits[order] = torch.tensor(asked[COLUMN][:])
    return dict(zip(tokenized, logits.split([len(part) for part in tokenized.values()]), strict=True))


@contextlib.contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """That of the library, which the recipes switch off with those of loading and saving."""
    before = logging.is_progress_bar_enabled()
    if shown:
        logging.enable_progress_bar()
    try:
        yield
    finally:
        if shown and not before:
            logging.disable_progress_bar()


def average(answers: Sequence[Answers]) -> Answers:
    """What an ensemble says: the logarithms of the mean probabilities."""
    return {
        split: torch.stack([one[split].double().softmax(-1) for one in answers]).mean(0).log() for split in answers[0]
    }


def scores_of(answers: Answers, labels: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The scores that `Trainer` would give these logits, on all splits whose `labels` are given."""
    scores = {}
    for split, of_split in labels.items():
        prefix, logits = "eval" if split == "validation" else split, answers[split].double()
        found = {"loss": float(torch.nn.functional.cross_entropy(logits, torch.tensor(of_split)))}
        found |= compute_classification_metrics(EvalPrediction(logits.numpy(), torch.tensor(of_split).numpy()))
        scores |= {f"{prefix}_{name}": value for name, value in found.items()}
    return scores


def mean_of(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score."""
    return {name: fmean(one[name] for one in scores) for name in scores[0]}


def with_answers(rows: datasets.Dataset, answers: Sequence[Tensor]) -> datasets.Dataset:
    """The rows with what every teacher says about them, as `hf_l2sp.distill` takes it."""
    feature = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    column = datasets.Dataset.from_dict(
        {COLUMN: torch.stack(list(answers), dim=1).numpy()}, features=datasets.Features({COLUMN: feature})
    )
    return datasets.concatenate_datasets([rows, column], axis=1)

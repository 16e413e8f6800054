"""The teacher term of a distillation, and which items of a batch are counted in which term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def distillation_loss(student: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    """T²·KL(p ‖ q) of every item; p is the mean of the teachers' softened probabilities, q the student's.

    Args:
        student: Logits.
        teachers: Logits of every teacher.
        temperature: T.

    Shape:
        `student` is `(*, labels)`, `teachers` `(*, teachers, labels)`, the result `(*)`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(dtype) / temperature, dim=-1)
    # The logarithm of the mean probability, without the probabilities, which may round to 0.
    log_p = torch.logsumexp(torch.log_softmax(teachers.to(dtype) / temperature, dim=-1), dim=-2)
    log_p = log_p - math.log(teachers.shape[-2])
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def counted(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which items have a label, and which get the teacher term.

    Shape:
        Both as the labels: `(batch,)` or `(batch, positions)`.

    Raises:
        ValueError: There are no labels, or not one number of a class per item.
    """
    labels = inputs["labels"] if "labels" in inputs else None
    if labels is None:
        raise ValueError(
            f"Distillation needs 'labels'; the inputs are {list(inputs)}. Give rows without a label the label -100."
        )
    if labels.is_floating_point():
        raise ValueError(
            f"Distillation is for one label per item; these labels are {labels.dtype} numbers, as of a regression or "
            "of several labels per item. Use distill_alpha=0."
        )
    labelled = labels.ne(-100)
    if labels.dim() < 2:
        return labelled, torch.ones_like(labelled)
    attended = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(labelled)
    return labelled, labelled | (attended & ~labelled.any(-1, keepdim=True))


def counts(labelled: Tensor, items: Tensor) -> Tensor:
    """How many they are, as a tensor of two numbers."""
    return torch.stack([labelled.sum(), items.sum()])


def with_stand_ins(labels: Tensor, parts: int) -> Tensor:
    """The labels, with others in every part of the batch that has none, for a mean over no label is not a number.

    What the loss of such a part is does not matter: it weighs nothing.
    """
    return torch.cat([torch.where(part.ne(-100).any(), part, 0) for part in labels.chunk(parts)])


def check_shapes(what: str, teachers: Tensor, student: Tensor, items: Tensor) -> None:
    """Raises `ValueError` unless the logits are of the same items and classes; `what` names those of the teachers."""
    if student.shape[:-1] != items.shape or (*teachers.shape[:-2], teachers.shape[-1]) != student.shape:
        raise ValueError(
            f"{what} {tuple(teachers.shape)}, the student's logits {tuple(student.shape)} and the labels "
            f"{tuple(items.shape)} do not fit together; expected (*, teachers, labels), (*, labels) and (*)."
        )


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's outputs; raises `ValueError` where there are none."""
    if not isinstance(outputs, Mapping) or "logits" not in outputs:
        raise ValueError(
            f"The student's output is a {type(outputs).__name__} without 'logits', which distillation compares with "
            "the teacher's. Use a classification model of transformers, with return_dict=True."
        )
    logits: Tensor = outputs["logits"]
    return logits

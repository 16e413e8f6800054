"""A teacher's logits as a column of the data: computed once, collated with the other columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .teachers import Teachers, label_names

logger = logging.get_logger(__name__)

COLUMN = "teacher_logits"
_LABELS = ("label", "labels", "label_ids")


def cache_teacher_logits(
    dataset: datasets.Dataset,
    teacher: nn.Module | Sequence[nn.Module],
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    batch_size: int = 32,
    *,
    id2label: Mapping[int, str] | None = None,
) -> datasets.Dataset:
    """The dataset with the column `teacher_logits`, which `DistillationMixin` takes instead of asking the teacher.

    The teacher runs on its device, in its dtype and in evaluation mode; the logits are kept in float32. Texts must
    not change afterwards: augment and tokenize before. A teacher with another tokenizer is asked on data tokenized
    for it, and for a sequence classification the column then joins the student's data:
    `student_data.add_column("teacher_logits", teacher_data["teacher_logits"])`.

    Args:
        dataset: Tokenized rows.
        teacher: A classification model of transformers, or a list of them, an ensemble.
        collator: Makes a batch of rows, padded as need be.
        batch_size: Rows in a forward pass.
        id2label: The student's `config.id2label`: the logits are stored in its order, or refused if the names differ.
            `None`: in the order of the (first) teacher, which then must be the student's.

    Shape:
        A row of the column is `(labels,)` for a sequence and `(positions, labels)` for tokens, as many as the row has
        `input_ids`; a list of teachers adds an axis before the labels.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ValueError: It has the column already, the collator cuts rows, the labels' names differ, or a logit is not a
            number.
    """
    if not isinstance(dataset, datasets.Dataset):
        hint = "; did you mean dataset['train']?" if isinstance(dataset, dict) else "."
        raise TypeError(f"A {type(dataset).__name__} was given, not a datasets.Dataset{hint}")
    if COLUMN in dataset.column_names:
        raise ValueError(
            f"The dataset has a column {COLUMN!r} already; remove_columns([{COLUMN!r}]) to compute it anew."
        )
    models = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    names = label_names(models[0].config.id2label if id2label is None else id2label)  # type: ignore[arg-type, union-attr]
    if id2label is None:
        logger.warning(
            f"The teacher's logits are stored in its own order of labels, {names}. If the student's may be another "
            "one, give id2label=student.config.id2label."
        )
    teachers = Teachers(models, names)
    device = next(models[0].parameters()).device
    plain = dataset.with_format(None).select_columns(
        [name for name in dataset.column_names if name in _LABELS or teachers.accept(name)]
    )
    values: list[numpy.ndarray] = []
    for start in logging.tqdm(range(0, len(plain), batch_size), desc="Teacher's logits"):
        rows = [plain[index] for index in range(start, min(start + batch_size, len(plain)))]
        logits = teachers.logits(collator(rows), device).float().cpu()
        if not torch.isfinite(logits).all():
            kinds = ", ".join(f"{type(model).__name__} in {next(model.parameters()).dtype}" for model in models)
            raise ValueError(
                f"A teacher ({kinds}) gives logits that are not finite for rows {start} to {start + len(rows) - 1}; "
                "load it in float32 if it overflows."
            )
        per_token = logits.dim() == 4
        if isinstance(teacher, nn.Module):
            logits = logits.squeeze(-2)
        values += _unpadded(logits, rows, padding_side(collator)) if per_token else list(logits.numpy())
    feature: Any = datasets.Value("float32")
    for _ in range(values[0].ndim if values else 1):
        feature = datasets.Sequence(feature)
    column = datasets.Dataset.from_dict({COLUMN: values}, features=datasets.Features({COLUMN: feature}))
    joined = datasets.concatenate_datasets([dataset.with_format(None), column], axis=1)
    return joined.with_format(dataset.format["type"])


def _unpadded(logits: Tensor, rows: Sequence[Mapping[str, Any]], side: str) -> list[numpy.ndarray]:
    values = []
    for row, of_row in zip(rows, logits, strict=True):
        length, padded = len(row["input_ids"]), len(of_row)
        if length > padded:
            raise ValueError(
                f"The collator made {padded} positions of a row with {length} input_ids. Cut texts when they are "
                "tokenized (truncation=True), so that teacher and student see the same."
            )
        values.append((of_row[:length] if side == "right" else of_row[padded - length :]).numpy())
    return values


def padding_side(collator: Any) -> str:
    return getattr(getattr(collator, "tokenizer", None), "padding_side", "right")


class TeacherLogitsCollator:
    """Collates the column `teacher_logits`, padded along the positions for tokens; leaves the rest to `collator`."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator
        if hasattr(collator, "tokenizer"):  # Trainer saves it beside the model
            self.tokenizer = collator.tokenizer

    def __call__(self, rows: list[Any]) -> Any:
        if not isinstance(rows[0], Mapping) or COLUMN not in rows[0]:
            return self.collator(rows)
        batch = self.collator([{name: row[name] for name in row if name != COLUMN} for row in rows])
        labels = batch.get("labels")
        if labels is None:  # prediction: nobody asks for the teacher
            return batch
        logits = [torch.as_tensor(numpy.asarray(row[COLUMN]), dtype=torch.float32) for row in rows]
        if labels.dim() < 2:
            batch[COLUMN] = torch.stack(logits)
            return batch
        wanted, longest = labels.shape[1], max(map(len, logits))
        if longest > wanted:
            raise ValueError(
                f"A row has {longest} positions in {COLUMN!r} and the batch {wanted}: the column was computed on "
                "other tokens. Compute it anew on these data with cache_teacher_logits."
            )
        side = padding_side(self.collator)
        padded = pad_sequence([*logits, logits[0].new_zeros(wanted, *logits[0].shape[1:])], True, 0.0, side)
        batch[COLUMN] = padded[:-1]
        return batch

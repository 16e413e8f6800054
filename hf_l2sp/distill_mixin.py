"""Where in a `Trainer`'s life the teacher comes in: its check, its logits in the objective, its share in the logs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .distill_args import DistillationArguments
from .distill_terms import check_shapes, counted, counts, distillation_loss, logits_of, with_stand_ins
from .naming import in_training_mode, unwrap
from .teacher_logits import COLUMN, TeacherLogitsCollator
from .teachers import Teachers, check_student, check_teacher, find_tokenizer, label_names, load_teacher
from .trainer import L2SPMixin

logger = logging.get_logger(__name__)

_DEFAULTS = {f.name: f.default for f in fields(DistillationArguments)}


class DistillationMixin:
    """Adds a teacher's probabilities to the objective of a `Trainer` for classification; put it before the trainer.

    `class MyTrainer(DistillationMixin, Trainer)`, with arguments from `DistillationArguments`; plain
    `TrainingArguments` work too, with its defaults. For models that give sequences or tokens one label each.

    The objective per optimizer step is (1 − α)·task + α·T²·KL(teacher ‖ student). Both are means over the whole
    step, whatever the gradient accumulation and the number of processes (with `average_tokens_across_devices`, the
    default): the task loss over the labels that are not -100, the teacher term over

    - sequences: all rows; one without a label (-100) gets the teacher term only;
    - tokens: those with a label; in a row without any, all that are attended to.

    The task loss is that of the model or of label smoothing, taken as a mean per micro-batch and weighted by its
    number of labels, so that it is right with heads that ignore `num_items_in_batch` as well. With a
    `compute_loss_func` it is what that returns, which must divide by `num_items_in_batch` as for `Trainer`.

    Evaluation and prediction know nothing of the teacher. `L2SPMixin` goes before this class, so that its penalty is
    counted once, beside both terms: α does not touch it. In the logs L2-SP's `task_loss` is the loss without the
    penalty, so both terms of the distillation; `distill_loss` is the teacher's share of it, α and T² included,
    averaged over the steps since the last log as the loss is.

    Batches with the column `teacher_logits` use it and no teacher is asked. With `distill_alpha` 0 every method is
    that of the trainer that follows.

    Source: Hinton, Vinyals and Dean, 2015 (arXiv 1503.02531).

    Args:
        teacher: The teacher, or a list of them: an ensemble, whose probabilities are averaged. It keeps its dtype, is
            put into evaluation mode and moved to the student's device.
        teacher_tokenizer: Its tokenizer, compared with the trainer's `processing_class`; by default looked for
            where the teacher was loaded from. One for all teachers, or a list.
        args: As for the trainer that follows.
        kwargs: As for the trainer that follows.

    Raises:
        TypeError: Of a class that has `L2SPMixin` behind this one.
        ValueError: There is no teacher, or there are two; it has other labels, another vocabulary, or weights of the
            student; the task is not a classification by one label.
    """

    # Set by the trainer that follows in the bases.
    args: Any
    model: Any
    accelerator: Any
    compute_loss_func: Any
    data_collator: Any
    processing_class: Any
    label_smoother: Any
    train_dataset: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if L2SPMixin in order and order.index(L2SPMixin) > order.index(DistillationMixin):
            raise TypeError(
                f"{cls.__name__} has L2SPMixin behind DistillationMixin, whose α would then weigh the penalty too. "
                f"Put it first: class {cls.__name__}(L2SPMixin, DistillationMixin, Trainer), or take "
                "L2SPDistillationTrainer."
            )

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._distill_models = _listed(teacher)
        tokenizers = _listed(teacher_tokenizer) or [None]
        self._distill_tokenizers = tokenizers * len(self._distill_models) if len(tokenizers) == 1 else tokenizers
        if len(self._distill_tokenizers) != len(self._distill_models) and teacher is not None:
            raise ValueError(
                f"{len(tokenizers)} tokenizers were given for {len(self._distill_models)} teachers; give one for "
                "each, in their order, or a single one."
            )
        self._distill_teachers: Teachers | None = None
        self._distill_student: weakref.ref[nn.Module] | None = None
        self._distill_in_step = False
        # Labels and items of the teacher term in the present optimizer step, over all its micro-batches and processes.
        self._distill_counts: Tensor | None = None
        # Teacher's share of the loss since the last log; on the device, so that no step waits for the host.
        self._distill_sum: Tensor | None = None
        self._distill_steps = 0
        super().__init__(*args, **kwargs)
        if self._distill_on:
            source = self._distill_arg("distill_teacher")
            if teacher is not None and source is not None:
                raise ValueError(
                    f"There are two teachers: distill_teacher={source!r} and the one given to the trainer. Leave one "
                    "out, or give both to the trainer as a list."
                )
            check_student(unwrap(self.model))
            self.data_collator = TeacherLogitsCollator(self.data_collator)
            columns = getattr(self.train_dataset, "column_names", None)
            if COLUMN not in (columns or ()):
                self._distill_prepare(required=columns is not None)

    def _distill_arg(self, name: str) -> Any:
        return getattr(self.args, name, _DEFAULTS[name])

    @property
    def _distill_on(self) -> bool:
        return bool(self._distill_arg("distill_alpha") > 0)

    # --- teachers ---------------------------------------------------------------------------------------------------

    def _distill_prepare(self, required: bool = True) -> None:
        """Loads the teacher and checks all of them against the present student, unless that is done."""
        student: Any = unwrap(self.model)
        source = self._distill_arg("distill_teacher")
        if self._distill_student is not None and self._distill_student() is student:
            return
        check_student(student)
        if not self._distill_models and source is None:
            if not required:
                return
            raise ValueError(
                f"distill_alpha={self._distill_arg('distill_alpha')} needs a teacher: distill_teacher=NAME in the "
                f"arguments, teacher=model for the trainer, or the column {COLUMN!r} in the data "
                "(cache_teacher_logits). Or set distill_alpha=0."
            )
        if not self._distill_models:
            self._distill_models = [load_teacher(source, student)]
            self._distill_tokenizers = [find_tokenizer(source, local_files_only=False)]
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = find_tokenizer(getattr(student, "name_or_path", ""), local_files_only=True)
        pairs = zip(self._distill_models, self._distill_tokenizers, strict=True)
        notes = [check_teacher(model, its, student, tokenizer) for model, its in pairs]
        for note in dict.fromkeys(note for note in notes if note is not None):
            if self.is_world_process_zero():  # type: ignore[attr-defined]
                logger.warning(note)
        self._distill_teachers = Teachers(self._distill_models, label_names(student.config.id2label))
        self._distill_student = weakref.ref(student)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self._distill_on and COLUMN not in self._signature_columns:  # type: ignore[attr-defined]
            self._signature_columns.append(COLUMN)  # type: ignore[attr-defined]

    # --- the objective ----------------------------------------------------------------------------------------------

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # Reached once per training loop, also when auto_find_batch_size starts it again.
        self._distill_sum, self._distill_steps = None, 0
        return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._distill_counts = None
        if self._distill_on and batches:
            own = torch.stack([counts(*counted(batch)) for batch in batches]).sum(0).to(self.args.device)
            self._distill_counts = self.accelerator.reduce(own, reduction="sum") if self._distill_across else own
        return batches, num_items_in_batch

    @property
    def _distill_across(self) -> bool:
        return bool(self.args.average_tokens_across_devices and self.accelerator.num_processes > 1)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor
        if not self._distill_on:
            loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
            return loss
        self._distill_in_step = True
        try:
            loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._distill_in_step = False
        self._distill_steps += int(self.accelerator.sync_gradients)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """(1 − α)·task + α·T²·KL for a model in training mode; what the trainer that follows computes otherwise.

        Outside of a training step the means are those over the inputs.

        Raises:
            ValueError: The inputs have no labels, or logits of another shape than the student's.
        """
        cached = inputs[COLUMN] if COLUMN in inputs else None
        if cached is not None:
            inputs = {name: value for name, value in inputs.items() if name != COLUMN}
        if not self._distill_on or not in_training_mode(model):
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        labelled, items = counted(inputs)
        own = counts(labelled, items)
        in_step = self._distill_in_step and self._distill_counts is not None
        of_step = self._distill_counts if in_step else own
        assert of_step is not None
        # Gradients are averaged over the processes, where Trainer counts over all of them, and Trainer may divide.
        processes = self.accelerator.num_processes if in_step and self._distill_across else 1
        divided = self._distill_divisor(num_items_in_batch) if in_step else 1

        inputs, of_task = dict(inputs), num_items_in_batch
        # DataParallel gives a loss for its part of the batch on each GPU; smoothed labels are taken over all of it.
        parts = 1 if self.label_smoother is not None else max(1, self.args.n_gpu)
        if self.compute_loss_func is not None:
            if torch.is_tensor(of_task):
                of_task = of_task.clamp(min=1)  # no label in the whole step: a loss of 0, not of 0/0
        else:
            inputs["labels"], of_task = with_stand_ins(inputs["labels"], parts), None
        asked = dict(inputs)  # the trainer takes labels out
        task, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=of_task, **kwargs
        )
        logits = logits_of(outputs)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        task = task.to(dtype)
        if self.compute_loss_func is None:
            weights = torch.stack([part.sum() for part in labelled.chunk(parts)]).to(task.device, dtype)
            task = (task.reshape(-1) * weights).sum() / of_step[0].clamp(min=1) * (processes * divided)

        taught = self._distill_teacher_loss(logits, asked, cached, items) / of_step[1].clamp(min=1)
        alpha = self._distill_arg("distill_alpha")
        share = alpha * processes * taught
        if in_step:
            kept = share.detach()
            self._distill_sum = kept if self._distill_sum is None else self._distill_sum + kept
        loss = (1 - alpha) * task + share * divided
        return (loss, outputs) if return_outputs else loss

    def _distill_divisor(self, num_items_in_batch: Any) -> int:
        """What `Trainer.training_step` divides the loss by: the micro-batches, unless it takes it for scaled."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
            scaled = by_model or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    def _distill_teacher_loss(self, logits: Tensor, inputs: Mapping[str, Any], cached: Any, items: Tensor) -> Tensor:
        """Sum of T²·KL over the items."""
        if cached is None:
            self._distill_prepare()
            assert self._distill_teachers is not None
            teachers = self._distill_teachers.logits(inputs, logits.device)
        else:
            teachers = cached.to(logits.device)
            teachers = teachers.unsqueeze(-2) if teachers.dim() == logits.dim() else teachers
        what = "The teacher's logits" if cached is None else f"The column {COLUMN!r}"
        check_shapes(what, teachers, logits, items)
        losses = distillation_loss(logits, teachers, self._distill_arg("distill_temperature"))
        return torch.where(items.to(losses.device), losses, 0.0).sum()

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if COLUMN in inputs:  # without labels the model gets the inputs as they are
            inputs = {name: value for name, value in inputs.items() if name != COLUMN}
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._distill_sum is not None and self._distill_steps:
            total = self.accelerator.gather(self._distill_sum.reshape(1)).mean()
            logs["distill_loss"] = float(total) / self._distill_steps
            self._distill_sum, self._distill_steps = None, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]

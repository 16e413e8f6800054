"""Knowledge distillation: a trainer that learns from labels and from a teacher's probabilities.

    from hf_l2sp.distill import L2SPDistillationArguments, L2SPDistillationTrainer

    args = L2SPDistillationArguments(output_dir="student", distill_alpha=0.7, l2sp_lambda=0.01)
    trainer = L2SPDistillationTrainer(
        model=student, args=args, train_dataset=data, processing_class=tokenizer, teacher=[one, another]
    )
    trainer.train()

or, with teachers that are asked once instead of in every epoch and then are needed no more:

    from transformers import DataCollatorWithPadding
    from hf_l2sp.distill import cache_teacher_logits

    pad = DataCollatorWithPadding(tokenizer)
    cached = cache_teacher_logits(data, [one, another], pad, id2label=student.config.id2label)
    trainer = L2SPDistillationTrainer(model=student, args=args, train_dataset=cached, processing_class=tokenizer)

Texts without a label have the label -100. For another trainer put `DistillationMixin` before it, and `L2SPMixin`
before both: `class MyTrainer(L2SPMixin, DistillationMixin, SomeTrainer)`, and the arguments in the same way.

Source: Hinton, Vinyals and Dean, 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

from transformers import Trainer

from .args import L2SPTrainingArguments
from .distill_args import DistillationArguments
from .distill_mixin import DistillationMixin
from .distill_terms import distillation_loss
from .teacher_logits import cache_teacher_logits
from .trainer import L2SPMixin

__all__ = [
    "DistillationArguments",
    "DistillationMixin",
    "L2SPDistillationArguments",
    "L2SPDistillationTrainer",
    "cache_teacher_logits",
    "distillation_loss",
]


class L2SPDistillationTrainer(L2SPMixin, DistillationMixin, Trainer):
    """`L2SPTrainer` that also learns from a teacher; arguments from `L2SPDistillationArguments`.

    See `DistillationMixin` and `L2SPMixin` for what they do.
    """


class L2SPDistillationArguments(DistillationArguments, L2SPTrainingArguments):
    """`L2SPTrainingArguments` with the fields of `DistillationArguments`."""

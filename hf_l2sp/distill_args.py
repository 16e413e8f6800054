"""The `distill_*` argument fields and the checks of them."""

import inspect
from dataclasses import dataclass, field
from typing import Any


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class DistillationArguments:
    r"""The fields that distillation adds to any `TrainingArguments`; a dataclass mixin, put first.

    The objective per optimizer step is

        (1 − α) · mean task loss + α · T² · mean KL(teacher ‖ student), both softened by the temperature T

    > Parameters that control distillation

    Args:
        distill_teacher (`str`, *optional*):
            Hub id or local path of the teacher. `None`: the trainer is given `teacher`, a model or a list of them,
            or the data have the column `teacher_logits` (see `cache_teacher_logits`).
        distill_alpha (`float`, defaults to `0.5`):
            α, the weight of the teacher term, from 0 to 1. 0 switches distillation off: no teacher is loaded, and the
            run is that of the trainer without it bit for bit.
        distill_temperature (`float`, defaults to `2.0`):
            T > 0. A higher one shows more of what the teacher thinks of the wrong classes.

    Raises:
        ValueError: A value is out of range.
    """

    distill_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local path of the teacher; default: the one given to the trainer, or cached logits."
        },
    )
    distill_alpha: float = field(
        default=0.5,
        metadata={"help": "Weight α of the teacher term: (1−α)·task + α·T²·KL. 0 switches distillation off."},
    )
    distill_temperature: float = field(
        default=2.0,
        metadata={"help": "Temperature T that softens the probabilities of teacher and student."},
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `class MyConfig(DistillationArguments, SFTConfig): ...` needs no decorator; one with fields of its own does.
        if not inspect.get_annotations(cls):
            dataclass(repr=False)(cls)

    def __post_init__(self) -> None:
        for name in ("distill_alpha", "distill_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}={value!r} is a {type(value).__name__}, not a number.")
            # As a float: hyperparameter search casts by `type(old)(value)` and would round every α.
            setattr(self, name, float(value))
        if not 0 <= self.distill_alpha <= 1:
            raise ValueError(f"distill_alpha={self.distill_alpha} is a weight beside 1 − α; give 0 to 1.")
        if not 0 < self.distill_temperature < float("inf"):
            raise ValueError(f"distill_temperature={self.distill_temperature} divides the logits; give one above 0.")
        if self.distill_teacher is not None and not str(self.distill_teacher).strip():
            raise ValueError("distill_teacher='' is empty; give a Hub id or a local path, or leave it out.")
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()

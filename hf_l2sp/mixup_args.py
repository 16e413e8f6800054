"""The `mixup_alpha` argument field and the check of it."""

import inspect
from dataclasses import dataclass, field
from typing import Any


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class MixupArguments:
    r"""The field that mix-up adds to any `TrainingArguments`; a dataclass mixin, put first.

    Args:
        mixup_alpha (`float`, defaults to `0.0`):
            The weight of a text in its blend is drawn from Beta(α, α). 0 switches mix-up off, and the run is that of
            the trainer without it bit for bit.

    Raises:
        ValueError: It is out of range.
    """

    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mix-up of input embeddings, with weights from Beta(α, α). 0 switches it off."}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.get_annotations(cls):  # a class with fields of its own needs the decorator
            dataclass(repr=False)(cls)

    def __post_init__(self) -> None:
        alpha = self.mixup_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"mixup_alpha={alpha!r} is a {type(alpha).__name__}, not a number.")
        # Below, both of the numbers that a draw from Beta is made of round to 0.
        if alpha != 0 and not 0.01 <= alpha < float("inf"):
            raise ValueError(f"mixup_alpha={alpha} is no α to draw weights with; give 0 (off), or 0.01 or above.")
        # As a float: hyperparameter search casts by `type(old)(value)`.
        self.mixup_alpha = float(alpha)
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()

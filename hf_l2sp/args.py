"""The `l2sp_*` argument fields and every check that can be made on them before a model is loaded."""

import inspect
import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .selection import checked_number, checked_patterns

# Optimizers that update weights inside backward: there is no moment between "all gradients are there" and "the
# step is taken" at which the gradient of the penalty could be added once.
BACKWARD_OPTIMIZERS = ("lomo", "layerwise")


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class L2SPArguments:
    r"""The fields that L2-SP adds to any `TrainingArguments`; a dataclass mixin.

    The objective per optimizer step is

        mean task loss + λ · Σ_i w_i ‖θ_i − θ0_i‖² + β ‖θ_new‖²

    without a factor ½ (the gradient of the penalty is 2·λ·w·(θ − θ0)). Li, Grandvalet and Davoine, 2018
    (arXiv 1802.01483) write α/2, so their α is 2·λ.

    Put it first: `class MyConfig(L2SPArguments, SFTConfig)`.

    While `l2sp_lambda` > 0 the inherited `weight_decay` acts only on parameters that have no anchor: a pull to zero
    and a pull to θ0 on the same weight contradict each other.

    > Parameters that control the strength of the penalty

    Args:
        l2sp_lambda (`float`, defaults to `0.01`):
            λ. 0 switches everything off: no anchor, no memory, the run is that of `Trainer` bit for bit.
        l2sp_schedule (`str`, defaults to `"constant"`):
            Course of λ over training: `constant`, or `linear` / `cosine` from λ to 0. `auto` finds λ from the training
            loss: next to 0 until the training examples are fitted better than what θ0 knows of their labels lets
            expect, then the larger the smaller the loss, up to the share of the labels' variance that θ0 explains,
            within 0.03 and 0.3. Unless θ0 knows nothing of them, or only its last layer does, this is let go over the
            first 0.6 of the steps. Where only the last layer of θ0 tells the classes apart, λ begins at up to 0.3 and
            falls to 0 over the first 0.8 of the steps, and where θ0 may as well tell nothing of them λ is never below
            0.03, both in trainings of more than 8 passes over the data. Where each word has a label it stays next to
            0. It takes no validation data, and whatever `l2sp_lambda` says, as long as it is not 0, does not enter.
        l2sp_mode (`str`, defaults to `"loss"`):
            `loss`: the penalty is part of the objective. `decoupled`: the optimizer step begins with
            θ ← θ − lr·2·λ·w·(θ − θ0) (and θ_new ← θ_new − lr·2·β·θ_new), as AdamW decays; it is neither clipped nor
            preconditioned, loss and gradients are those of the task, and λ is of another size than in `loss`: what
            counts is the sum of lr·2·λ over all steps. `l2sp_penalty` is logged all the same. Not with DeepSpeed,
            LoRA, schedule-free optimizers and `l2sp_schedule="auto"`.
        l2sp_beta (`float`, defaults to `0.0`):
            β, the weight of ‖θ_new‖² for trainable parameters that have no pretrained value (a new head). It is a
            λ of its own and is not multiplied by `l2sp_lambda`, but `l2sp_lambda` 0 switches it off too.

    > Parameters that control the anchor θ0

    Args:
        l2sp_anchor (`str`, *optional*):
            Hub id or local path of θ0. `None`: the weights of the model handed to the trainer, before any
            checkpoint is loaded into it.
        l2sp_anchor_revision (`str`, *optional*):
            Hub revision of θ0; needs `l2sp_anchor`.
        l2sp_anchor_dtype (`str`, defaults to `"auto"`):
            Storage of θ0: `auto` (that of the parameter, exact), `float32` or `bfloat16`. bfloat16 halves the memory
            of a float32 anchor, but its rounding is about as large as the drift of 30 training steps.
        l2sp_anchor_offload (`str`, defaults to `"none"`):
            Where θ0 lives: `none` (beside the parameter), `cpu` (pinned, streamed in chunks) or `disk` (mapped and
            not resident: from the model's own safetensors file where that holds it exactly, else from a file that
            is written once to `output_dir` and used again).

    > Parameters that control which parameters are pulled, and how much

    Args:
        l2sp_exclude (`list[str]`, *optional*):
            Regular expressions (`re.search` on the parameter's name) of parameters that are not pulled.
        l2sp_weights (`dict` or `str`, *optional*):
            w: a mapping (or its JSON) from regular expression to weight, or the path of a safetensors file with a
            tensor per parameter (a diagonal Fisher). The first pattern that matches decides, 1 where none does;
            a pattern that matches no parameter is an error.
        l2sp_fisher_samples (`int`, defaults to `0`):
            If > 0, w is the diagonal Fisher information of the task, estimated on that many training examples (with
            the loss of the model, and with its weights before the first step) and divided by its mean, so that λ
            keeps its size. It takes as much memory as the trainable weights in float32, and is kept as
            `l2sp_fisher.safetensors` in `output_dir` and in every checkpoint. Not together with `l2sp_weights`, and
            not with sharded models, LoRA and data sets without a length.

    > Parameters that control logging

    Args:
        l2sp_log_layers (`bool`, defaults to `False`):
            Also log `l2sp_drift/<layer>`, the relative drift of every layer.

    Raises:
        ValueError: A value is out of range or contradicts another one.
    """

    l2sp_lambda: float = field(
        default=0.01,
        metadata={
            "help": "Strength λ of the penalty λ·Σ w‖θ−θ0‖² (no ½). 0 switches L2-SP off. While it is > 0, "
            "weight_decay acts only on parameters without an anchor."
        },
    )
    l2sp_schedule: Literal["constant", "linear", "cosine", "auto"] = field(
        default="constant",
        metadata={
            "help": "Course of λ: constant, or linear/cosine from λ to 0 over training, or auto: found "
            "from the training loss."
        },
    )
    l2sp_mode: Literal["loss", "decoupled"] = field(
        default="loss",
        metadata={
            "help": "loss: the penalty is part of the objective. decoupled: the optimizer step pulls, as AdamW decays."
        },
    )
    l2sp_beta: float = field(
        default=0.0,
        metadata={"help": "Weight of ‖θ_new‖² for trainable parameters without a pretrained value, e.g. a new head."},
    )
    l2sp_anchor: str | None = field(
        default=None,
        metadata={"help": "Hub id or local path of θ0; default: the model handed to the trainer."},
    )
    l2sp_anchor_revision: str | None = field(
        default=None,
        metadata={"help": "Hub revision of θ0 (with l2sp_anchor)."},
    )
    l2sp_anchor_dtype: Literal["float32", "bfloat16", "auto"] = field(
        default="auto",
        metadata={"help": "Storage of θ0: auto (dtype of the parameter), float32 or bfloat16."},
    )
    l2sp_anchor_offload: Literal["none", "cpu", "disk"] = field(
        default="none",
        metadata={
            "help": "Where θ0 lives: none (beside the parameter), cpu (streamed) or disk (mapped, not resident)."
        },
    )
    l2sp_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions of parameters that are not pulled to θ0."},
    )
    # A bare `dict`: the argument parser cannot test `None` against a parametrised generic.
    l2sp_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Weights w: JSON {"regular expression": weight}, or a safetensors file with one tensor each.'
        },
    )
    l2sp_fisher_samples: int = field(
        default=0,
        metadata={"help": "Training examples on which the Fisher information is estimated before training, as w."},
    )
    l2sp_log_layers: bool = field(
        default=False,
        metadata={"help": "Also log l2sp_drift/<layer> for every layer."},
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `class MyConfig(L2SPArguments, SFTConfig): ...` needs no decorator; one with fields of its own does, as ever.
        if not inspect.get_annotations(cls):
            dataclass(repr=False)(cls)

    def __post_init__(self) -> None:
        self._check_l2sp_strength()
        self._check_l2sp_anchor()
        self._check_l2sp_selection()
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()
        # `optim` is an enum only after the inherited checks.
        optimizer = getattr(self, "optim", "")
        optimizer = getattr(optimizer, "value", optimizer)
        if self.l2sp_lambda > 0 and any(word in str(optimizer) for word in BACKWARD_OPTIMIZERS):
            raise ValueError(
                f"optim={optimizer!r} updates the weights inside the backward pass, before the gradient of the L2-SP "
                "penalty can be added. Use another optimizer (adamw_torch, say) or l2sp_lambda=0."
            )
        if self.l2sp_lambda > 0 and self.l2sp_mode == "decoupled" and "schedule_free" in str(optimizer):
            raise ValueError(
                f"optim={optimizer!r} computes each step from averages of its own, which l2sp_mode='decoupled' cannot "
                "pull. Set l2sp_mode='loss' or another optimizer."
            )

    def _check_l2sp_strength(self) -> None:
        for name in ("l2sp_lambda", "l2sp_beta"):
            # As a float: hyperparameter search casts by `type(old)(value)` and would turn every λ below 1 into 0.
            setattr(self, name, checked_number(name, getattr(self, name)))
        if self.l2sp_beta > 0 and self.l2sp_lambda == 0:
            raise ValueError(
                f"l2sp_beta={self.l2sp_beta} has no effect with l2sp_lambda=0, which switches everything off. Set "
                "l2sp_lambda > 0, or l2sp_beta=0 and weight_decay instead."
            )
        if self.l2sp_schedule == "auto" and self.l2sp_lambda == 0:
            raise ValueError(
                "l2sp_schedule='auto' has no effect with l2sp_lambda=0, which switches everything off. Leave "
                "l2sp_lambda at its default: auto finds its own, whatever the start."
            )
        for name in ("l2sp_schedule", "l2sp_mode"):
            self._check_l2sp_choice(name)
        if self.l2sp_mode == "decoupled" and self.l2sp_schedule == "auto":
            raise ValueError(
                "l2sp_schedule='auto' finds λ in units of the loss, but l2sp_mode='decoupled' has another λ. Set "
                "l2sp_mode='loss', or another schedule."
            )

    def _check_l2sp_anchor(self) -> None:
        for name in ("l2sp_anchor_dtype", "l2sp_anchor_offload"):
            self._check_l2sp_choice(name)
        if self.l2sp_anchor is not None and not str(self.l2sp_anchor).strip():
            raise ValueError("l2sp_anchor='' is empty; give a Hub id or a local path, or leave it out.")
        if self.l2sp_anchor_revision is not None and self.l2sp_anchor is None:
            raise ValueError(
                f"l2sp_anchor_revision={self.l2sp_anchor_revision!r} needs l2sp_anchor: without it θ0 is the model "
                "that the trainer is given, whatever its revision."
            )

    def _check_l2sp_choice(self, name: str) -> None:
        value = getattr(self, name)
        (annotation,) = (f.type for f in fields(L2SPArguments) if f.name == name)
        allowed = annotation.__args__  # type: ignore[union-attr]
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}.")

    def _check_l2sp_selection(self) -> None:
        samples = self.l2sp_fisher_samples
        if type(samples) is not int or samples < 0:
            raise ValueError(f"l2sp_fisher_samples={samples!r} is not a whole number >= 0; use 0 to switch it off.")
        if samples and self.l2sp_weights is not None:
            raise ValueError(
                f"l2sp_fisher_samples={samples} and l2sp_weights both say what w is. Leave one of them out."
            )
        if samples and self.l2sp_lambda == 0:
            raise ValueError(
                f"l2sp_fisher_samples={samples} has no effect with l2sp_lambda=0, which switches everything off. Set "
                "l2sp_lambda > 0, or l2sp_fisher_samples=0."
            )
        if self.l2sp_exclude is not None:
            self.l2sp_exclude = checked_patterns("l2sp_exclude", self.l2sp_exclude)
        if isinstance(self.l2sp_weights, str) and self.l2sp_weights.lstrip().startswith("{"):
            try:
                self.l2sp_weights = json.loads(self.l2sp_weights)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"l2sp_weights={self.l2sp_weights!r} is not valid JSON ({error}); write it as "
                    '{"regular expression": weight}.'
                ) from None
        if isinstance(self.l2sp_weights, dict):
            checked_patterns("l2sp_weights", list(self.l2sp_weights))
            self.l2sp_weights = {p: checked_number(f"l2sp_weights[{p!r}]", w) for p, w in self.l2sp_weights.items()}
        elif self.l2sp_weights is not None and not isinstance(self.l2sp_weights, str):
            raise ValueError(
                f"l2sp_weights is a {type(self.l2sp_weights).__name__}; give a dict of regular expression to weight, "
                "its JSON, or the path of a safetensors file."
            )


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class L2SPTrainingArguments(L2SPArguments, TrainingArguments):
    __doc__ = (L2SPArguments.__doc__ or "").replace(
        "The fields that L2-SP adds to any `TrainingArguments`; a dataclass mixin.",
        "`transformers.TrainingArguments` with the fields of L2-SP. No inherited default differs.",
    )


@dataclass(repr=False)  # that of TrainingArguments hides tokens
class L2SPSeq2SeqTrainingArguments(L2SPArguments, Seq2SeqTrainingArguments):
    __doc__ = (L2SPArguments.__doc__ or "").replace(
        "The fields that L2-SP adds to any `TrainingArguments`; a dataclass mixin.",
        "`transformers.Seq2SeqTrainingArguments` with the fields of L2-SP. No inherited default differs.",
    )

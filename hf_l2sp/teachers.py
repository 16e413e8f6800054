"""Teachers of a distillation: loaded, checked against the student, asked for their logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils.hub import cached_file

from .naming import unwrap, without_adapters

_SHOWN = 5  # names in an error
_CLASSES = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}


class Teachers:
    """One or more models in evaluation mode that give logits in the student's order of labels.

    They keep their dtype and are moved to the device of the student's logits when they are first asked. Nothing of
    them is part of the student: no optimizer, checkpoint or anchor sees them.

    Args:
        models: The teachers.
        names: The student's labels, in its order.

    Raises:
        ValueError: A teacher has other labels, or its weights are sharded by DeepSpeed.
    """

    def __init__(self, models: Sequence[nn.Module], names: Sequence[str]) -> None:
        self.models = list(models)
        self._orders = [label_order(model, names) for model in models]
        for model in models:
            if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
                raise ValueError(
                    f"The weights of the teacher {type(model).__name__} are sharded by DeepSpeed ZeRO-3, which does "
                    "not manage it. Compute its logits before, in a process of their own, with cache_teacher_logits."
                )
        self._accepted = [_accepted(model) for model in models]

    def accept(self, name: str) -> bool:
        """Whether the forward of a teacher takes that input."""
        return any(accepted is None or name in accepted for accepted in self._accepted)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any], device: torch.device) -> Tensor:
        """The logits of every teacher, at least in float32.

        Args:
            inputs: The student's inputs; labels, and what a teacher's forward does not take, are left out.
            device: Where the logits are wanted.

        Shape:
            `(*, teachers, labels)`; `*` are the batch and, for tokens, the positions.
        """
        found = []
        for model, order, accepted in zip(self.models, self._orders, self._accepted, strict=True):
            _place(model, device)
            model.eval()  # also where another trainer has trained it meanwhile
            taken = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in inputs.items()
                if name != "labels" and (accepted is None or name in accepted)
            }
            # In its own precision, whatever the student's: cached logits are then the same.
            with torch.autocast(device.type, enabled=False):
                logits = model(**taken).logits
            logits = logits.to(device=device, dtype=torch.promote_types(logits.dtype, torch.float32))
            found.append(logits if order is None else logits.index_select(-1, order.to(device)))
        return torch.stack(found, dim=-2)


def _accepted(model: nn.Module) -> set[str] | None:
    names = set(inspect.signature(unwrap(model).forward).parameters)
    return names if "input_ids" in names else None  # a wrapper that hands on whatever it gets


def _place(model: Any, device: torch.device) -> None:
    # Quantized models and those over several devices are where they belong.
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return
    if next(model.parameters()).device != device:
        model.to(device)


def label_names(id2label: Mapping[Any, str]) -> list[str]:
    """The labels in order of their numbers."""
    return [id2label[key] for key in sorted(id2label, key=int)]


def label_order(teacher: Any, names: Sequence[str]) -> Tensor | None:
    """Where the teacher has the student's labels; `None` if in the same order.

    Raises:
        ValueError: The labels have other names, or several have the same one.
    """
    theirs = label_names(teacher.config.id2label)
    if theirs == list(names):
        return None
    if sorted(theirs) == sorted(names) and len(set(names)) == len(names):
        return torch.tensor([theirs.index(name) for name in names])
    only_teacher = [name for name in theirs if name not in names]
    only_student = [name for name in names if name not in theirs]
    raise ValueError(
        f"The teacher {type(teacher).__name__} has {len(theirs)} labels and the student {len(names)}, and they are "
        f"matched by name: only the teacher has {_listed(only_teacher)}, only the student {_listed(only_student)}. "
        "Set config.id2label and config.label2id of both, or id2label in from_pretrained, to the same names."
    )


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return "none" if not names else ", ".join(map(repr, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def load_teacher(source: str, student: nn.Module) -> nn.Module:
    """The model of that Hub id or folder, for the student's task, in the dtype that it was saved in.

    Raises:
        ValueError: The student's task is not a classification, there is no such model, or it has no trained head.
    """
    kind = type(without_adapters(student)).__name__
    auto = next((auto for suffix, auto in _CLASSES.items() if kind.endswith(suffix)), None)
    if auto is None:
        raise ValueError(
            f"distill_teacher={source!r} cannot be loaded for a {kind}, whose task its name does not tell. Load the "
            "teacher yourself and give it to the trainer: teacher=model."
        )
    try:
        model: nn.Module
        model, found = auto.from_pretrained(source, dtype="auto", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"distill_teacher={source!r} could not be loaded ({error}). Give the folder of a saved model, or "
            "the id of one on the Hub."
        ) from error
    untrained = sorted(found["missing_keys"])
    if untrained:
        raise ValueError(
            f"distill_teacher={source!r} has no weights for {_listed(untrained)}: it was not trained as "
            f"{type(model).__name__} and cannot teach. Fine-tune it first."
        )
    return model


def find_tokenizer(name: str, local_files_only: bool) -> Any:
    """The tokenizer saved under that Hub id or folder; `None` if there is none."""
    if not name:
        return None
    try:
        # Without it AutoTokenizer may make up an empty tokenizer from the model's config.
        cached_file(name, "tokenizer_config.json", local_files_only=local_files_only)
        return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
    except (OSError, ValueError):
        return None


def check_student(student: Any) -> None:
    """Raises `ValueError` unless it classifies by one label."""
    config = getattr(student, "config", None)
    problem = getattr(config, "problem_type", None)
    if getattr(config, "id2label", None) is None or len(config.id2label) < 2:  # type: ignore[union-attr]
        raise ValueError(
            f"{type(student).__name__} is not a classification model of transformers with two labels or more, which "
            "distillation is for. Use distill_alpha=0."
        )
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"The student's config.problem_type={problem!r}; distillation compares the probabilities of labels that "
            "exclude each other (single_label_classification). Use distill_alpha=0."
        )


def check_teacher(teacher: Any, tokenizer: Any, student: Any, student_tokenizer: Any) -> str | None:
    """Raises `ValueError` for a teacher that training the student would change, or that reads other input ids.

    Returns:
        What could not be checked, for a warning.
    """
    shared = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in shared for parameter in teacher.parameters()):
        raise ValueError(
            f"The teacher {type(teacher).__name__} shares weights with the student, which training changes. Give a "
            "copy: teacher=copy.deepcopy(model)."
        )
    if tokenizer is None:
        tokenizer = find_tokenizer(getattr(teacher, "name_or_path", ""), local_files_only=True)
    return _check_vocabulary(teacher, tokenizer, student, student_tokenizer)


def _check_vocabulary(teacher: Any, teacher_tokenizer: Any, student: Any, student_tokenizer: Any) -> str | None:
    cure = (
        "Take a teacher with the student's tokenizer, or tokenize the data for the teacher, compute its logits with "
        "cache_teacher_logits and train on the student's data with that column."
    )
    theirs, ours = _vocabulary(teacher_tokenizer), _vocabulary(student_tokenizer)
    if theirs is not None and ours is not None:
        other = sorted((token for token in ours if theirs.get(token) != ours[token]), key=ours.__getitem__)
        if other:
            raise ValueError(
                f"The teacher {type(teacher).__name__} has another vocabulary: {len(other)} of the student's "
                f"{len(ours)} tokens have another number there or none ({_listed(other)}), so it would read the "
                f"student's input ids as another text. {cure}"
            )
        return None
    sizes = [getattr(model.config, "vocab_size", None) for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The teacher {type(teacher).__name__} has a vocabulary of {sizes[0]} and the student of {sizes[1]}, so "
            f"it would read the student's input ids as another text. {cure}"
        )
    return (
        f"The vocabularies of the teacher {type(teacher).__name__} and of the student have the same size; whether "
        "they are the same is not known. Give the trainer processing_class=tokenizer and teacher_tokenizer=tokenizer "
        "to have them compared."
    )


def _vocabulary(tokenizer: Any) -> dict[str, int] | None:
    get_vocab = getattr(getattr(tokenizer, "tokenizer", tokenizer), "get_vocab", None)
    return None if get_vocab is None else get_vocab()

"""Tiny students, teachers and data of a distillation; a float64 reference of its objective."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_l2sp import L2SPMixin, L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.distill import (
    DistillationArguments,
    DistillationMixin,
    L2SPDistillationArguments,
    L2SPDistillationTrainer,
)

NAMES = ["low", "mid", "high"]
# Of three updates an epoch. Trainer of transformers 4 goes on with other rows in the middle of a later epoch.
RESUMED_FROM = 3 if transformers.__version__.startswith("4.") else 4
MODELS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification}


class DistillTrainer(DistillationMixin, Trainer): ...


class Arguments(DistillationArguments, TrainingArguments): ...


def make_model(
    task: str, seed: int, names: Sequence[str] = NAMES, dropout: float = 0.0, **changes: Any
) -> PreTrainedModel:
    set_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        initializer_range=0.3,  # logits that differ
    )
    config.update(changes)
    return MODELS[task](config)


def make_tokenizer(folder: Path, words: int = 55, **changes: Any) -> BertTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(words))]))
    return BertTokenizerFast(str(file), **changes)


def make_data(task: str, rows: int = 8, unlabelled: Sequence[int] = (), seed: int = 4) -> datasets.Dataset:
    """Rows of 4 to 9 tokens; for tokens the first and last have no label, as special tokens have none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(top: int, size: int) -> list[int]:
        return torch.randint(5 if top > 5 else 0, top, (size,), generator=generator).tolist()

    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in range(rows):
        length = 4 + draw(5, 1)[0] + row % 2
        columns["input_ids"].append([2, *draw(60, length - 2), 3])
        columns["attention_mask"].append([1] * length)
        if task == "sequence":
            columns["labels"].append(-100 if row in unlabelled else draw(3, 1)[0])
        else:
            columns["labels"].append(
                [-100, *([-100] * (length - 2) if row in unlabelled else draw(3, length - 2)), -100]
            )
    return datasets.Dataset.from_dict(columns)


def make_collator(task: str, tokenizer: Any) -> Any:
    cls = DataCollatorWithPadding if task == "sequence" else DataCollatorForTokenClassification
    # BERT counts positions from the left, so what it says of a row padded there depends on the padding.
    return cls(tokenizer) if tokenizer.padding_side == "right" else cls(tokenizer, padding="max_length", max_length=12)


def make_setup(
    tokenizer: Any, task: str, teachers: int = 1, rows: int = 8, unlabelled: Sequence[int] = (), **changes: Any
) -> tuple[nn.Module, list[nn.Module], datasets.Dataset, Any]:
    """Student, teachers, data and collator of one task, in float64."""
    student = make_model(task, seed=1, **changes).double()
    models = [make_model(task, seed=2 + n).double() for n in range(teachers)]
    return student, models, make_data(task, rows, unlabelled), make_collator(task, tokenizer)


@dataclass
class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    steps: list[dict[str, Tensor]]

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        def keep(*_: Any) -> None:
            named = model.named_parameters()
            self.steps.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})

        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(keep)


def build(
    folder: Path,
    student: nn.Module,
    data: Any,
    *,
    cls: type[Trainer] = DistillTrainer,
    tokenizer: Any = None,
    collator: Any = None,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        **arguments,
    }
    if not issubclass(cls, L2SPMixin):
        settings = {name: value for name, value in settings.items() if not name.startswith("l2sp_")}
    if not issubclass(cls, DistillationMixin):
        settings = {name: value for name, value in settings.items() if not name.startswith("distill_")}
    configs = {
        DistillTrainer: Arguments,
        L2SPDistillationTrainer: L2SPDistillationArguments,
        L2SPTrainer: L2SPTrainingArguments,
        Trainer: TrainingArguments,
    }
    return cls(
        model=student,
        args=configs[cls](**settings),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[Gradients([])],
        **(trainer or {}),
    )


def gradients_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))
    return callback.steps


def reference(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: datasets.Dataset,
    alpha: float,
    temperature: float,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Both terms over all rows, row by row, item by item, in float64: (1 − α)·task and α·T²·KL."""
    task, kl = [], []
    for row in data:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            seen = [teacher(**inputs).logits[0].double() for teacher in teachers]
        logits = student(**inputs).logits[0].double()
        labels = row["labels"] if isinstance(row["labels"], list) else [row["labels"]]
        logits, seen = logits.reshape(len(labels), -1), [one.reshape(len(labels), -1) for one in seen]
        for place, label in enumerate(labels):
            log_q = logits[place].log_softmax(-1)
            if label != -100:
                task.append(-(1 - smoothing) * log_q[label] - smoothing * log_q.mean())
            if label != -100 or set(labels) == {-100}:
                p = sum((one[place] / temperature).softmax(-1) for one in seen) / len(seen)
                q = (logits[place] / temperature).softmax(-1)
                kl.append(sum(p[c] * (p[c] / q[c]).log() for c in range(len(p))))
    of_task = sum(task) / len(task) if task else torch.zeros(())
    return (1 - alpha) * of_task, alpha * temperature**2 * sum(kl) / len(kl)


def gradient(
    folder: Path, student: nn.Module, data: Any, tokenizer: Any, task: str = "sequence", **trainer: Any
) -> dict[str, Tensor]:
    """Of one step over all rows."""
    built = build(
        folder,
        student,
        data,
        tokenizer=tokenizer,
        collator=make_collator(task, tokenizer),
        trainer=trainer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    built.train()
    return gradients_of(built)[0]


def permuted(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """The same teacher with its labels in another order."""
    other = copy.deepcopy(model)
    order = [NAMES.index(name) for name in names]
    with torch.no_grad():
        other.classifier.weight.copy_(model.classifier.weight[order])
        other.classifier.bias.copy_(model.classifier.bias[order])
    other.config.id2label = dict(enumerate(names))
    return other


def gradient_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys(), set(got) ^ set(expected)
    error = sum((got[n].double() - expected[n].double()).square().sum().item() for n in got)
    return (error / sum(expected[n].double().square().sum().item() for n in got)) ** 0.5

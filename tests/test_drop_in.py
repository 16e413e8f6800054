"""What people rely on in Trainer holds with L2SPTrainer: bit for bit at λ = 0, and with keys of its own at a small λ.

The behaviours are those of Hugging Face's own Trainer tests; accumulation, clipping, bfloat16, loss scaling, the best
checkpoint, auto_find_batch_size, `model_init` and killed runs are in exactness/.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback

from .drop_in import L2SP_KEYS, Case, Outcome, all_finite, run, same, train, without_measurements


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class BatchedAccuracy:
    """Adds up over batches, as `batch_eval_metrics` wants it."""

    def __init__(self) -> None:
        self.hits: list[float] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        self.hits += (prediction.predictions.argmax(-1) == prediction.label_ids).float().tolist()
        return {"accuracy": sum(self.hits) / len(self.hits)} if compute_result else {}


class Stream(IterableDataset):
    """Examples of different lengths without a length of its own."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __iter__(self):
        for index in range(self.count):
            yield {"input_ids": torch.full((6,), 1 + index), "labels": torch.tensor(index % 3)}


def ragged(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1 + i % 90] * (3 + i % 5), "labels": i % 3} for i in range(count)]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor([[i < len(row["input_ids"]) for i in range(longest)] for row in rows]).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def table(count: int = 24) -> datasets.Dataset:
    """A table with a column that the model does not take."""
    rows = {"input_ids": [[1 + i % 90] * 6 for i in range(count)], "label": [i % 3 for i in range(count)]}
    return datasets.Dataset.from_dict({**rows, "comment": ["nothing"] * count})


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = control.should_evaluate = control.should_log = True


class OwnLoss:
    """As in many scripts: a loss of one's own, by overriding `compute_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


class OwnBatches:
    def get_train_dataloader(self):
        batches = list(super().get_train_dataloader())
        return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)


def evaluations(trainer: Any) -> Any:
    trainer.train()
    prediction = trainer.predict(trainer.eval_dataset)
    return (
        without_measurements(trainer.evaluate()),
        without_measurements(trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")),
        prediction.predictions,
        prediction.label_ids,
        without_measurements(prediction.metrics),
    )


def resumed(trainer: Any) -> Any:
    trainer.train()
    result = trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    return result.training_loss, result.global_step


def trained_twice(trainer: Any) -> Any:
    return train(trainer), train(trainer)


def inspected(trainer: Any) -> Any:
    """What tells of the trainer without training."""
    trainer.create_optimizer_and_scheduler(5)
    group = trainer.get_optimizer_group(next(trainer.model.parameters()))
    return (
        trainer.get_num_trainable_parameters(),
        trainer.get_learning_rates(),
        len(group["params"]),
        trainer.num_examples(trainer.get_train_dataloader()),
        trainer.is_world_process_zero(),
        [[name for name, p in trainer.model.named_parameters() if p is q] for q in group["params"]],
    )


def saved(trainer: Any) -> Any:
    result = trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", {"loss": 1.0})
    trainer.log_metrics("train", without_measurements(result.metrics))
    trainer.create_model_card(model_name="mine", tags="medical")
    return without_measurements(result.metrics)


class NanOnce:
    """Reports a loss of NaN for the second step, as a fluke of half precision would."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss


class OwnOptimizer:
    def create_optimizer(self, *args: Any, **kwargs: Any):
        head = [p for n, p in self.model.named_parameters() if n.startswith("classifier")]
        body = [p for n, p in self.model.named_parameters() if not n.startswith("classifier")]
        self.optimizer = torch.optim.SGD([{"params": head, "lr": 0.1}, {"params": body}], lr=0.01, momentum=0.9)
        return self.optimizer


def freeze(model: nn.Module) -> None:
    model.bert.embeddings.requires_grad_(False)


EVAL = {"eval_strategy": "steps", "eval_steps": 1}
CASES = {
    "early stopping": Case(
        {
            **EVAL,
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "max_steps": 12,
        },
        lambda: {"compute_metrics": accuracy, "callbacks": [EarlyStoppingCallback(2)]},
    ),
    "callback that stops": Case({**EVAL, "save_steps": 100}, lambda: {"callbacks": [StopAt(3)]}),
    "epochs, and what is left over of a batch": Case(
        {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 5, "save_strategy": "epoch"}
    ),
    "last batch dropped": Case(
        {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5, "dataloader_drop_last": True}
    ),
    "stream without a length": Case(
        act=evaluations, trainer=lambda: {"train_dataset": Stream(), "eval_dataset": Stream(7)}
    ),
    "stream shorter than max_steps": Case({"max_steps": 9}, lambda: {"train_dataset": Stream(12)}),
    "table with a column to drop": Case(
        act=evaluations, trainer=lambda: {"train_dataset": table(), "eval_dataset": table(7)}
    ),
    "dynamic shapes": Case(
        EVAL,
        lambda: {"train_dataset": ragged(24), "eval_dataset": ragged(7), "data_collator": padded},
        evaluations,
    ),
    "grouped by length": Case(
        {"group_by_length": True, "train_sampling_strategy": "group_by_length"},
        lambda: {"train_dataset": ragged(24), "eval_dataset": ragged(7), "data_collator": padded},
    ),
    "several evaluation sets": Case(EVAL, lambda: {"eval_dataset": {"one": table(4), "two": table(5)}}),
    "metrics": Case(EVAL, lambda: {"compute_metrics": accuracy}, evaluations),
    "metrics by batch": Case(
        {**EVAL, "batch_eval_metrics": True}, lambda: {"compute_metrics": BatchedAccuracy()}, evaluations
    ),
    "predictions moved to the host": Case(
        {**EVAL, "eval_accumulation_steps": 1, "eval_on_start": True, "eval_delay": 2},
        lambda: {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        evaluations,
    ),
    "loss only": Case({**EVAL, "prediction_loss_only": True}, act=evaluations),
    "label smoothing": Case({**EVAL, "label_smoothing_factor": 0.1}),
    "checkpoint rotation": Case({"save_steps": 1, "save_total_limit": 2}, act=saved),
    "model only": Case({"save_only_model": True}, act=saved),
    "resume": Case({"restore_callback_states_from_checkpoint": True}, act=resumed),
    "resume without skipping data": Case({"ignore_data_skip": True}, act=resumed),
    "resume with frozen parameters": Case(act=resumed, prepare=freeze),
    "trained twice": Case(act=trained_twice),
    "gradient checkpointing": Case(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ),
    "neftune": Case({"neftune_noise_alpha": 0.4}),
    "NaN left out of the logs": Case({"logging_steps": 4, "logging_nan_inf_filter": True}, bases=(NanOnce,)),
    "NaN in the logs": Case({"logging_steps": 4, "logging_nan_inf_filter": False}, bases=(NanOnce,)),
    "first step logged": Case({"logging_first_step": True, "logging_steps": 3}),
    "no logs": Case({"logging_strategy": "no", "save_strategy": "no"}),
    "plateau": Case({**EVAL, "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}),
    "cosine with a floor": Case(
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "warmup_steps": 2}
    ),
    "adafactor": Case({"optim": "adafactor"}),
    "sgd with weight decay": Case({"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1}),
    "optimizer of one's own": Case(bases=(OwnOptimizer,)),
    "loss of one's own": Case(EVAL, bases=(OwnLoss,)),
    "batches of one's own": Case(bases=(OwnBatches,)),
    "memory and tokens counted": Case(
        {"skip_memory_metrics": False, "include_num_input_tokens_seen": True}, act=saved
    ),
    "worker processes": Case({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, act=evaluations),
    "looked at": Case(act=inspected),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def plain(case, tiny_bert_dir, classification_data, tmp_path_factory) -> Outcome:
    return run(case, None, tiny_bert_dir, classification_data, tmp_path_factory.mktemp("plain"))


def test_lambda_zero_is_trainer(case, plain, tiny_bert_dir, classification_data, tmp_path):
    zero = run(case, 0.0, tiny_bert_dir, classification_data, tmp_path)
    assert zero.trainer.l2sp_anchor is None
    assert zero.events == plain.events
    assert same(zero.logs, plain.logs)
    assert zero.files == plain.files
    assert same(zero.returned, plain.returned)
    assert same(zero.weights, plain.weights)
    assert same(zero.optimizer, plain.optimizer)
    assert same(zero.random, plain.random)
    for name in ("global_step", "epoch", "max_steps", "total_flos", "num_input_tokens_seen", "best_metric"):
        assert getattr(zero.trainer.state, name) == getattr(plain.trainer.state, name), name


def test_small_lambda_adds_its_keys_and_its_file_only(case, plain, tiny_bert_dir, classification_data, tmp_path):
    small = run(case, 1e-3, tiny_bert_dir, classification_data, tmp_path)
    assert small.trainer.l2sp_anchor is not None
    assert all_finite(small.weights)
    assert small.events == plain.events
    for entry, other in zip(small.logs, plain.logs, strict=True):
        assert entry.keys() == other.keys() | (L2SP_KEYS if "loss" in other else set())
        if "loss" in entry and not math.isnan(entry["loss"]):
            assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["l2sp_penalty"])
    trained = [entry["l2sp_distance"] for entry in small.logs if "l2sp_distance" in entry]
    assert not trained or trained[-1] > 0
    expected = {
        folder: sorted([*names, "l2sp_state.json"]) if "model.safetensors" in names else names
        for folder, names in plain.files.items()
    }
    if "README.md" in expected.get(".", ()):  # the final card shows the drift
        expected["."] = sorted([*expected["."], "l2sp_report.json", "l2sp_report.png"])
    assert small.files == expected

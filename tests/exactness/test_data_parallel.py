"""Two devices in one process (DataParallel) see the gradient and the logs of one device with the batches of both.

On a CPU nn.DataParallel hands everything to its module; here it is given its two halves of the batch, as two devices
would be. Trainer, told that it has two, goes all its ways for several: batches twice as large, the wrapped model, the
number of items for each device, the mean over the devices' losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments, drift_report, l2sp_penalty

from .harness import Recorder, Reference, relative_error, snapshot

LAM, BETA = 0.3, 0.7


class TwoHalves(nn.DataParallel):
    """The module over each half of the batch, and their losses side by side."""

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        halves = zip(*(value.chunk(2) for value in inputs.values()), strict=True)
        found = [self.module(**dict(zip(inputs, half, strict=True))) for half in halves]
        assert len(found) == 2
        return {"loss": torch.stack([f["loss"] for f in found]), "logits": torch.cat([f["logits"] for f in found])}


@pytest.fixture
def classifier_of(tiny_bert_dir) -> Callable[[], PreTrainedModel]:
    def make():
        torch.manual_seed(3)
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, **without)
        model.accepts_loss_kwargs = False
        return model

    return make


@pytest.fixture
def language_model_of(tiny_llama_dir) -> Callable[[], PreTrainedModel]:
    return lambda: LlamaForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.fixture
def ragged(language_data) -> list[dict[str, Tensor]]:
    """Sequences whose labels begin late, each at another token."""
    rows = [{key: value.clone() for key, value in row.items()} for row in language_data]
    for index, row in enumerate(rows):
        row["labels"][: index % 5] = -100
    return rows


def trained(model: PreTrainedModel, data: Any, output: Path, devices: int, **arguments: Any):
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4 // devices,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "l2sp_lambda": LAM,
        "l2sp_beta": BETA,
    }
    args = L2SPTrainingArguments(**settings | arguments)
    assert args.n_gpu < 2
    args._n_gpu = devices
    recorder = Recorder()
    trainer = L2SPTrainer(model=model, args=args, train_dataset=data, callbacks=[recorder])
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_gradient_and_logs_are_those_of_one_device(
    kind, accumulation, classifier_of, language_model_of, classification_data, ragged, tmp_path, monkeypatch
):
    make, data = (classifier_of, classification_data) if kind == "classifier" else (language_model_of, ragged)
    options = {"gradient_accumulation_steps": accumulation}
    single, one = trained(make(), data, tmp_path / "1", 1, **options)
    monkeypatch.setattr(nn, "DataParallel", TwoHalves)
    double, two = trained(make(), data, tmp_path / "2", 2, **options)
    assert isinstance(double.model_wrapped, TwoHalves) and double.model_wrapped.module is double.model
    assert single.model_wrapped is single.model
    assert len(two.gradients) == len(one.gradients) == len(data) // 4 // accumulation
    head = tuple(name for name, _ in double.model.named_parameters() if name.startswith("classifier"))
    reference = Reference(snapshot(make()), LAM, beta=BETA, new=head)
    logs, others = ([log for log in t.state.log_history if "loss" in log] for t in (double, single))
    for step, (got, expected, weights) in enumerate(zip(two.gradients, one.gradients, two.weights, strict=True)):
        assert relative_error(got, expected) < 1e-5
        # The pull is a part of it that would be missed.
        pull = {name: reference.pull(name, weights[name], step, 6) for name in got}
        assert relative_error({n: got[n].double() - pull[n] for n in got}, got) > 0.1
        penalty = reference.penalty(weights, set(got), step, 6)
        assert logs[step]["l2sp_penalty"] == pytest.approx(penalty, rel=1e-5)
        assert logs[step]["loss"] == pytest.approx(logs[step]["task_loss"] + penalty, rel=1e-5)
        assert logs[step] == pytest.approx(others[step], rel=1e-5)


def test_head_that_ignores_the_number_of_items_is_told(
    classifier_of, classification_data, tmp_path, monkeypatch, warnings_of_library
):
    """Its task gradient is twice that of one device: Trainer multiplies the mean of both losses by two."""
    if "kwargs" not in inspect.signature(BertForSequenceClassification.forward).parameters:
        pytest.skip("the heads of transformers 4 take no loss arguments")
    gradients = []
    for devices in (1, 2):
        monkeypatch.setattr(nn, "DataParallel", TwoHalves)
        model = classifier_of()
        model.accepts_loss_kwargs = True
        trainer, recorder = trained(model, classification_data, tmp_path, devices, l2sp_lambda=1e-9, l2sp_beta=0.0)
        gradients.append(recorder.gradients[0])
        told = any("is 2 times too large with gradient_accumulation_steps=1 on 2" in m for m in warnings_of_library)
        assert told == (devices == 2)
    assert relative_error(gradients[1], {name: 2 * grad for name, grad in gradients[0].items()}) < 1e-5


def test_loss_outside_of_a_step(classifier_of, classification_data, tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "DataParallel", TwoHalves)
    trainer, _ = trained(classifier_of(), classification_data, tmp_path, 2)
    batch = {key: torch.stack([row[key] for row in classification_data[:4]]) for key in classification_data[0]}
    with torch.no_grad():
        task = trainer.compute_loss(trainer.model_wrapped.eval(), dict(batch)).mean()
        objective = trainer.compute_loss(trainer.model_wrapped.train(), dict(batch)).mean()
    origin = snapshot(classifier_of())
    head = ("classifier.weight", "classifier.bias")
    expected = Reference(origin, LAM, beta=BETA, new=head).penalty(snapshot(trainer.model), set(origin), 0, 1)
    assert float(objective - task) == pytest.approx(expected, rel=1e-4) and expected > 0.01


def test_anchor_of_a_wrapped_model(classifier_of, move):
    model = classifier_of()
    wrapped = nn.DataParallel(model)
    anchor = Anchor.from_model(wrapped)
    assert list(anchor) == list(Anchor.from_model(model))
    move(model)
    assert torch.equal(l2sp_penalty(wrapped, anchor), l2sp_penalty(model, anchor))
    assert drift_report(wrapped, anchor).total.distance > 0

"""The objective of a distillation: against a float64 reference, under accumulation, beside L2-SP, and switched off."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_l2sp import L2SPTrainer, l2sp_penalty
from hf_l2sp.distill import (
    L2SPDistillationTrainer,
)

from .distill_worker import TASKS, loss_logs, train_for_comparison
from .distillation import (
    DistillTrainer,
    build,
    gradient_of,
    gradients_of,
    make_collator,
    make_data,
    make_model,
    make_setup,
    make_tokenizer,
    reference,
    relative_error,
)
from .end_to_end.recipe_harness import launch


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def setup(tokenizer):
    return partial(make_setup, tokenizer)


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepts", [None, False])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (1, 8), (3, 3)])
@pytest.mark.parametrize("unlabelled", [(), (0, 3, 4, 5)])
@pytest.mark.parametrize("task", TASKS)
def test_gradients(setup, tmp_path, task, unlabelled, batch, accumulation, accepts):
    """One step over all rows, however it is cut: also with micro-batches without a label, or of unequal size."""
    student, teachers, data, collator = setup(task, unlabelled=unlabelled)
    if accepts is not None:
        student.accepts_loss_kwargs = accepts
    trainer = build(
        tmp_path,
        student,
        data,
        collator=collator,
        trainer={"teacher": teachers[0]},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        distill_alpha=0.7,
        distill_temperature=3.0,
    )
    trainer.train()
    parts = reference(student, teachers, data, 0.7, 3.0)
    (got,) = gradients_of(trainer)
    assert relative_error(got, gradient_of(sum(parts), student)) < 1e-10
    logs = trainer.state.log_history[0]
    assert logs["distill_loss"] == pytest.approx(parts[1].item(), rel=1e-6)
    assert logs["loss"] == pytest.approx(sum(parts).item(), rel=1e-4)  # which Trainer rounds in some versions


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("alpha", "teachers", "unlabelled", "arguments"),
    [
        (1.0, 1, range(8), {}),
        (1.0, 1, (1,), {}),
        (0.4, 3, (1,), {}),
        (0.4, 1, (1,), {"label_smoothing_factor": 0.2}),
        (0.4, 1, (0, 1, 2), {"label_smoothing_factor": 0.2, "per_device_train_batch_size": 1}),
    ],
    ids=["no labels", "teacher alone", "ensemble", "smoothing", "smoothing without labels"],
)
def test_gradients_of_other_objectives(setup, tmp_path, task, alpha, teachers, unlabelled, arguments):
    student, models, data, collator = setup(task, teachers, unlabelled=unlabelled)
    settings = {"per_device_train_batch_size": 2, **arguments}
    trainer = build(
        tmp_path,
        student,
        data,
        collator=collator,
        trainer={"teacher": models},
        gradient_accumulation_steps=8 // settings["per_device_train_batch_size"],
        distill_alpha=alpha,
        distill_temperature=2.0,
        **settings,
    )
    trainer.train()
    smoothing = settings.get("label_smoothing_factor", 0.0)
    parts = reference(student, models, data, alpha, 2.0, smoothing)
    got = {n: g for n, g in gradients_of(trainer)[0].items() if float(g.abs().max()) > 0}
    expected = {n: g for n, g in gradient_of(sum(parts), student).items() if n in got}
    assert len(got) > 15 and relative_error(got, expected) < 1e-7  # smoothing counts in float32


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8)])
def test_loss_function_of_ones_own(setup, tmp_path, batch, accumulation):
    """It divides by the number of labels of the step, as Trainer asks of it."""
    student, teachers, data, collator = setup("sequence", unlabelled=(2,))

    def double(outputs, labels, num_items_in_batch=None):
        return 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = build(
        tmp_path,
        student,
        data,
        collator=collator,
        trainer={"teacher": teachers, "compute_loss_func": double},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        distill_alpha=0.3,
    )
    trainer.train()
    task, teacher = reference(student, teachers, data, 0.3, 2.0)
    assert relative_error(gradients_of(trainer)[0], gradient_of(2 * task + teacher, student)) < 1e-7


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cls", [DistillTrainer, L2SPDistillationTrainer])
@pytest.mark.parametrize("accepts", [True, False])
def test_one_by_four_is_four_by_one(setup, tmp_path, cls, task, accepts):
    """Ten rows, some without a label, so that the last window of each of three epochs is short: weights and logs."""
    runs = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        student, teachers, data, collator = setup(task, 2, rows=10, unlabelled=(1, 6, 7, 8))
        student.accepts_loss_kwargs = accepts  # whether Trainer divides by the number of micro-batches
        trainer = build(
            tmp_path / str(batch),
            student,
            data,
            cls=cls,
            collator=collator,
            trainer={"teacher": teachers},
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=3,
            learning_rate=0.3,
            logging_steps=2,
            l2sp_lambda=0.1,
        )
        trainer.train()
        keys = ("loss", "distill_loss", "task_loss", "l2sp_penalty")
        logs = [[log[key] for key in keys if key in log] for log in trainer.state.log_history if "loss" in log]
        runs.append((dict(student.named_parameters()), torch.tensor(logs)))
    weights, logs = runs[0]
    start = dict(setup(task)[0].named_parameters())
    assert max((weights[n] - start[n]).abs().max().item() for n in weights) > 0.02  # it did move
    assert logs.shape == (4, 4 if cls is L2SPDistillationTrainer else 2)
    for other, other_logs in runs[1:]:
        assert relative_error(other, weights) < 1e-9
        torch.testing.assert_close(other_logs, logs, rtol=2e-4, atol=2e-4)


class TwoHalves(nn.DataParallel):
    """The module over each half of the batch, and their losses side by side, as on two GPUs."""

    def forward(self, **inputs):
        halves = zip(*(value.chunk(2) for value in inputs.values()), strict=True)
        found = [self.module(**dict(zip(inputs, half, strict=True))) for half in halves]
        losses = {"loss": torch.stack([one.loss for one in found])} if "labels" in inputs else {}
        return SequenceClassifierOutput(logits=torch.cat([one.logits for one in found]), **losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task", TASKS)
def test_two_gpus_of_one_process(setup, tmp_path, monkeypatch, task, smoothing):
    """The labels are unevenly spread over them, and one half of a batch has none."""
    student, teachers, data, collator = setup(task, unlabelled=(0, 1, 3, 6))
    trainer = build(
        tmp_path,
        student,
        data,
        collator=collator,
        trainer={"teacher": teachers[0]},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        distill_alpha=0.3,
        label_smoothing_factor=smoothing,
    )
    trainer.args._n_gpu, trainer._train_batch_size = 2, 4
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *args: SequentialSampler(data))
    monkeypatch.setattr(trainer, "_wrap_model", lambda model, *args, **kwargs: TwoHalves(model))
    trainer.train()
    assert len(gradients_of(trainer)) == 1
    parts = reference(student, teachers, data, 0.3, 2.0, smoothing)
    got = gradients_of(trainer)[0]
    got = {name: gradient for name, gradient in got.items() if float(gradient.abs().max()) > 0}
    expected = {name: g for name, g in gradient_of(sum(parts), student).items() if name in got}
    assert len(got) > 15 and relative_error(got, expected) < 1e-7
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(parts).item(), rel=1e-4)


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path, monkeypatch):
    """Weights and logs of two steps over 16 rows, of which one process sees hardly a label."""
    monkeypatch.chdir(Path(__file__).parents[1])  # where the worker's module is found
    code, _, err = launch("torchrun", "-m", "tests.distill_worker", str(tmp_path / "two"), timeout=240)
    assert code == 0, err[-3000:]
    for task in TASKS:
        one = train_for_comparison(task, tmp_path / "one", accumulation=4)
        two = load_file(tmp_path / "two" / task / "weights.safetensors")
        assert relative_error(two, dict(one.model.named_parameters())) < 1e-9
        logs = json.loads((tmp_path / "two" / task / "logs.json").read_text())
        expected = loss_logs(one)
        assert len(logs) == 2 and logs[0].keys() == expected[0].keys() >= {"distill_loss", "task_loss"}
        for log, same in zip(logs, expected, strict=True):
            assert log == pytest.approx(same, rel=1e-4)


# --- beside L2-SP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_penalty_is_counted_once_and_not_weighed_by_alpha(setup, tmp_path, batch, accumulation):
    student, teachers, data, collator = setup("sequence", unlabelled=(2,))
    anchor = copy.deepcopy(student)
    trainer = build(
        tmp_path,
        student,
        data,
        cls=L2SPDistillationTrainer,
        collator=collator,
        trainer={"teacher": teachers},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=0.1,
        distill_alpha=0.6,
        l2sp_lambda=0.4,
    )
    trainer.train()
    # The gradients of the second step, from the weights after the first one.
    before, (first, second) = copy.deepcopy(anchor), gradients_of(trainer)
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            parameter -= 0.1 * first[name]
    parts = reference(before, teachers, data, 0.6, 2.0)
    pairs = zip(before.parameters(), anchor.parameters(), strict=True)
    penalty = 0.4 * sum((p - p0.detach()).square().sum() for p, p0 in pairs)
    assert penalty.item() > 1e-4
    assert relative_error(second, gradient_of(sum(parts) + penalty, before)) < 1e-9
    logs = trainer.state.log_history[1]
    assert logs["l2sp_penalty"] == pytest.approx(penalty.item(), rel=1e-5)
    assert logs["distill_loss"] == pytest.approx(parts[1].item(), rel=1e-5)
    assert logs["task_loss"] == pytest.approx(sum(parts).item(), rel=1e-4)
    assert logs["loss"] == pytest.approx((sum(parts) + penalty).item(), rel=1e-4)


@pytest.mark.parametrize("cls", [DistillTrainer, L2SPDistillationTrainer])
def test_outside_of_a_step(setup, tmp_path, move, cls):
    """Called by a person: the means of the inputs, and the whole penalty."""
    student, teachers, data, collator = setup("sequence", unlabelled=(2, 3))
    trainer = build(
        tmp_path,
        student,
        data,
        cls=cls,
        collator=collator,
        trainer={"teacher": teachers},
        distill_alpha=0.6,
        gradient_accumulation_steps=4,
        l2sp_lambda=0.4,
        l2sp_beta=0.2,
    )
    if cls is L2SPDistillationTrainer:
        trainer._l2sp_prepare_anchor()
    move(student.train())
    parts = reference(student, teachers, data, 0.6, 2.0)
    expected = sum(parts)
    if cls is L2SPDistillationTrainer:
        expected = expected + 0.4 * l2sp_penalty(student, trainer.l2sp_anchor)
    loss, outputs = trainer.compute_loss(student, collator(list(data)), return_outputs=True)
    assert outputs.logits.shape == (8, 3)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert relative_error(gradient_of(loss, student), gradient_of(expected, student)) < 1e-9
    assert trainer._distill_sum is None


# --- off, and in evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 4, "weight_decay": 0.1, "bf16": True}])
@pytest.mark.parametrize(("plain", "cls"), [(Trainer, DistillTrainer), (L2SPTrainer, L2SPDistillationTrainer)])
def test_alpha_zero_is_the_trainer_bit_for_bit(tokenizer, tmp_path, plain, cls, extra):
    outcomes = []
    for kind in (plain, cls):
        student = make_model("sequence", seed=1, dropout=0.2)
        collator = make_collator("sequence", tokenizer)
        teacher = {} if kind is plain else {"teacher": make_model("token", seed=2, names=["other"])}  # never looked at
        trainer = build(
            tmp_path / kind.__name__,
            student,
            make_data("sequence", 12),
            cls=kind,
            tokenizer=tokenizer,
            collator=collator,
            trainer=teacher,
            optim="adamw_torch",
            learning_rate=0.01,
            num_train_epochs=2,
            per_device_train_batch_size=2,
            distill_alpha=0.0,
            l2sp_lambda=0.1,
            **extra,
        )
        assert trainer.data_collator is collator
        trainer.train()
        logs = [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in trainer.state.log_history
        ]
        outcomes.append((logs, torch.get_rng_state(), student))
    (plain_logs, plain_state, one), (logs, state, other) = outcomes
    assert plain_logs == logs and torch.equal(plain_state, state)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("column", [False, True])
def test_evaluation_knows_no_teacher(setup, tmp_path, column):
    student, teachers, data, collator = setup("token")
    trainer = build(tmp_path, student, data, collator=collator, trainer={"teacher": teachers}, distill_alpha=0.9)
    plain = build(tmp_path, student, data, cls=Trainer, collator=collator)
    held_out = make_data("token", seed=9)
    expected = plain.evaluate(held_out)["eval_loss"], plain.predict(held_out).predictions
    if column:
        lengths = [len(row) for row in held_out["input_ids"]]
        held_out = held_out.add_column("teacher_logits", [[[0.0] * 3] * length for length in lengths])
    assert trainer.evaluate(held_out)["eval_loss"] == expected[0]
    assert (trainer.predict(held_out).predictions == expected[1]).all()
    without = held_out.remove_columns("labels")
    assert (trainer.predict(without).predictions == expected[1]).all()

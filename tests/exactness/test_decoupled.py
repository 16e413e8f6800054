"""The decoupled pull against its formula, θ ← θ − lr·2λw(θ − θ0) before the optimizer's own update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

from ..helpers import load_classifier, quick
from .harness import relative_error, schedule, snapshot

HEAD = ("classifier.weight", "classifier.bias")
LAM, BETA = 0.5, 0.4
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.4, "momentum": 0.9}),
    "foreach": (torch.optim.AdamW, {"lr": 0.02, "foreach": True}),
    "fused": (torch.optim.AdamW, {"lr": 0.02, "fused": True}),
}


def with_pull(base: type[torch.optim.Optimizer], pull: Any) -> type[torch.optim.Optimizer]:
    """The optimizer whose steps begin with `pull(step, group, parameter)`: the formula, in the test's own words."""

    class Reference(base):  # type: ignore[valid-type,misc]
        taken = 0

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    pull(self.taken, group["lr"], parameter)
            self.taken += 1
            return super().step(closure)

    return Reference


def load(folder: str, double: bool = True, **options: float) -> BertForSequenceClassification:
    model = load_classifier(folder, **options)
    for name, parameter in model.named_parameters():
        # Their true gradient is 0; Adam would blow its rounding up to steps.
        parameter.requires_grad_(not name.endswith("key.bias"))
    return model.double() if double else model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two, with learning rates of their own."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = [n for n in named if ".layer.0." in n]
    return [
        {"params": [named[n] for n in first]},
        {"params": [p for n, p in named.items() if n not in first], "lr": 0.2},
    ]


def settings(folder, **changes):
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
    }
    return quick(folder, **{**values, **changes})


def train(model, data, folder, optimizer, **changes) -> L2SPTrainer:
    options = {"l2sp_mode": "decoupled", "l2sp_lambda": LAM, "l2sp_beta": BETA}
    args = L2SPTrainingArguments(**settings(folder, **options, **changes))
    trainer = L2SPTrainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    return trainer


def reference(folder, data, out, kind, weight=lambda name: 1.0, course="constant", rows=None, lam=LAM, **changes):
    """What plain `Trainer` makes of it with the reference optimizer; its weights and the penalty before every step."""
    model = load(folder)
    if rows is not None:
        model.resize_token_embeddings(rows[1], mean_resizing=False)
    names = {id(p): n for n, p in model.named_parameters()}
    origin = snapshot(model)
    steps = 6 if changes.get("gradient_accumulation_steps", 2) == 2 else 12
    penalties = [0.0] * steps

    def pull(step: int, rate: float, parameter: Tensor) -> None:
        name = names[id(parameter)]
        strength = schedule(course, lam, step, steps)
        if name in HEAD:
            penalties[step] += BETA * float(parameter.square().sum())
            parameter.copy_(parameter * (1 - 2 * BETA * rate))
            return
        away = parameter - origin[name]
        if rows is not None and "word_embeddings" in name:
            away[rows[0] :] = 0
        penalties[step] += strength * float((weight(name) * away.square()).sum())
        parameter.copy_(parameter - rate * 2 * strength * weight(name) * away)

    cls, options = OPTIMIZERS[kind]
    optimizer = with_pull(cls, pull)(groups(model), **options)
    trainer = Trainer(
        model, TrainingArguments(**settings(out, **changes)), train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer, penalties


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("course", ["constant", "linear", "cosine"])
def test_trajectory_is_that_of_the_formula(tiny_bert_dir, classification_data, tmp_path, kind, course):
    model = load(tiny_bert_dir)
    cls, options = OPTIMIZERS[kind]
    optimizer = cls(groups(model), **options)
    trainer = train(model, classification_data, tmp_path / "ours", optimizer, l2sp_schedule=course)
    expected, penalties = reference(tiny_bert_dir, classification_data, tmp_path / "theirs", kind, course=course)

    assert relative_error(snapshot(model), snapshot(expected.model)) < 1e-13
    logs = [log for log in trainer.state.log_history if "loss" in log]
    plain = [log for log in expected.state.log_history if "loss" in log]
    assert len(logs) == 6
    for log, other, penalty in zip(logs, plain, penalties, strict=True):
        # The task's own loss and gradients: neither is the penalty in them, nor is it clipped.
        assert log["loss"] == log["task_loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        assert log["l2sp_penalty"] == pytest.approx(penalty, rel=1e-10)
    assert [log["l2sp_lambda"] for log in logs] == pytest.approx([schedule(course, LAM, s, 6) for s in range(6)])
    assert max(log["grad_norm"] for log in logs) > 0.5 > min(log["grad_norm"] for log in logs)
    assert logs[-1]["l2sp_distance"] > 0.05


def test_float32_is_as_near_as_its_rounding(tiny_bert_dir, classification_data, tmp_path):
    model = load(tiny_bert_dir, double=False)
    cls, options = OPTIMIZERS["sgd"]
    train(model, classification_data, tmp_path / "ours", cls(groups(model), **options))
    expected, _ = reference(tiny_bert_dir, classification_data, tmp_path / "theirs", "sgd")
    assert relative_error(snapshot(model), snapshot(expected.model)) < 1e-6


def test_weights_of_every_number(tiny_bert_dir, classification_data, tmp_path):
    model = load(tiny_bert_dir)
    generator = torch.Generator().manual_seed(3)
    weights = {n: 3 * torch.rand(p.shape, generator=generator) for n, p in model.named_parameters() if n not in HEAD}
    save_file(weights, tmp_path / "w.safetensors")
    cls, options = OPTIMIZERS["foreach"]
    train(
        model,
        classification_data,
        tmp_path / "ours",
        cls(groups(model), **options),
        l2sp_weights=str(tmp_path / "w.safetensors"),
    )
    expected, _ = reference(
        tiny_bert_dir, classification_data, tmp_path / "theirs", "foreach", weight=lambda name: weights[name].double()
    )
    assert relative_error(snapshot(model), snapshot(expected.model)) < 1e-13


def test_enlarged_embedding_and_weights_by_pattern(tiny_bert_dir, classification_data, tmp_path):
    model = load(tiny_bert_dir)
    model.resize_token_embeddings(107, mean_resizing=False)
    cls, options = OPTIMIZERS["sgd"]
    trainer = train(
        model,
        classification_data,
        tmp_path / "ours",
        cls(groups(model), **options),
        l2sp_weights={"embeddings": 0.5, "LayerNorm": 2.0},
    )
    assert trainer.l2sp_plan.entries["bert.embeddings.word_embeddings.weight"].rows == 100

    def weight(name: str) -> float:
        return 0.5 if "embeddings" in name else 2.0 if "LayerNorm" in name else 1.0

    expected, _ = reference(
        tiny_bert_dir, classification_data, tmp_path / "theirs", "sgd", weight=weight, rows=(100, 107)
    )
    assert relative_error(snapshot(model), snapshot(expected.model)) < 1e-13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_stored_anchor(tiny_bert_dir, classification_data, tmp_path, dtype, offload):
    """A pull of exactly the whole distance lands on θ0 as it is stored, then takes the optimizer's step."""
    model = load(tiny_bert_dir, double=False)
    origin = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

    class Away(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

    options = {"l2sp_mode": "decoupled", "l2sp_lambda": 2.0, "l2sp_anchor_dtype": dtype}
    args = L2SPTrainingArguments(
        **settings(
            tmp_path / "out",
            l2sp_anchor_offload=offload,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=1,
            **options,
        )
    )
    trainer = L2SPTrainer(
        model, args, train_dataset=classification_data, optimizers=(optimizer, None), callbacks=[Away()]
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in HEAD or not parameter.requires_grad:
            assert torch.equal(parameter, origin[name] + 0.1)
        else:
            stored = origin[name].to(getattr(torch, dtype)).float()
            torch.testing.assert_close(parameter.detach(), stored, rtol=1e-6, atol=1e-6)


def test_tied_weights_are_pulled_once(gpt2, language_data, tmp_path):
    model = gpt2
    origin = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = {}

    class Away(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
                    parameter.grad = torch.zeros_like(parameter)
            moved.update(snapshot(model))

    args = L2SPTrainingArguments(
        **settings(
            tmp_path, l2sp_mode="decoupled", l2sp_lambda=1.0, max_steps=1, lr_scheduler_type="constant", warmup_steps=0
        )
    )
    L2SPTrainer(model, args, train_dataset=language_data, optimizers=(optimizer, None), callbacks=[Away()]).train()
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        expected = moved[name] - 0.2 * (moved[name] - origin[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)


def test_accumulation_changes_nothing(tiny_bert_dir, classification_data, tmp_path):
    models = []
    for name, batch, steps in (("whole", 4, 1), ("parts", 1, 4), ("uneven", 2, 2)):
        model = load(tiny_bert_dir, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        train(model, classification_data, tmp_path / name, torch.optim.SGD(model.parameters(), lr=0.05), **options)
        models.append(snapshot(model))
    assert relative_error(models[1], models[0]) < 1e-12
    assert relative_error(models[2], models[0]) < 1e-12


def test_clipping_does_not_touch_it(tiny_bert_dir, classification_data, tmp_path):
    """Gradients that are clipped to nothing leave the pull as it is."""
    model = load(tiny_bert_dir)
    origin = snapshot(model)

    class Away(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)

    args = L2SPTrainingArguments(
        **settings(
            tmp_path,
            l2sp_mode="decoupled",
            l2sp_lambda=LAM,
            max_grad_norm=1e-30,
            lr_scheduler_type="constant",
            warmup_steps=0,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    trainer = L2SPTrainer(
        model, args, train_dataset=classification_data, optimizers=(optimizer, None), callbacks=[Away()]
    )
    trainer.train()
    left = (1 - 2 * LAM * 0.3) ** 6
    for name, parameter in model.named_parameters():
        expected = origin[name] + 0.1 * (left if parameter.requires_grad and name not in HEAD else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
    first = trainer.state.log_history[0]["l2sp_penalty"]
    assert math.isclose(first, LAM * 0.01 * trainer.l2sp_plan.elements("anchored"), rel_tol=1e-9)

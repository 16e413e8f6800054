"""λ=0 is Trainer bit for bit; 1×8 is 8×1; clipping, loss scaling and evaluation see the right thing."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.storage import Storage

from .harness import Recorder, Reference, expected_gradients, relative_error, run, snapshot

HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture
def bert(tiny_bert_dir):
    def make(dropout: float = 0.1, **kwargs) -> BertForSequenceClassification:
        model = BertForSequenceClassification.from_pretrained(
            tiny_bert_dir,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **kwargs,
        )
        model.accepts_loss_kwargs = False
        return model

    return make


def arguments(folder, **kwargs):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    return {**settings, **kwargs}


class Nothing(TrainerCallback):
    pass


@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 4, "weight_decay": 0.1, "bf16": True}])
def test_lambda_zero_is_trainer_bit_for_bit(bert, classification_data, tmp_path, extra):
    outcomes = []
    for cls, config, l2sp in (
        (Trainer, TrainingArguments, {}),
        (
            L2SPTrainer,
            L2SPTrainingArguments,
            {"l2sp_lambda": 0, "l2sp_exclude": ["LayerNorm"], "l2sp_log_layers": True},
        ),
    ):
        folder = tmp_path / cls.__name__ / "model"
        settings = arguments(folder, max_steps=10, save_strategy="steps", save_steps=5, **extra)
        torch.manual_seed(0)
        trainer = cls(
            model=bert(), args=config(**settings, **l2sp), train_dataset=classification_data, callbacks=[Nothing]
        )
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        result = trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        logs = [
            {k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k}
            for e in trainer.state.log_history
        ]
        files = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, fs in os.walk(folder) for f in fs)
        card = (folder / "README.md").read_text()
        outcomes.append((trainer, result.training_loss, callbacks, logs, files, card, torch.get_rng_state()))
    (plain, *plain_rest), (zero, *zero_rest) = outcomes
    assert zero.l2sp_anchor is None and zero.l2sp_plan is None
    assert torch.equal(plain_rest.pop(), zero_rest.pop())  # the state of the random numbers
    assert plain_rest == zero_rest
    for (name, a), (_, b) in zip(plain.model.named_parameters(), zero.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    states = [t.optimizer.state_dict() for t in (plain, zero)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        for field, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][key][field])), (key, field)


@pytest.mark.parametrize("loss", ["model", "compute_loss_func"])
def test_one_by_eight_is_eight_by_one(bert, classification_data, tmp_path, loss):
    """Accumulation changes nothing: neither the gradients nor twelve steps of SGD."""

    def mean_loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    kwargs = {"compute_loss_func": mean_loss} if loss == "compute_loss_func" else {}
    weights = []
    for batch, accumulation in ((1, 8), (8, 1), (2, 4)):
        settings = arguments(
            tmp_path / f"{batch}x{accumulation}",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=4,
            optim="sgd",
            learning_rate=0.05,
        )
        torch.manual_seed(0)
        trainer = L2SPTrainer(
            model=bert(dropout=0.0, dtype=torch.float64),
            args=L2SPTrainingArguments(**settings, l2sp_lambda=0.3, l2sp_beta=0.1),
            train_dataset=classification_data,
            **kwargs,
        )
        trainer.train()
        assert trainer.state.global_step == 12
        weights.append(snapshot(trainer.model))
        assert trainer.l2sp_drift_report().total.distance > 0.01
    for other in weights[1:]:
        assert relative_error(other, weights[0]) < 1e-9


def test_trajectory_equals_a_naive_loop(bert, classification_data, tmp_path):
    """Eight full-batch AdamW steps against a loop that writes the objective down in autograd."""
    lam, beta, clip = 0.2, 0.05, 0.5
    batch = {k: torch.stack([row[k] for row in classification_data]) for k in classification_data[0]}

    def make():
        torch.manual_seed(0)
        model = bert(dropout=0.0, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            # Attention does not feel key biases: their gradient is rounding noise, which AdamW makes steps of.
            parameter.requires_grad_(not name.endswith("key.bias"))
        return model

    reference = make()
    head = [p for n, p in reference.named_parameters() if n in HEAD]
    rest = [p for n, p in reference.named_parameters() if n not in HEAD and p.requires_grad]
    origin = [p.detach().clone() for p in rest]
    optimizer = torch.optim.AdamW(
        [{"params": [head[0]], "weight_decay": 0.1}, {"params": [head[1], *rest], "weight_decay": 0.0}],
        lr=1e-2,
    )
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = reference(**batch).loss
        loss = loss + lam * sum(((p - o) ** 2).sum() for p, o in zip(rest, origin, strict=True))
        loss = loss + beta * sum((p**2).sum() for p in head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    settings = arguments(
        tmp_path,
        per_device_train_batch_size=24,
        max_steps=8,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=clip,
        optim="adamw_torch",
    )
    trainer = L2SPTrainer(
        model=make(),
        args=L2SPTrainingArguments(**settings, l2sp_lambda=lam, l2sp_beta=beta),
        train_dataset=classification_data,
    )
    trainer.train()
    assert relative_error(snapshot(trainer.model), snapshot(reference)) < 1e-8
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=6e-5)  # transformers 4 logs four digits


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_sees_the_pull(bert, classification_data, tmp_path, scaled):
    def prepare(trainer):
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
            clip = trainer.accelerator.clip_grad_norm_

            def unscaled_clip(*a, **k):  # as accelerate does under fp16 on a GPU
                trainer.accelerator.scaler.unscale_(trainer.optimizer.optimizer)
                return clip(*a, **k)

            trainer.accelerator.clip_grad_norm_ = unscaled_clip

    settings = dict(gradient_accumulation_steps=4, l2sp_lambda=0.3, optim="adamw_torch")
    plain = run(Trainer, bert, classification_data, tmp_path / "plain", **settings)
    clipped = run(
        L2SPTrainer, bert, classification_data, tmp_path / "l2sp", max_grad_norm=0.1, prepare=prepare, **settings
    )
    reference = Reference(snapshot(bert()), 0.3, new=HEAD)
    names = {n for n, _ in clipped.trainer.model.named_parameters()}
    logs = [entry for entry in clipped.trainer.state.log_history if "grad_norm" in entry]
    for got, want, log in zip(
        clipped.gradients, expected_gradients(plain, reference, lambda _: names), logs, strict=True
    ):
        norm = math.sqrt(sum(float((g**2).sum()) for g in want.values()))
        assert norm > 1  # else clipping would not act
        assert relative_error(got, {n: g * (0.1 / (norm + 1e-6)) for n, g in want.items()}) < 1e-5
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_step_skipped_by_the_scaler_leaves_weights_and_goes_on(bert, classification_data, tmp_path):
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).grad.view(-1)[0] = float("inf")

    def prepare(trainer):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(snapshot(model))

    torch.manual_seed(0)
    settings = arguments(tmp_path, max_steps=4, optim="adamw_torch", max_grad_norm=0.0)
    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**settings, l2sp_lambda=0.3),
        train_dataset=classification_data,
        callbacks=[Overflow(), Watch()],
    )
    prepare(trainer)
    trainer.train()
    seen.append(snapshot(trainer.model))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, False, True, True]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.accelerator.scaler.get_scale() == 32.0


def test_evaluation_and_prediction_know_nothing_of_the_penalty(bert, classification_data, tmp_path):
    settings = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**settings, l2sp_lambda=5.0, l2sp_beta=5.0),
        train_dataset=classification_data,
        eval_dataset=classification_data[:9],
    )
    trainer.train()
    plain = Trainer(
        model=trainer.model,
        args=TrainingArguments(**arguments(tmp_path / "plain")),
        eval_dataset=classification_data[:9],
    )
    assert max(entry.get("l2sp_penalty", 0.0) for entry in trainer.state.log_history) > 0.1
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    ours, theirs = trainer.predict(classification_data), plain.predict(classification_data)
    assert (ours.predictions == theirs.predictions).all()
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            assert not any("l2sp" in key or key == "task_loss" for key in entry)


def test_best_checkpoint_is_that_of_the_task_and_keeps_the_anchor(bert, classification_data, tmp_path):
    settings = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    torch.manual_seed(0)
    model = bert()
    origin = snapshot(model)
    trainer = L2SPTrainer(
        model=model,
        args=L2SPTrainingArguments(**settings, l2sp_lambda=2.0),
        train_dataset=classification_data,
        eval_dataset=classification_data,
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_model_checkpoint.endswith(f"-{min(losses, key=losses.get)}")
    assert all(torch.equal(trainer.l2sp_anchor[n], origin[n]) for n in trainer.l2sp_anchor)


def test_compute_loss_outside_a_step(bert, classification_data, tmp_path):
    trainer = L2SPTrainer(
        model=bert(dropout=0.0),
        args=L2SPTrainingArguments(**arguments(tmp_path), l2sp_lambda=0.4, l2sp_beta=0.2),
        train_dataset=classification_data,
    )
    batch = {k: torch.stack([row[k] for row in classification_data[:4]]) for k in classification_data[0]}
    model = trainer.model
    model.train()
    origin = snapshot(model)
    trainer.compute_loss(model, dict(batch))  # takes the anchor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    naive = model(**batch).loss
    for name, parameter in model.named_parameters():
        naive = naive + (0.2 * (parameter**2).sum() if name in HEAD else 0.4 * ((parameter - origin[name]) ** 2).sum())
    naive.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (4, 3)
    loss.backward()
    assert float(loss) == pytest.approx(float(naive), rel=1e-6)
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) < 1e-6
    model.eval()
    with torch.no_grad():
        assert float(trainer.compute_loss(model, dict(batch))) == float(model(**batch).loss)


def test_auto_find_batch_size_keeps_the_first_anchor(bert, classification_data, tmp_path):
    class OutOfMemoryOnce(L2SPTrainer):
        failed = False

        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if self.state.global_step == 1 and not self.failed:
                type(self).failed = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return loss

    torch.manual_seed(0)
    model = bert()
    origin = snapshot(model)
    settings = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=8, auto_find_batch_size=True)
    trainer = OutOfMemoryOnce(
        model=model, args=L2SPTrainingArguments(**settings, l2sp_lambda=0.3), train_dataset=classification_data
    )
    trainer.train()
    assert OutOfMemoryOnce.failed and trainer._train_batch_size < 8
    # One step was taken before the failure: the anchor is older than that.
    assert all(torch.equal(trainer.l2sp_anchor[n], origin[n]) for n in trainer.l2sp_anchor)
    first = next(entry for entry in trainer.state.log_history if "l2sp_distance" in entry)
    assert first["l2sp_distance"] > 0


def test_anchor_follows_the_model_and_survives_a_second_train(bert, classification_data, tmp_path):
    def fresh():
        return bert()

    trainer = L2SPTrainer(
        model_init=fresh,
        args=L2SPTrainingArguments(**arguments(tmp_path, max_steps=2), l2sp_lambda=0.3),
        train_dataset=classification_data,
    )
    trainer.train()
    live = dict(trainer.model.named_parameters())
    assert all(entry.parameter is live[name] for name, entry in trainer.l2sp_plan.entries.items())
    assert trainer.l2sp_drift_report().total.distance > 0
    first = trainer.l2sp_anchor
    trainer.train()  # model_init makes another model
    assert trainer.l2sp_anchor is not first and trainer.l2sp_anchor.fingerprint == first.fingerprint

    kept = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**arguments(tmp_path / "kept", max_steps=2), l2sp_lambda=0.3),
        train_dataset=classification_data,
    )
    kept.train()
    anchor, drift = kept.l2sp_anchor, kept.l2sp_drift_report().total.distance
    kept.train()
    assert kept.l2sp_anchor is anchor and kept.l2sp_drift_report().total.distance != drift


def test_plain_arguments_and_none_work(bert, classification_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (TrainingArguments(**arguments(tmp_path / "plain", max_steps=1)), None):
        trainer = L2SPTrainer(model=bert(), args=args, train_dataset=classification_data)
        if args is None:
            trainer.args.max_steps, trainer.args.report_to, trainer.args.disable_tqdm = 1, [], True
        trainer.train()
        assert trainer.l2sp_anchor is not None
        assert [e["l2sp_lambda"] for e in trainer.state.log_history if "l2sp_lambda" in e] in ([0.01], [])


def test_weight_decay_acts_only_where_nothing_is_anchored(bert, classification_data, tmp_path):
    settings = arguments(tmp_path, max_steps=1, weight_decay=0.1)
    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**settings, l2sp_lambda=0.3, l2sp_exclude=[r"layer\.0"]),
        train_dataset=classification_data,
    )
    trainer.train()
    named = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {named[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert "classifier.weight" in decayed
    assert {n for n in decayed if "layer.0" in n} and not {n for n in decayed if "layer.1" in n or "embeddings" in n}
    everything = {n for g in trainer.optimizer.param_groups for n in (named[id(p)] for p in g["params"])}
    assert everything == set(named.values())


def test_lambda_raised_from_zero_during_training_is_refused(bert, classification_data, tmp_path):
    class Raise(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.l2sp_lambda = 0.1

    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**arguments(tmp_path, max_steps=3), l2sp_lambda=0.0),
        train_dataset=classification_data,
        callbacks=[Raise()],
    )
    with pytest.raises(ValueError, match="raised from 0 to 0.1 at step 1, when the pretrained weights were gone"):
        trainer.train()


def test_lambda_changed_during_training_takes_effect(bert, classification_data, tmp_path):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.l2sp_lambda = {1: 0.2, 2: 0.0}[state.global_step] if state.global_step < 3 else 0.4

    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**arguments(tmp_path, max_steps=4), l2sp_lambda=0.1),
        train_dataset=classification_data,
        callbacks=[Change()],
    )
    trainer.train()
    logs = trainer.state.log_history[:4]
    assert [log.get("l2sp_lambda") for log in logs] == [0.1, 0.2, None, 0.4]
    assert logs[1]["l2sp_penalty"] == pytest.approx(0.2 * logs[1]["l2sp_distance"] ** 2, rel=1e-6)


def test_aliased_anchor_is_caught(bert, classification_data, tmp_path, monkeypatch):
    monkeypatch.setattr(Storage, "keep", lambda self, values: dict(values))
    trainer = L2SPTrainer(
        model=bert(),
        args=L2SPTrainingArguments(**arguments(tmp_path, max_steps=1), l2sp_lambda=0.3),
        train_dataset=classification_data,
    )
    with pytest.raises(RuntimeError, match="shares memory with the parameter itself"):
        trainer.train()


def test_zero_match_anchor_is_caught(bert, classification_data, tmp_path):
    for change, word in (
        (lambda m: m.bert.requires_grad_(False), "frozen"),
        (lambda m: None, "excluded"),
    ):
        model = bert()
        change(model)
        exclude = ["."] if word == "excluded" else None
        trainer = L2SPTrainer(
            model=model,
            args=L2SPTrainingArguments(**arguments(tmp_path, max_steps=1), l2sp_lambda=0.3, l2sp_exclude=exclude),
            train_dataset=classification_data,
        )
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"no trainable parameter with an anchor.*word_embeddings.weight: {word}"):
            trainer.train()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_recorder_moves_the_weights(bert, classification_data, tmp_path):
    """The harness itself: without the noise there is no pull to test."""
    outcome = run(L2SPTrainer, bert, classification_data, tmp_path, l2sp_lambda=0.3)
    assert isinstance(outcome.trainer.callback_handler.callbacks[-2], Recorder) or outcome.gradients
    assert outcome.trainer.state.log_history[0]["l2sp_distance"] > 1.0

"""`select_interpolation`: every α from the same weights, the best one left in the model, nothing else disturbed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments, interpolate
from hf_l2sp.backends import FSDP2Backend

from .helpers import load_classifier


def make_trainer(folder, data, out, callbacks=(), **changes):
    options = {k: changes.pop(k) for k in ("compute_metrics", "eval_dataset", "model") if k in changes}
    values = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "l2sp_lambda": 0.01,
    }
    args = L2SPTrainingArguments(**{**values, **changes})
    options = {"model": load_classifier(folder), "eval_dataset": data[:12], **options}
    return L2SPTrainer(args=args, train_dataset=data, callbacks=list(callbacks), **options)


@pytest.fixture
def trained(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(tiny_bert_dir, classification_data, tmp_path)
    trainer.train()
    return trainer


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, expected):
    return all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def scored(trainer, scores):
    """`evaluate` gives the score of the α that the model's weights are, told by one of them."""
    name = "bert.encoder.layer.0.output.dense.weight"
    parameter, theta = dict(trainer.model.named_parameters())[name], values(trainer.model)[name]
    origin = trainer.l2sp_anchor[name]

    def evaluate(*args, **kwargs):
        alpha = float(torch.dot((parameter - origin).flatten(), (theta - origin).flatten()).detach())
        alpha /= float((theta - origin).square().sum())
        return {"eval_score": scores(round(alpha, 3)), "eval_loss": 1.0}

    trainer.evaluate = evaluate


def test_best_by_real_evaluations_is_left_in_the_model(trained):
    theta, origin = values(trained.model), dict(trained.l2sp_anchor)
    chosen = trained.select_interpolation()
    assert list(chosen.scores) == [i / 10 for i in range(11)] and chosen.metric == "eval_loss"
    assert not chosen.greater_is_better and chosen.scores[chosen.alpha] == min(chosen.scores.values())
    for name, parameter in trained.model.named_parameters():
        expected = torch.lerp(origin[name], theta[name], chosen.alpha) if name in origin else theta[name]
        assert torch.equal(parameter, expected), name
    assert trained.evaluate()["eval_loss"] == chosen.scores[chosen.alpha]
    assert len(set(chosen.scores.values())) > 5


@pytest.mark.parametrize("best", [0.0, 0.3, 1.0])
def test_every_alpha_starts_from_the_fine_tuned_weights(trained, best):
    theta = values(trained.model)
    seen = []
    scored(trained, lambda alpha: (seen.append((alpha, values(trained.model))), -abs(alpha - best))[1])
    chosen = trained.select_interpolation(metric_for_best="score")
    assert chosen.alpha == best and len(seen) == 11
    twin = load_classifier(trained.model.config._name_or_path)
    for alpha, weights in [*seen, (best, values(trained.model))]:
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(theta[name])
        interpolate(twin, trained.l2sp_anchor, alpha)
        assert same(twin, weights)
    if best == 1.0:
        assert same(trained.model, theta)  # bit for bit
    if best == 0.0:
        assert all(torch.equal(trained.l2sp_anchor[n], values(trained.model)[n]) for n in trained.l2sp_anchor)


@pytest.mark.parametrize(
    ("name", "arguments", "lower"),
    [
        ("score", {}, False),
        ("eval_score", {}, False),
        ("ece", {}, True),
        ("my_nll", {}, True),
        (None, {}, True),  # the loss
        (None, {"metric_for_best_model": "f1_macro"}, False),
        (None, {"metric_for_best_model": "ece"}, True),  # Trainer itself would say that more of it is better
        (None, {"metric_for_best_model": "length", "greater_is_better": False}, True),
        (None, {"metric_for_best_model": "length"}, False),
        (None, {"metric_for_best_model": "negative_loss", "greater_is_better": True}, False),
        ("ece", {"metric_for_best_model": "f1_macro", "greater_is_better": True}, True),
        (None, {"metric_for_best_model": "accuracy", "greater_is_better": False}, True),
    ],
)
def test_direction(tiny_bert_dir, classification_data, tmp_path, name, arguments, lower):
    trainer = make_trainer(tiny_bert_dir, classification_data, tmp_path, max_steps=1, **arguments)
    trainer.train()
    key = name or arguments.get("metric_for_best_model", "loss")
    key = key if key.startswith("eval_") else f"eval_{key}"
    scores = iter([0.5, 0.9, 0.1])
    trainer.evaluate = lambda: {key: next(scores)}
    chosen = trainer.select_interpolation((0.0, 0.5, 1.0), metric_for_best=name)
    assert (chosen.metric, chosen.greater_is_better, chosen.alpha) == (key, not lower, 1.0 if lower else 0.5)


def test_ties_go_to_the_larger_alpha_and_nan_never_wins(trained):
    given = {0.0: math.nan, 0.25: 0.7, 0.5: 0.7, 1.0: 0.2}
    scored(trained, given.__getitem__)
    chosen = trained.select_interpolation([0.5, 0.0, 1, 0.25, 0.5], metric_for_best="score")
    assert chosen.alpha == 0.5 and list(chosen.scores) == [0.0, 0.25, 0.5, 1.0]


def test_nothing_is_logged_but_the_choice_and_no_callback_hears_of_it(tiny_bert_dir, classification_data, tmp_path):
    class Heard(TrainerCallback):
        evaluations = 0

        def on_evaluate(self, *args, **kwargs):
            self.evaluations += 1

    heard = Heard()
    trainer = make_trainer(
        tiny_bert_dir,
        classification_data,
        tmp_path,
        callbacks=[heard, EarlyStoppingCallback(1)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    before, count, best = list(trainer.state.log_history), heard.evaluations, trainer.state.best_metric
    callbacks = trainer.callback_handler.callbacks
    chosen = trainer.select_interpolation((0.0, 0.5, 1.0))
    assert heard.evaluations == count and trainer.state.best_metric == best
    assert trainer.callback_handler.callbacks is callbacks and "log" not in vars(trainer)
    (added,) = trainer.state.log_history[len(before) :]
    assert trainer.state.log_history[: len(before)] == before
    assert added["l2sp_alpha"] == chosen.alpha
    assert {k: v for k, v in added.items() if "/" in k} == {
        f"l2sp_alpha/{alpha:g}": score for alpha, score in chosen.scores.items()
    }
    assert not [key for key in added if key.startswith("eval_")]
    trainer.evaluate()
    assert heard.evaluations == count + 1 and "eval_loss" in trainer.state.log_history[-1]


def test_choice_is_told_in_state_file_report_and_card(trained, tmp_path):
    drift = trained.l2sp_drift_report().total.drift
    trained.save_model()
    assert "interpolation" not in json.loads((tmp_path / "l2sp_state.json").read_text())
    scored(trained, {0.0: 0.1, 0.5: math.nan, 0.8: 0.9, 1.0: 0.5}.__getitem__)
    trained.select_interpolation((0.0, 0.5, 0.8, 1.0), metric_for_best="score")
    trained.save_model()
    trained.create_model_card()
    state = json.loads((tmp_path / "l2sp_state.json").read_text())
    assert state["interpolation"] == {
        "alpha": 0.8,
        "metric": "eval_score",
        "scores": {"0": 0.1, "0.5": None, "0.8": 0.9, "1": 0.5},
    }
    report = trained.l2sp_drift_report()
    assert report.settings["alpha"] == 0.8 and report.total.drift == pytest.approx(0.8 * drift, rel=1e-5)
    assert "| interpolated: θ0 + α(θ − θ0), α | 0.8 |" in (tmp_path / "README.md").read_text()


def test_second_choice_goes_on_from_the_first_and_says_so(trained, tmp_path):
    theta, origin = values(trained.model), dict(trained.l2sp_anchor)
    for _ in range(2):
        scored(trained, {0.5: 1.0, 1.0: 0.0}.__getitem__)
        trained.select_interpolation((0.5, 1.0), metric_for_best="score")
        del trained.evaluate
    trained.save_model()
    assert json.loads((tmp_path / "l2sp_state.json").read_text())["interpolation"]["alpha"] == 0.25
    for name, value in origin.items():
        torch.testing.assert_close(values(trained.model)[name], torch.lerp(value, theta[name], 0.25))
    trained.train()
    trained.save_model()
    assert "interpolation" not in json.loads((tmp_path / "l2sp_state.json").read_text())


def test_progress_bar(trained, capsys):
    from transformers.utils import logging

    trained.args.disable_tqdm = False
    logging.enable_progress_bar()
    try:
        trained.select_interpolation((0.0, 1.0))
    finally:
        logging.disable_progress_bar()
    assert "Interpolation: 100%" in capsys.readouterr().err


def test_lora_is_scaled(tiny_bert_dir, classification_data, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_classifier(tiny_bert_dir), peft.LoraConfig(target_modules=["query"], r=2))
    model.accepts_loss_kwargs = False
    trainer = make_trainer(tiny_bert_dir, classification_data, tmp_path, model=model, learning_rate=0.05)
    trainer.train()
    before = values(model)
    seen = iter([0.2, 0.9, 0.1])
    trainer.evaluate = lambda: {"eval_score": next(seen)}
    assert trainer.select_interpolation((0.0, 0.5, 1.0), "score").alpha == 0.5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (0.5 if "lora_B" in name else 1.0)), name


# --- refused --------------------------------------------------------------------------------------------------------


def test_failure_leaves_the_fine_tuned_weights(trained):
    theta = values(trained.model)
    calls = []

    def evaluate():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"eval_loss": 1.0}

    trained.evaluate = evaluate
    with pytest.raises(KeyboardInterrupt):
        trained.select_interpolation()
    assert same(trained.model, theta) and trained._l2sp_chosen is None and "log" not in vars(trained)
    trained.evaluate = lambda: {"eval_loss": math.nan, "eval_f1": 1.0}
    with pytest.raises(ValueError, match="eval_loss is NaN for every α"):
        trained.select_interpolation()
    with pytest.raises(ValueError, match="has no eval_accuracy; it has eval_f1, eval_loss. Name one"):
        trained.select_interpolation(metric_for_best="accuracy")
    assert same(trained.model, theta)


@pytest.mark.parametrize("alphas", [[], [0.5, math.nan], [math.inf]])
def test_alphas_that_are_none(trained, alphas):
    with pytest.raises(ValueError, match="give one or more finite numbers, usually between 0 and 1"):
        trained.select_interpolation(alphas)


def test_refusals(tiny_bert_dir, classification_data, tmp_path, trained):
    before = make_trainer(tiny_bert_dir, classification_data, tmp_path)
    with pytest.raises(ValueError, match=r"call train\(\) first, with l2sp_lambda > 0 \(it is 0.01\)"):
        before.select_interpolation()
    trained.eval_dataset = None
    with pytest.raises(ValueError, match="there is none: give the trainer an eval_dataset"):
        trained.select_interpolation()
    trained.eval_dataset = classification_data
    trained.args.bf16_full_eval = True
    with pytest.raises(ValueError, match="bf16_full_eval, which round the model's weights for good"):
        trained.select_interpolation()
    trained.args.bf16_full_eval = False
    trained.l2sp_anchor.backend = FSDP2Backend(trained.accelerator)
    with pytest.raises(ValueError, match="does not work with FSDP2, which shards the model. Save the model, load it"):
        trained.select_interpolation()


def test_lambda_0_has_nothing_to_go_back_to(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(tiny_bert_dir, classification_data, tmp_path, l2sp_lambda=0.0)
    trainer.train()
    with pytest.raises(ValueError, match=r"with l2sp_lambda > 0 \(it is 0.0\)"):
        trainer.select_interpolation()

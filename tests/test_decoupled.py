"""The decoupled pull as a function, what is said and refused before it begins, and its place in a trainer's life."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp import penalty as penalty_module
from hf_l2sp.backends import DeepSpeedBackend
from hf_l2sp.decoupled import Course, course_of, pull_pass, remarks
from hf_l2sp.penalty import Term

from .helpers import load_classifier, quick

# --- the pass -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 7])
def chunk(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(penalty_module, "CHUNK", request.param)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pass_against_the_formula(chunk, dtype, as_tensor):
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    shapes = [(5, 6), (40,), (2, 3, 4), (0,), ()]
    thetas = [torch.randn(shape, dtype=dtype) for shape in shapes] + [torch.randn(6, 9, dtype=dtype).t()]
    anchors = [None, *(torch.randn_like(t) for t in thetas[1:])]
    weights = [1.0, torch.rand(40).double(), 2.5, 1.0, 0.5, torch.rand(9, 6).double()]
    factors = [0.3, 0.1, 0.25, 0.7, 0.9, 0.4]
    before = [t.clone() for t in thetas]
    terms = [Term(t, a, w) for t, a, w in zip(thetas, anchors, weights, strict=True)]
    sums = pull_pass(terms, [torch.tensor(f) for f in factors] if as_tensor else factors)
    for index, (theta, old, anchor, weight, factor) in enumerate(
        zip(thetas, before, anchors, weights, factors, strict=True)
    ):
        away = old.double() - (0 if anchor is None else anchor.double())
        torch.testing.assert_close(
            theta.double(),
            old.double() - factor * (weight * away),
            rtol=max(tolerance, 1e-7 if as_tensor else 0),
            atol=max(tolerance, 1e-7 if as_tensor else 0),
        )
        assert float(sums.squared[index]) == pytest.approx(float(away.square().sum()), rel=1e-5)
        assert float(sums.weighted[index]) == pytest.approx(float((weight * away.square()).sum()), rel=1e-5)


def test_pass_moves_leading_rows_only(chunk):
    theta, origin = torch.ones(6, 3), torch.zeros(4, 3)
    pull_pass([Term(theta, origin, 1.0, 4)], [0.25])
    assert torch.equal(theta[:4], torch.full((4, 3), 0.75)) and torch.equal(theta[4:], torch.ones(2, 3))


def test_factor_0_writes_nothing():
    theta, origin = torch.tensor([math.inf, 1.0]), torch.zeros(2)
    version = theta._version
    pull_pass([Term(theta, origin)], [0.0])
    assert theta._version == version and theta[1] == 1.0


def test_pass_reaches_through_a_parameter_and_leaves_its_gradient():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 5.0)
    pull_pass([Term(parameter.detach(), torch.zeros(3))], [0.5])
    assert torch.equal(parameter.detach(), torch.full((3,), 0.5)) and torch.equal(parameter.grad, torch.full((3,), 5))


# --- looking ahead --------------------------------------------------------------------------------------------------


def scheduler_of(*lambdas, rates=(0.1, 0.3)):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return LambdaLR(torch.optim.SGD(groups, lr=1.0), list(lambdas))


def test_course_adds_up_what_a_training_will_do_and_consumes_nothing():
    class Counting:
        calls = 0

        def __call__(self, step):
            self.calls += 1
            return 1.0

    counting = Counting()
    scheduler = scheduler_of(lambda step: 1 - step / 10, counting)
    calls, state = counting.calls, json.dumps(scheduler.state_dict(), default=str)
    falling = course_of(scheduler, [0], lambda step: 2.0, 10)
    assert falling.total == pytest.approx(0.1 * 4.0 * 5.5) and falling.peak == pytest.approx(0.4)
    both = course_of(scheduler, [0, 1], lambda step: 2.0 if step < 5 else 0.0, 10)
    assert both.total == pytest.approx(0.3 * 4.0 * 5) and both.peak == pytest.approx(1.2)
    assert counting.calls == calls and json.dumps(scheduler.state_dict(), default=str) == state


def test_course_of_a_long_training_is_sampled():
    seen = []

    def rate(step):
        seen.append(step)
        return 1.0

    scheduler = scheduler_of(rate, rate)
    seen.clear()
    course = course_of(scheduler, [0], lambda step: 1.0, 1_000_000)
    assert course.total == pytest.approx(0.2 * 1_000_000, rel=1e-3) and len(seen) <= 10_000


@pytest.mark.parametrize(("groups", "steps"), [([0], 0), ([], 10)])
def test_course_that_is_not_known(groups, steps):
    assert course_of(scheduler_of(lambda s: 1.0, lambda s: 1.0), groups, lambda step: 1.0, steps) is None
    other = StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1)
    assert course_of(other, [0], lambda step: 1.0, 10) is None


def test_remarks_carry_their_numbers():
    (said,) = remarks(Course(0.004, 0.001), 0.01, [1.0], 0)
    assert "add up to 0.004" in said and "l2sp_lambda=2.5 here" in said and "next to no effect" in said
    assert not remarks(Course(0.004, 0.001), 0.01, [1.0, 4.0], 0)  # 0.016 where w is 4
    (said,) = remarks(Course(3.0, 0.5), 10.0, [torch.tensor([1.0, 5.0])], 0)
    assert "reaches 2.5" in said and "Lower l2sp_lambda to 4 or less" in said
    (said,) = remarks(Course(3.0, 1e-3), 10.0, [1.0], 7)
    assert "7 of the pulled parameters are kept in 16 bits" in said and "0.4%" in said
    assert not remarks(Course(3.0, 0.1), 10.0, [1.0], 7) and not remarks(None, 10.0, [1.0], 0)
    assert not remarks(Course(0.0, 0.0), 10.0, [torch.zeros(0)], 0)  # a learning rate of 0


# --- in a trainer ---------------------------------------------------------------------------------------------------


def make_trainer(model, data, folder, cls=L2SPTrainer, optimizers=(None, None), callbacks=(), **changes):
    values = quick(folder, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4)
    if issubclass(cls, L2SPTrainer):
        values |= {"l2sp_mode": "decoupled", "l2sp_lambda": 5.0}
    kind = L2SPTrainingArguments if issubclass(cls, L2SPTrainer) else TrainingArguments
    args = kind(**{**values, **changes})
    return cls(model, args, train_dataset=data, optimizers=optimizers, callbacks=list(callbacks))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(values(first).values(), values(second).values(), strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_pull_of_the_whole_way_keeps_the_model_at_theta0(tiny_bert_dir, classification_data, tmp_path, optim):
    """lr·2·λ = 1: every step starts from θ0 again, so that θ − θ0 is the last step alone."""
    model, last = load_classifier(tiny_bert_dir), {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)

            def keep(*_):
                last.update(values(model))

            # Registered before the trainer's own: sees the weights before the pull.
            inner.register_step_pre_hook(keep)

    options = {"optim": optim, "l2sp_lambda": 50.0, "lr_scheduler_type": "constant"}
    origin = values(model)
    trainer = make_trainer(model, classification_data, tmp_path, callbacks=[Watch()], **options)
    trainer.train()
    steps = [log["l2sp_distance"] for log in trainer.state.log_history if "l2sp_distance" in log]
    assert steps[0] == 0.0 and steps[1] > 0
    moved = math.sqrt(sum(float((last[n] - origin[n]).square().sum()) for n in origin if "classifier" not in n))
    assert steps[-1] == pytest.approx(moved, rel=1e-5)
    if optim == "sgd":  # no memory: the distance is lr·‖g‖ of one step, not of all
        assert max(steps) < 1e-2 * max(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)


def test_lambda_0_is_the_plain_trainer_bit_for_bit(tiny_bert_dir, classification_data, tmp_path):
    ours, plain = load_classifier(tiny_bert_dir), load_classifier(tiny_bert_dir)
    trainer = make_trainer(ours, classification_data, tmp_path / "ours", l2sp_lambda=0.0, weight_decay=0.1)
    trainer.train()
    other = make_trainer(plain, classification_data, tmp_path / "plain", Trainer, weight_decay=0.1)
    other.train()
    assert same(ours, plain) and trainer.l2sp_anchor is None
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    histories = [
        [{k: v for k, v in e.items() if k not in drop} for e in t.state.log_history] for t in (trainer, other)
    ]
    assert histories[0] == histories[1]


def test_optimizer_pulls_only_while_the_trainer_trains(tiny_bert_dir, classification_data, tmp_path):
    model = load_classifier(tiny_bert_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = make_trainer(model, classification_data, tmp_path, optimizers=(optimizer, None))
    for _ in range(2):
        trainer.train()
        assert not optimizer._optimizer_step_pre_hooks
    before = values(model)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


class AwayWithoutGradients(TrainerCallback):
    """All weights are 1 away from where they were at first, and no gradient ever moves them."""

    done = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.done:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
        self.done = True

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad = None


def test_second_training_pulls_once_per_step(tiny_bert_dir, classification_data, tmp_path):
    model = load_classifier(tiny_bert_dir)
    origin = values(model)
    options = {"l2sp_lambda": 10.0, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = make_trainer(model, classification_data, tmp_path, callbacks=[AwayWithoutGradients()], **options)
    trainer.train()
    trainer.train()
    for name, parameter in model.named_parameters():
        left = 1.0 if "classifier" in name else 0.8**2
        torch.testing.assert_close(parameter.detach(), origin[name] + left, rtol=1e-5, atol=1e-5)


def test_hook_goes_with_an_interrupted_training(tiny_bert_dir, classification_data, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = load_classifier(tiny_bert_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = make_trainer(model, classification_data, tmp_path, optimizers=(optimizer, None), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_the_scaler_does_not_pull(tiny_bert_dir, classification_data, tmp_path, fused):
    seen = []

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).grad.view(-1)[0] = float("inf")

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(values(model))

    model = load_classifier(tiny_bert_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused, weight_decay=0.0)
    assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) is fused
    options = {"optimizers": (optimizer, None), "callbacks": [Overflow()], "max_grad_norm": 0.0}
    trainer = make_trainer(model, classification_data, tmp_path, lr_scheduler_type="constant", **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer.train()
    seen.append(values(model))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, False, True, True]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert trainer.accelerator.scaler.get_scale() == 32.0
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all("l2sp_penalty" in log for log in logs)
    assert logs[1]["l2sp_penalty"] == pytest.approx(logs[2]["l2sp_penalty"], rel=1e-6)
    assert logs[1]["l2sp_distance"] > 0


def test_parameter_without_a_gradient_is_pulled_and_a_frozen_one_is_not(tiny_bert_dir, classification_data, tmp_path):
    model = load_classifier(tiny_bert_dir)
    origin = values(model)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    options = {"l2sp_lambda": 10.0, "lr_scheduler_type": "constant", "max_steps": 1}
    trainer = make_trainer(model, classification_data, tmp_path, callbacks=[AwayWithoutGradients()], **options)
    trainer.train()
    for name, parameter in model.named_parameters():
        kept = 1.0 if "position" in name or "classifier" in name else 0.8
        torch.testing.assert_close(parameter.detach(), origin[name] + kept, rtol=1e-5, atol=1e-5)


def test_what_is_unfrozen_later_is_pulled_from_then_on(tiny_bert_dir, classification_data, tmp_path):
    model = load_classifier(tiny_bert_dir)
    embeddings = model.bert.embeddings
    embeddings.requires_grad_(False)
    names = []

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            embeddings.requires_grad_(state.global_step >= 2)

        def on_step_end(self, args, state, control, **kwargs):
            names.append(len(trainer._l2sp_last[1]))

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = make_trainer(model, classification_data, tmp_path, optimizers=(optimizer, None), callbacks=[Unfreeze()])
    trainer.train()
    assert names[0] == names[1] and names[2] == names[3] == names[0] + 5


def test_schedule_ends_at_0_without_a_pull(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, l2sp_schedule="linear")
    trainer.train()
    assert [log["l2sp_lambda"] for log in trainer.state.log_history if "loss" in log] == [5.0, 3.75, 2.5, 1.25]


def test_lambda_set_to_0_while_training_ends_the_pull(tiny_bert_dir, classification_data, tmp_path):
    class SwitchOff(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.l2sp_lambda = 5.0 if state.global_step < 2 else 0.0

    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, callbacks=[SwitchOff()])
    trainer.train()
    assert ["l2sp_lambda" in log for log in trainer.state.log_history if "loss" in log] == [True, True, False, False]


def test_loss_outside_a_step_is_the_task_s(tiny_bert_dir, classification_data, tmp_path, move):
    model = load_classifier(tiny_bert_dir, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = make_trainer(model, classification_data, tmp_path)
    trainer.train()
    move(model).train()
    batch = {k: torch.stack([row[k] for row in classification_data[:4]]) for k in classification_data[0]}
    assert torch.equal(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


def test_weight_decay_leaves_anchored_parameters_alone(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, weight_decay=0.1)
    trainer.train()
    decayed, rest = trainer.optimizer.param_groups
    assert [len(decayed["params"]), decayed["weight_decay"], rest["weight_decay"]] == [1, 0.1, 0.0]
    assert decayed["params"][0] is trainer.model.classifier.weight


def test_state_file_and_report_tell_the_mode(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "l2sp_state.json").read_text())["mode"] == "decoupled"
    report = trainer.l2sp_drift_report()
    assert report.settings["mode"] == "decoupled" and report.history[-1]["l2sp_penalty"] > 0
    trainer.create_model_card()
    assert "| mode | decoupled |" in (tmp_path / "README.md").read_text()


def test_picture_leaves_a_penalty_out_that_is_not_in_the_loss(tiny_bert_dir, classification_data, tmp_path):
    imread = pytest.importorskip("matplotlib.image").imread
    for mode in ("loss", "decoupled"):
        trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, l2sp_mode=mode)
        trainer.train()
        image = imread(trainer.l2sp_drift_report().plot(tmp_path / "drift.png"))[..., :3]
        orange = (abs(image - torch.tensor([0xD9, 0x72, 0x2E]).div(255).numpy()) < 0.01).all(-1).any()
        assert bool(orange) is (mode == "loss")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_resumed_equals_uninterrupted_bit_for_bit(tiny_bert_dir, classification_data, tmp_path, optim):
    whole, resumed = load_classifier(tiny_bert_dir), load_classifier(tiny_bert_dir)
    options = {"save_strategy": "steps", "save_steps": 2, "l2sp_schedule": "cosine", "optim": optim, "l2sp_beta": 1.0}
    first = make_trainer(whole, classification_data, tmp_path, **options)
    first.train()
    second = make_trainer(resumed, classification_data, tmp_path, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole, resumed)
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (first, second)]
    assert logs[0] == logs[1]


# --- said and refused -----------------------------------------------------------------------------------------------


def test_no_effect_and_overshoot_are_said_once_with_numbers(tiny_bert_dir, classification_data, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        weak = {"l2sp_lambda": 0.01, "learning_rate": 5e-5, "lr_scheduler_type": "constant"}
        make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, **weak).train()
    (said,) = [r.getMessage() for r in caplog.records if "decoupled" in r.getMessage()]
    assert "add up to 4e-06" in said and "l2sp_lambda=2.5e+03 here" in said
    caplog.clear()
    with caplog.at_level("WARNING"):
        strong = {"l2sp_lambda": 100.0, "lr_scheduler_type": "constant"}
        make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, **strong).train()
    (said,) = [r.getMessage() for r in caplog.records if "decoupled" in r.getMessage()]
    assert "reaches 2" in said and "Lower l2sp_lambda to 50 or less" in said
    caplog.clear()
    with caplog.at_level("WARNING"):
        make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path).train()
    assert "decoupled" not in caplog.text


def test_16_bit_weights_are_told_of(tiny_bert_dir, classification_data, tmp_path, caplog):
    model = load_classifier(tiny_bert_dir).to(torch.bfloat16)
    with caplog.at_level("WARNING"):
        make_trainer(model, classification_data, tmp_path, learning_rate=3e-4).train()
    assert "39 of the pulled parameters are kept in 16 bits" in caplog.text


def test_deepspeed_is_refused_before_anything(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path)
    trainer._l2sp_prepare_anchor()
    trainer.l2sp_anchor.backend = DeepSpeedBackend(trainer.accelerator)
    with pytest.raises(ValueError, match="does not work with DeepSpeed.*Set l2sp_mode='loss'.*DDP or FSDP"):
        trainer._l2sp_check_decoupled()


def test_lora_is_refused(tiny_bert_dir, classification_data, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=2)
    model = peft.get_peft_model(load_classifier(tiny_bert_dir), config)
    before = values(model)
    trainer = make_trainer(model, classification_data, tmp_path)
    for _ in range(2):  # a second try does not slip through
        with pytest.raises(ValueError, match="does not work with LoRA: .*s·BA.*Set l2sp_mode='loss'"):
            trainer.train()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


class AdamWScheduleFree(torch.optim.AdamW):
    """Has the name of the schedulefree package's."""


class NoHooks:
    def __init__(self, model):
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]

    def step(self): ...

    def zero_grad(self): ...


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda model: AdamWScheduleFree(model.parameters()), "AdamWScheduleFree, which steps from averages"),
        (NoHooks, "NoHooks, which is no torch.optim.Optimizer"),
        (lambda model: without_rate(model), r"SGD without a learning rate of its own \(lr=None\)"),
        (lambda model: torch.optim.SGD(model.classifier.parameters(), lr=0.1), "has none of the parameters"),
    ],
)
def test_optimizers_that_cannot_pull_are_refused(tiny_bert_dir, classification_data, tmp_path, make, cause):
    model = load_classifier(tiny_bert_dir)
    before = values(model)
    trainer = make_trainer(
        model,
        classification_data,
        tmp_path,
        optimizers=(make(model), None),
        lr_scheduler_type="constant",
        max_steps=1,
    )
    with pytest.raises(ValueError, match=f"l2sp_mode='decoupled'.*{cause}"):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def without_rate(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer

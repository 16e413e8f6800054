"""`l2sp_schedule="auto"`: the rule against its formula and fixed point, labels, losses, what it leaves as it was."""

from __future__ import annotations

import json
import math
import random

import datasets
import pytest
import torch
from transformers import BertForSequenceClassification

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.auto import (
    CERTAIN,
    CHANCE,
    FITTED,
    HELD_LATE,
    LARGEST,
    LARGEST_UNEXPLAINED,
    SHORTEST,
    SMALLEST,
    SPAN,
    UNKNOWN,
    AutoStrength,
    early_pull,
    last_layer_worth,
    learned_by_heart,
)
from hf_l2sp.auto_mixin import LOOKED_AT, in_nats, label_entropy
from hf_l2sp.press import Told, told

from .helpers import quick

STEPS = 80


def known(unexplained=0.7, added=0.0, significance=CERTAIN):
    return Told(unexplained, significance, added)


# --- the rule -------------------------------------------------------------------------------------------------------


def test_it_is_its_formula():
    """Written out: the bias-corrected moving average, the hinge."""
    losses = [1.6, 1.5, 1.1, 0.4, 0.1, 0.05, 0.02, 0.03, 0.2, 0.01]
    auto = AutoStrength(entropy=1.5, unexplained=0.8)
    memory = 1 - 1 / max(SHORTEST, SPAN * STEPS)
    for count in range(1, len(losses) + 1):
        weights = [memory ** (count - 1 - number) for number in range(count)]
        average = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        expected = max(SMALLEST, (1 - 0.8) * (1 - average / (FITTED * 0.8**2 * 1.5)))
        assert math.isclose(auto.update(losses[count - 1], count, STEPS), expected, rel_tol=1e-9)
    assert auto.loss / auto.weight == pytest.approx(average)


def test_it_is_off_until_the_examples_are_fitted():
    auto = AutoStrength(entropy=1.0, unexplained=1.0)
    for _ in range(200):
        assert auto.update(1.01 * FITTED, 0, STEPS) == SMALLEST
    values = [auto.update(0.0, 0, STEPS) for _ in range(200)]
    assert values == sorted(values) and math.isclose(values[-1], LARGEST_UNEXPLAINED, rel_tol=1e-3)
    for _ in range(200):  # and nothing is left of that
        auto.update(1.0, 0, STEPS)
    assert auto.value < 1.01 * SMALLEST


@pytest.mark.parametrize("curvature", [0.2, 5.0])
def test_its_fixed_point_is_that_of_a_model_that_answers(curvature):
    """Loss ½c(1 − θ)², θ0 = 0: the minimiser of loss + λθ² is c/(c + 2λ)."""
    auto = AutoStrength(entropy=2.0, unexplained=0.8)

    def loss(strength):
        return 0.5 * curvature * (2 * strength / (curvature + 2 * strength)) ** 2

    auto.update(3.0, 0, STEPS)
    for _ in range(600):
        auto.update(loss(auto.value), 0, STEPS)
    average = loss(auto.value)
    assert 0.01 < auto.value < 0.2
    assert math.isclose(auto.value, 0.2 * (1 - average / (2.0 * 0.8**2 * FITTED)), rel_tol=1e-6)


def test_without_known_labels_it_goes_by_the_largest_loss():
    """In the loss's own units: a thousand times the loss, the same λ."""
    runs = []
    for scale in (1.0, 1000.0):
        auto = AutoStrength()
        runs.append([auto.update(scale * 2.0 * 0.8**step, 0, STEPS) for step in range(40)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-9) and runs[0][0] == SMALLEST < runs[0][-1]
    # A model that was trained before has little to lose from the start.
    auto = AutoStrength(entropy=1.6)
    for _ in range(50):
        auto.update(0.02, 0, STEPS)
    assert auto.value == SMALLEST


def test_what_the_pretrained_model_tells_may_be_fitted():
    """Half as much unexplained, a quarter of the loss."""
    for share, most in ((1.0, LARGEST_UNEXPLAINED), (0.5, LARGEST), (0.25, LARGEST)):
        auto = AutoStrength(entropy=1.0, unexplained=share)
        for loss in (1.0, *[0.9 * FITTED * share**2] * 200):
            auto.update(loss, 0, STEPS)
        assert auto.value == pytest.approx(0.1 * most, rel=1e-3)
    auto = AutoStrength(entropy=1.0, unexplained=0.0)
    assert [auto.update(loss, 0, STEPS) for loss in (1.0, 1e-3, 0.0)] == [SMALLEST] * 3


@pytest.mark.parametrize(
    ("share", "most"),
    [(0.0, LARGEST), (0.5, LARGEST), (0.75, 0.25), (0.9, 0.1), (1.0, LARGEST_UNEXPLAINED), (2.0, LARGEST_UNEXPLAINED)],
)
def test_it_pulls_no_harder_than_the_pretrained_model_is_worth(share, most):
    auto = AutoStrength(entropy=1.0, unexplained=share)
    for loss in (1.0, *[0.0] * 300):
        auto.update(loss, 0, STEPS)
    assert auto.most == pytest.approx(most, rel=1e-9)
    assert auto.value == pytest.approx(most if share else SMALLEST, rel=1e-6)


def test_a_longer_training_is_looked_at_for_longer():
    short, long = AutoStrength(1.0), AutoStrength(1.0)
    for step in range(60):
        short.update(1.0 if step < 30 else 0.0, 0, STEPS)
        long.update(1.0 if step < 30 else 0.0, 0, 100 * STEPS)
    assert short.value > 0.85 * LARGEST and long.value == SMALLEST


def test_the_early_pull_is_let_go():
    """In a straight line to 0 at 0.8 of the steps; where the late rule asks for more, that counts."""
    auto = AutoStrength(entropy=1.0)
    auto.begin(known(0.8, 0.1), passes=14.4)
    assert auto.value == pytest.approx(0.24)
    assert [auto.update(2.0, step, 100) for step in (20, 40, 79)] == pytest.approx([0.18, 0.12, 0.003])
    assert auto.update(2.0, 80, 100) == auto.update(2.0, 100, 100) == SMALLEST
    for _ in range(300):
        auto.update(0.0, 40, 100)
    assert auto.value == pytest.approx(0.2, rel=1e-3) and auto.update(0.0, 8, 100) == pytest.approx(0.216)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (known(1.0, -0.2, significance=0.0), 1.0),  # all is learned by heart
        (known(1.3, -0.2, significance=-math.inf), 1.0),
        (known(0.9, 0.0, significance=2.0), 0.5),
        (known(0.9, 0.0, significance=CERTAIN), 0.0),
        (known(0.5, -0.2, significance=math.inf), 0.0),
        (known(0.5, 0.03), 0.25),  # a quarter of what makes the last layer worth all
        (known(0.5, 0.12), 1.0),
        (known(0.5, 0.7), 1.0),
        (known(0.5, 0.03, significance=2.5), 0.25),
        (known(0.5, 0.03, significance=1.5), 0.75),
    ],
)
def test_the_late_pull_is_let_go_but_for_what_is_kept(told, kept):
    """In a straight line at first, then it stays."""
    auto = AutoStrength(entropy=1.0)
    auto.begin(told, passes=0.0)
    assert auto.kept == pytest.approx(kept, rel=1e-9) and auto.value == SMALLEST
    for loss in (1.0, *[0.0] * 400):
        auto.update(loss, 0, STEPS)
    for step in range(STEPS + 1):
        expected = max(SMALLEST, auto.most * max(kept, 1.0 - step / (HELD_LATE * STEPS)))
        assert auto.update(0.0, step, STEPS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("told", "passes", "expected"),
    [
        (known(0.6, 0.1), 16.0, 0.3),
        (known(0.6, 0.05), 16.0, 0.3 / 16),
        (known(0.3, 0.1), 99.0, 0.3 / 16),
        (known(0.7, 0.3), 12.0, 0.15),
        (known(0.7, 0.3), 8.0, 0.0),
        (known(0.7, 0.3), 0.1, 0.0),
        (known(0.7, -0.3), 30.0, 0.0),
        (known(2.0, 0.03), 30.0, 0.3 / 16),
    ],
)
def test_the_early_pull_is_what_the_last_layer_adds_and_there_is_time_for(told, passes, expected):
    auto = AutoStrength()
    auto.begin(told, passes)
    assert auto.unexplained == told.unexplained and auto.early == pytest.approx(expected, abs=1e-12)
    assert auto.value == max(SMALLEST, auto.early)


@pytest.mark.parametrize(
    ("significance", "passes", "expected"),
    [
        (CHANCE, 16.0, LARGEST_UNEXPLAINED),
        (-math.inf, 99.0, LARGEST_UNEXPLAINED),
        (2.0, 16.0, LARGEST_UNEXPLAINED / 2),
        (CHANCE, 12.0, LARGEST_UNEXPLAINED / 2),
        (CERTAIN, 16.0, SMALLEST),
        (CHANCE, 8.0, SMALLEST),
    ],
)
def test_where_the_pretrained_model_may_tell_nothing_the_pull_is_there_from_the_start(significance, passes, expected):
    """Whatever the loss; where the late rule asks for more, that counts."""
    auto = AutoStrength(entropy=1.0)
    auto.begin(known(0.9, significance=significance), passes)
    assert auto.value == pytest.approx(expected)
    assert [auto.update(3.0, step, STEPS) for step in (1, STEPS // 2, STEPS)] == pytest.approx([expected] * 3)
    for _ in range(300):
        auto.update(0.0, 0, STEPS)
    assert auto.value == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_none_changes_nothing(loss):
    auto = AutoStrength(1.0)
    auto.update(0.3, 0, STEPS)
    before = auto.state_dict()
    assert auto.update(loss, 0, STEPS) == auto.value and auto.state_dict() == before


@pytest.mark.parametrize("entropy", [0.0, 1.1, math.inf])
def test_it_stays_within_bounds(entropy):
    auto = AutoStrength(entropy)
    for loss in [5.0, 0.0, -3.0, 0.0, 1e9, 0.0] * 20:
        assert SMALLEST <= auto.update(loss, 0, STEPS) <= LARGEST


@pytest.mark.parametrize("entropy", [1 / 3, math.inf])
def test_state_survives_json(entropy):
    auto = AutoStrength(entropy)
    auto.begin(known(2 / 3, 1 / 13, significance=5 / 3), passes=11.0)
    for loss in (2.1, 0.37, 0.01, 1 / 300):
        auto.update(loss, 0, STEPS)
    again = AutoStrength.from_state(json.loads(json.dumps(auto.state_dict(), allow_nan=False)))
    assert again == auto
    for damaged in ({"value": "x"}, {**auto.state_dict(), "loss": None}, {}):
        with pytest.raises(ValueError, match="damaged"):
            AutoStrength.from_state(damaged)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([0, 1, 2, 3]), math.log(4)),
        (torch.tensor([[0, 0, -100], [1, 0, -100]]), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        (torch.tensor([7, 7]), 0.0),
        (torch.tensor([-100, -100]), math.inf),
        (torch.tensor([0.5, 1.5]), math.inf),
        (torch.tensor([True, False]), math.inf),
    ],
)
def test_label_entropy(labels, expected):
    assert label_entropy(labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([0, 5]), True),
        (torch.tensor([True, False]), True),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), True),
        (torch.tensor([0.5, 1.0]), False),
        (torch.tensor([0.0, 2.0]), False),
    ],
)
def test_a_loss_of_numbers_is_not_in_nats(labels, expected):
    assert in_nats(labels) is expected


# --- the trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tiny_bert_dir, classification_data, tmp_path):
    def make(name="run", dropout=0.1, data=None, model=None, **settings):
        torch.manual_seed(0)
        options = {key: settings.pop(key) for key in ("eval_dataset", "data_collator", "callbacks") if key in settings}
        if model is None:
            model = BertForSequenceClassification.from_pretrained(
                tiny_bert_dir, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
            )
            model.accepts_loss_kwargs = False
        defaults = {
            "l2sp_schedule": "auto",
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 60,
            "per_device_train_batch_size": 4,
            "seed": 42,
        }
        args = L2SPTrainingArguments(**quick(tmp_path / name, **{**defaults, **settings}))
        return L2SPTrainer(model, args, train_dataset=data or classification_data, **options)

    return make


@pytest.fixture
def late(monkeypatch):
    """Too few passes over the data for a pull from the start."""
    monkeypatch.setattr("hf_l2sp.auto.FEW_PASSES", 100.0)
    monkeypatch.setattr("hf_l2sp.auto.MANY_PASSES", 200.0)


@pytest.fixture
def early(monkeypatch):
    """A last layer that adds .5, of a random model that tells next to nothing."""

    def told_more(layers, targets):
        return told(layers, targets)._replace(added=0.5 * (len(layers) > 2), significance=CERTAIN)

    monkeypatch.setattr("hf_l2sp.auto_mixin.told", told_more)


def strengths(trainer):
    return [log["l2sp_lambda"] for log in trainer.state.log_history if "l2sp_lambda" in log]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_lambda_rises_when_the_examples_are_fitted(make, late):
    trainer = make()
    trainer.train()
    values = strengths(trainer)
    assert values[0] == SMALLEST and max(values) > 1e-2 and all(SMALLEST <= value <= LARGEST for value in values)
    found = trainer._l2sp_state()["strength"]["current"]
    assert found == trainer._l2sp_auto.value == trainer.l2sp_drift_report().settings["lambda"]
    assert trainer._l2sp_auto.entropy == pytest.approx(
        label_entropy(torch.tensor([int(row["labels"]) for row in trainer.train_dataset]))
    )


def test_every_step_is_told_the_loss_of_the_step_before(make, late, monkeypatch):
    """The task loss of all micro-batches, without the penalty; λ follows one step later."""
    heard, update = [], AutoStrength.update

    def tell(self, loss, step, steps):
        heard.append(loss)
        assert step == len(heard)
        return update(self, loss, step, steps)

    monkeypatch.setattr(AutoStrength, "update", tell)
    trainer = make(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    step, losses = trainer.training_step, []

    def listen(*args, **kwargs):
        losses.append(float(step(*args, **kwargs)))
        return losses[-1] * torch.ones(())

    monkeypatch.setattr(trainer, "training_step", listen)
    trainer.train()
    penalties = [log["l2sp_penalty"] for log in trainer.state.log_history if "l2sp_penalty" in log]
    sums = [sum(losses[i : i + 2]) - penalty for i, penalty in zip(range(0, 120, 2), penalties, strict=True)]
    assert len(heard) >= 59 and heard == pytest.approx(sums[: len(heard)], abs=1e-6)
    found = trainer._l2sp_auto
    replay = AutoStrength(found.entropy, found.unexplained, by_heart=found.by_heart)
    assert strengths(trainer) == [
        SMALLEST,
        *(update(replay, loss, step, 60) for step, loss in enumerate(heard[:59], 1)),
    ]


def test_while_lambda_is_next_to_zero_it_is_plain_fine_tuning(make, late, monkeypatch):
    """No row is held out, no random number drawn: with λ off the weights are those of Trainer, bit for bit."""
    monkeypatch.setattr(L2SPTrainer, "_l2sp_strength", lambda self: 0.0)
    auto = make("auto")
    auto.train()
    plain = make("plain", l2sp_lambda=0.0, l2sp_schedule="constant")
    plain.train()
    assert same(auto, plain) and auto._l2sp_auto.value > SMALLEST


def check_resumed_is_uninterrupted(make, *steps):
    """At ends of epochs: Trainer of transformers 4 goes on elsewhere in the middle of one. Returns the whole run."""
    common = {"save_strategy": "steps", "save_steps": 24, "num_train_epochs": 14, "max_steps": -1}
    whole = make("whole", **common)
    whole.train()
    for step in steps:
        resumed = make("resumed", **common)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert same(whole, resumed) and resumed._l2sp_auto == whole._l2sp_auto
        assert strengths(resumed) == strengths(whole)
    return whole


def test_resumed_is_uninterrupted(make, late):
    assert max(strengths(check_resumed_is_uninterrupted(make, 24, 72))) > 1e-3


def test_one_by_four_is_four_by_one(make, late):
    one = make("one", dropout=0.0)
    four = make("four", dropout=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one.train()
    four.train()
    assert max(strengths(one)) > 1e-2
    torch.testing.assert_close(strengths(four), strengths(one), rtol=1e-2, atol=1e-5)


def test_the_starting_value_does_not_matter(make, late):
    trainers = []
    for start in (1e-3, 0.1, 10.0):
        trainers.append(make(f"{start}", l2sp_lambda=start))
        trainers[-1].train()
    assert strengths(trainers[0])[-1] > SMALLEST
    assert same(trainers[0], trainers[1]) and same(trainers[0], trainers[2])


def test_evaluation_rows_do_not_enter(make, late, classification_data):
    alone = make("alone")
    alone.train()
    beside = make("beside", eval_dataset=classification_data[:5])
    beside.train()
    assert same(alone, beside)


def test_a_stream_goes_by_its_largest_loss(make, classification_data):
    stream = datasets.IterableDataset.from_generator(lambda: iter(classification_data))
    trainer = make(data=stream, max_steps=6)
    trainer.train()
    assert trainer._l2sp_auto.entropy == math.inf and trainer._l2sp_auto.largest > 0.0


def look(trainer, steps=60):
    """What is found before the first step."""
    auto, trainer.state.max_steps = AutoStrength(), steps
    trainer._l2sp_prepare_anchor()
    trainer._l2sp_look_at_labels(auto, trainer.get_train_dataloader())
    return auto


@pytest.mark.parametrize(
    ("labels", "finite"), [(torch.tensor(1), True), (torch.tensor(1.0), False), (torch.ones(3), False)]
)
def test_labels_are_classes_or_not(make, classification_data, labels, finite):
    auto = look(make(data=[{**row, "labels": labels} for row in classification_data]))
    assert math.isfinite(auto.entropy) == finite and auto.unexplained == UNKNOWN  # they are all the same


@pytest.mark.parametrize(
    ("labels", "off"), [(torch.tensor([0, 1, -100]), True), (torch.tensor([0.0, 1.0, 1.0]), False)]
)
def test_with_a_class_per_word_it_stays_next_to_zero(make, classification_data, labels, off, caplog):
    caplog.set_level("WARNING", logger="hf_l2sp")
    auto = look(make(data=[{**row, "labels": labels} for row in classification_data]))
    assert caplog.text.count("leaves λ next to 0 where every word") == off
    for loss in (1.0, *[0.0] * 200):
        auto.update(loss, 0, STEPS)
    assert (auto.value == SMALLEST) == off


def test_labels_that_are_not_to_be_seen(make):
    auto = look(make(data_collator=lambda rows: [row["input_ids"] for row in rows]))
    assert auto == AutoStrength()


def test_what_is_unexplained_is_that_of_the_pretrained_model(make, classification_data):
    """By hand: mean hidden states without dropout of as many rows as a training of this length looks at."""
    trainer = make(max_steps=50)
    rows = random.Random(42).sample(range(len(classification_data)), len(classification_data))
    rows = rows[: int(LOOKED_AT * 50 * 4)]
    model = BertForSequenceClassification.from_pretrained(trainer.model.config._name_or_path, num_labels=3).eval()
    batch = trainer.data_collator([classification_data[row] for row in rows])
    with torch.no_grad():
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    features = (hidden * mask).sum(1) / mask.sum(1)
    targets = torch.nn.functional.one_hot(batch["labels"], 3)
    expected = told([features], targets)
    trainer.train()
    found = trainer._l2sp_auto
    assert found.unexplained == pytest.approx(expected.unexplained, rel=1e-5) and len(rows) == 12
    assert found.by_heart == pytest.approx(learned_by_heart(expected), rel=1e-5)


def test_a_short_training_looks_at_few_examples(make):
    assert look(make(), steps=30).unexplained == UNKNOWN != look(make(), steps=40).unexplained


def test_lambda_begins_where_the_pretrained_model_tells_nothing(make, classification_data):
    trainer = make()
    trainer.train()
    time = (60 * 4 / len(classification_data) - 8) / 8
    assert trainer._l2sp_auto.by_heart == 1.0  # of random layers and 14 texts
    values = strengths(trainer)
    assert values[0] == min(values) == pytest.approx(time * LARGEST_UNEXPLAINED) and 0.0 < time < 1.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (lambda row: row["labels"], LARGEST_UNEXPLAINED),
        (lambda row: torch.eye(3)[row["labels"]], LARGEST_UNEXPLAINED),
        (lambda row: 0.01 * row["labels"].float(), SMALLEST),
    ],
)
def test_labels_that_are_numbers_have_no_pull_from_the_start(make, classification_data, labels, expected):
    auto = look(make(data=[{**row, "labels": labels(row)} for row in classification_data]), steps=200)
    assert auto.by_heart > 0.9 and auto.value == pytest.approx(expected, rel=0.1)


def test_lambda_begins_at_the_early_pull(make, early, classification_data):
    trainer = make()
    trainer.train()
    time = (60 * 4 / len(classification_data) - 8) / 8
    expected = time * early_pull(last_layer_worth(known(trainer._l2sp_auto.unexplained, 0.5)))
    values = strengths(trainer)
    assert values[0] == trainer._l2sp_auto.early == pytest.approx(expected, rel=1e-6) and expected > 0.01
    assert values[:20] == pytest.approx([expected * (1 - step / 48) for step in range(20)], rel=1e-5)


def test_what_is_looked_at_are_the_layers_of_the_pretrained_model(make, monkeypatch):
    """From the embeddings on, without dropout."""
    seen = []
    monkeypatch.setattr("hf_l2sp.auto_mixin.told", lambda *found: seen.append(found))
    trainer = make()
    trainer.train()
    (layers, targets), *others = seen
    assert not others and trainer._l2sp_auto.unexplained == UNKNOWN  # None: not known
    assert len(layers) == trainer.model.config.num_hidden_layers + 1
    monkeypatch.undo()
    again = make("again")
    again.train()
    assert told(layers, targets).unexplained == pytest.approx(again._l2sp_auto.unexplained, rel=1e-6)


def test_resumed_early_pull_is_uninterrupted(make, early):
    assert strengths(check_resumed_is_uninterrupted(make, 24))[30] > SMALLEST


def test_looking_at_labels_leaves_everything_as_it_was(make, classification_data):
    def collate(rows):
        torch.rand(3)
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    trainer = make(data_collator=collate)
    modes = [module.training for module in trainer.model.modules()]
    state = torch.random.get_rng_state()
    look(trainer)
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in trainer.model.modules()]


def test_without_strength_there_is_nothing_to_find():
    with pytest.raises(ValueError, match="l2sp_schedule='auto' has no effect with l2sp_lambda=0"):
        L2SPTrainingArguments("out", l2sp_schedule="auto", l2sp_lambda=0.0)


def test_the_loss_scale_does_not_enter(make, late):
    """The scale is a power of two, with which float32 gradients are scaled and unscaled exactly."""
    runs = []
    for scale in (None, 2.0**10):
        trainer = make(f"scale-{scale}", max_grad_norm=0.5, max_steps=100)
        if scale is not None:
            trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            clip = trainer.accelerator.clip_grad_norm_

            def unscaled_clip(*args, trainer=trainer, scaler=scaler, clip=clip):  # as accelerate does on a GPU
                scaler.unscale_(trainer.optimizer.optimizer)
                return clip(*args)

            trainer.accelerator.clip_grad_norm_ = unscaled_clip
        trainer.train()
        runs.append(trainer)
    plain, scaled = runs
    assert max(strengths(plain)) > 1e-2
    assert strengths(scaled) == pytest.approx(strengths(plain), rel=1e-6)

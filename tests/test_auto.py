"""`l2sp_schedule="auto"`: the rule against closed forms, the slope against autograd, what measuring leaves behind."""

from __future__ import annotations

import json
import math
from collections import Counter

import datasets
import numpy
import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.auto import LARGEST, SMALLEST, START, AutoStrength
from hf_l2sp.held_out import (
    BUDGET,
    CATCH_UP,
    EVALUATION_BUDGET,
    RELEASE,
    HeldOutSampler,
    Portions,
    by_heart,
    hold_out,
)

from .helpers import quick

# --- the rule -------------------------------------------------------------------------------------------------------


def gaussian(seed: int, dimensions: int = 600, rows: int = 900, noise: float = 3.0, prior: float = 0.2):
    """y = Xθ + noise, θ − θ0 drawn from a Gaussian; minimisers of mean loss + λ‖θ − θ0‖², with θ0 = 0."""
    draw = numpy.random.default_rng(seed)
    x = draw.normal(size=(rows, dimensions))
    theta = prior * draw.normal(size=dimensions)
    y = x @ theta + noise * draw.normal(size=rows)
    values, vectors = numpy.linalg.eigh(x.T @ x / rows)
    projected = vectors.T @ (x.T @ y / rows)

    def minimiser(strength: float) -> numpy.ndarray:
        return vectors @ (projected / (values + 2 * strength))  # of ½(y − xθ)², a mean over the rows

    return minimiser, theta, noise**2 / (2 * rows * prior**2)


def test_finds_the_evidence_optimum_of_a_gaussian_model():
    """There the evidence is largest, and a held-out loss is least, at λ = σ²/(2Nτ²)."""
    found = []
    for seed in range(6):
        minimiser, theta, expected = gaussian(seed)
        auto = AutoStrength(5.0)
        for _ in range(200):
            now = minimiser(auto.value)
            # Held-out rows without number: the gradient of their mean loss is that of ½‖θ − θ*‖².
            squared = float(now @ now)
            auto.update(float((now - theta) @ now), -2 * auto.value * squared, squared)
        now = minimiser(auto.value)
        assert abs((now - theta) @ now) < 1e-6 * (now @ now)
        found.append(auto.value / expected)
    assert abs(numpy.mean(found) - 1) < 0.05, found


def test_its_fixed_point_is_mackays_update():
    """With the optimism γ/N, λ = γ/(2N‖θ − θ0‖²)."""
    minimiser, _, _ = gaussian(0)
    auto, gamma_share = AutoStrength(1e-3), 0.4
    for _ in range(300):
        squared = float(minimiser(auto.value) @ minimiser(auto.value))
        trained = -2 * auto.value * squared
        auto.update(gamma_share + trained, trained, squared)
    squared = float(minimiser(auto.value) @ minimiser(auto.value))
    assert math.isclose(auto.value, gamma_share / (2 * squared), rel_tol=1e-6)


def test_it_is_not_summed_up_while_the_model_lags_behind():
    """a, b and the distance stay as they are, as if θ did not answer: λ stays at what makes up for them."""
    auto = AutoStrength()
    for _ in range(50):
        auto.update(0.3, -0.1, 10.0)
        assert auto.value <= 0.4 / 20.0
    assert math.isclose(auto.value, 0.4 / 20.0)


def test_it_gives_way_where_the_model_has_still_to_learn():
    """Though the held-out examples gain somewhat less by it than those that are trained on."""
    auto = AutoStrength(0.5)
    for _ in range(30):
        auto.update(-0.4, -0.55, 10.0)
    assert auto.value < 1.01 * SMALLEST
    # Where they gain less, it sets in.
    values = [auto.update(-0.1, -0.55, 10.0) for _ in range(12)]
    assert values == sorted(values)
    assert math.isclose(auto.value, 0.4 / 20.0, rel_tol=1e-3)


def test_near_the_anchor_the_same_optimism_asks_for_more():
    """Hence λ begins with a pull: a model that has gone far is left there."""
    near, far = (AutoStrength(START) for _ in range(2))
    for _ in range(12):
        near.update(-0.1, -0.55, 2.0)
        far.update(-0.1, -0.55, 20.0)
    assert math.isclose(near.value, 10 * far.value, rel_tol=1e-2) and near.value > START > far.value


def test_it_does_not_nail_the_model_to_its_anchor():
    """However long a few held-out rows ask for it."""
    auto = AutoStrength()
    for _ in range(30):
        auto.update(0.5, 0.0, 10.0)
    assert math.isclose(auto.value, 0.5 / 20.0, rel_tol=1e-3)
    for _ in range(30):
        auto.update(0.5, 0.0, 2.6)  # more than a quarter of 10
    assert math.isclose(auto.value, 0.5 / 5.2, rel_tol=1e-3)
    for _ in range(30):
        auto.update(0.5, 0.0, 1.875)  # half way from a quarter to an eighth
    assert math.isclose(auto.value, 0.5 * 0.5 / 3.75, rel_tol=1e-3)
    for _ in range(30):
        auto.update(0.5, 0.0, 1.2)
    assert auto.value < 1.01 * SMALLEST


@pytest.mark.parametrize(
    "measurement",
    [(math.nan, 0.0, 1.0), (math.inf, 0.0, 1.0), (1.0, math.nan, 1.0), (1.0, 0.0, math.nan), (1.0, 0.0, 0.0)],
)
def test_what_is_no_measurement_changes_nothing(measurement):
    auto = AutoStrength(0.1)
    auto.update(0.3, -0.1, 2.0)
    before = auto.state_dict()
    auto.update(*measurement)
    assert auto.state_dict() == before


def test_it_stays_within_bounds():
    auto = AutoStrength(0.1)
    for sign, bound in ((-1.0, SMALLEST), (1.0, LARGEST), (-1.0, SMALLEST)):
        for _ in range(40):
            assert SMALLEST <= auto.update(sign * 1e6, 0.0, 1e-9) <= LARGEST
        assert math.isclose(auto.value, bound, rel_tol=1e-3)


def test_state_survives_json():
    auto = AutoStrength(0.1)
    for slope in (0.1, -0.37, 1 / 3):
        auto.update(slope, slope - 1.0, 0.7)
    again = AutoStrength.from_state(json.loads(json.dumps(auto.state_dict())))
    assert again == auto
    with pytest.raises(ValueError, match="damaged"):
        AutoStrength.from_state({"value": "x"})


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20, 21, 24, 100, 1000])
@pytest.mark.parametrize("classes", [None, 3])
def test_held_out_rows(rows, classes):
    labels = None if classes is None else [row % classes for row in range(rows)]
    held = hold_out(rows, 10 * rows, 1, labels)
    taken, others = set(held.stand_ins), set(held.stand_ins.values())
    assert 1 <= len(taken) <= rows // 5 and not taken & others and len(others) == len(taken)
    assert held.stand_ins == hold_out(rows, 10 * rows, 1, labels).stand_ins
    if labels is not None:
        assert all(labels[a] == labels[b] for a, b in held.stand_ins.items())
        counts = Counter(labels[row] for row in taken)
        assert max(counts.values()) - min(counts.values(), default=0) <= 1 or len(counts) < classes


@pytest.mark.parametrize(
    ("rows", "epochs", "held"),
    [(19, 50, 0), (20, 1, 4), (40, 20, 8), (40, 50, 8), (40, 10, 4), (100, 20, 12), (1000, 3, 4), (1000, 5, 12)],
)
def test_fewer_rows_are_held_out_of_few_epochs(rows, epochs, held):
    assert len(hold_out(rows, rows * epochs, 1).stand_ins) == held


def test_rows_that_are_the_only_ones_of_their_class_are_kept():
    labels = list(range(18)) + [0, 1]
    held = hold_out(20, 100, 1, labels)
    assert {labels[row] for row in held.stand_ins} <= {0, 1}
    assert not hold_out(19, 100, 1).stand_ins


@pytest.mark.parametrize(
    ("epochs", "expected"), [(0.1, 2.5e-5), (1, 0.0025), (5, 0.0625), (10, 0.25), (20, 1.0), (70, 1.0)]
)
def test_how_far_rows_are_learned_by_heart(epochs, expected):
    assert math.isclose(by_heart(200, round(200 * epochs)), expected)
    first, last = RELEASE
    assert math.isclose(hold_out(200, round(200 * epochs), 1).release, first + (last - first) * expected)


@pytest.mark.parametrize("epochs", [5, 8, 20, 40])
def test_sampler(epochs):
    rows = 40
    held = hold_out(rows, rows * epochs, 3)
    sampler = HeldOutSampler(torch.utils.data.SequentialSampler(range(rows)), held)
    drawn = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    release = round(held.release * rows * epochs)
    assert not set(held.stand_ins) & set(drawn[:release])
    both = set(held.stand_ins) | set(held.stand_ins.values())
    counts = Counter(drawn)
    assert all(counts[row] == epochs for row in set(range(rows)) - both) and len(drawn) == rows * epochs
    # An early release leaves time to make up for what they have missed.
    missed = epochs * (held.release - CATCH_UP * (1 - held.release))
    assert all(abs(counts[row] - epochs) <= missed + 1 for row in both) and (missed < 1) == (epochs < 10)
    assert all(drawn[-rows:].count(row) == 1 for row in range(rows))
    assert len(sampler) == rows and sampler.data_source == range(rows)


@pytest.mark.parametrize(("batch", "steps", "rows"), [(16, 80, 11), (1, 30, 5), (16, 4000, 60), (256, 100, 60)])
@pytest.mark.parametrize(
    ("share", "budget", "limit", "processes"), [(1.0, EVALUATION_BUDGET, 0.07, 1), (RELEASE[1], BUDGET, 0.08, 2)]
)
def test_measuring_keeps_within_its_budget(batch, steps, rows, share, budget, limit, processes):
    portions = Portions.plan(rows, batch, steps, share, budget, processes)
    due = [step for step in range(steps) if portions.due(step)]
    measured = len(due) * portions.rows * processes
    assert measured <= limit * batch * steps + portions.rows * processes
    assert due and math.ceil(0.2 * steps) <= min(due) and max(due) < math.ceil(share * steps)
    seen = {p for step in due for rank in range(processes) for p in portions.positions(step, rows, rank, processes)}
    assert seen <= set(range(rows)) and (len(seen) == rows or measured < rows)


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
            "learning_rate": 2e-3,
            "max_steps": 24,
            "per_device_train_batch_size": 4,
            "seed": 42,
        }
        args = L2SPTrainingArguments(**quick(tmp_path / name, **{**defaults, **settings}))
        return L2SPTrainer(model, args, train_dataset=data or classification_data, **options)

    return make


def strengths(trainer):
    return [log["l2sp_lambda"] for log in trainer.state.log_history if "l2sp_lambda" in log]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_slope_is_that_of_autograd(classifier, classification_data):
    model = classifier.double()
    anchor = Anchor.from_model(model, exclude=["embeddings"], weights={"layer.0": 2.0})
    start = {name: value.clone() for name, value in anchor.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = {key: torch.stack([row[key] for row in classification_data]) for key in classification_data[0]}
    end = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(share):  # θ0 + share·(θ − θ0)
        values = {n: start[n] + share * (value - start[n]) if n in start else value for n, value in end.items()}
        return torch.func.functional_call(model.eval(), values, kwargs=batch).loss

    share = torch.ones((), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(share), share)
    model(**batch).loss.backward()
    found = anchor.slope()
    assert math.isclose(float(found.along), float(expected), rel_tol=1e-9) and abs(expected) > 1e-3
    # A parameter without a gradient is as far from θ0 as it is.
    model.bert.encoder.layer[0].output.dense.weight.grad = None
    squared = sum(
        (2.0 if "layer.0" in name else 1.0) * float((end[name] - value).square().sum())
        for name, value in start.items()
    )
    assert math.isclose(float(found.squared), squared, rel_tol=1e-9)
    assert math.isclose(float(anchor.slope().squared), squared, rel_tol=1e-9) and anchor.slope().along != found.along


def test_rows_without_a_pretrained_value_are_left_out(tiny_bert_dir):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir)
    model.resize_token_embeddings(110, mean_resizing=False)
    anchor = Anchor.from_model(model)
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        table += 1.0
    table.grad = torch.ones_like(table)
    assert math.isclose(float(anchor.slope().along), 100 * table.shape[1], rel_tol=1e-5)


def test_measuring_leaves_nothing_behind(make, classification_data, monkeypatch):
    """With a rule that says what it was told, the run is that of a constant λ, bit for bit."""
    asked = []

    def update(self, held, trained, squared):
        asked.append(held)
        return self.value

    monkeypatch.setattr(AutoStrength, "update", update)
    auto = make("auto", eval_dataset=classification_data[:7])
    auto.train()
    start = auto._l2sp_auto.value
    constant = make("constant", eval_dataset=classification_data[:7], l2sp_lambda=start, l2sp_schedule="constant")
    constant.train()
    assert len(asked) > 5 and same(auto, constant)
    assert auto.state.log_history[:-1] == constant.state.log_history[:-1]


def test_both_slopes_are_taken_at_the_same_weights(make, classification_data, monkeypatch):
    """Of the evaluation rows, and of the rows of all micro-batches of the step, before penalty and clipping."""
    told, expected = [], []
    monkeypatch.setattr(AutoStrength, "update", lambda self, *slopes: told.append(slopes))
    settings = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1e-3,
        "l2sp_exclude": ["embeddings"],
        "max_steps": 12,
    }
    trainer = make(dropout=0.0, eval_dataset=classification_data[:5], **settings)
    micro, steps = [], trainer.training_step

    def slope(model, batches):
        model.zero_grad()
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        return float(trainer.l2sp_anchor.slope().along)

    def training_step(model, inputs, *args, **kwargs):
        micro.append({key: value.clone() for key, value in inputs.items()})
        kept = None
        if trainer.accelerator.sync_gradients and trainer._l2sp_held is not None:
            apart = {name: parameter.grad for name, parameter in model.named_parameters()}
            trained = slope(model, micro[-2:])
            positions = trainer._l2sp_portions.positions(trainer.state.global_step, 5, 0, 1)
            rows = [classification_data[trainer._l2sp_rows.indices[position]] for position in positions]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            model.eval()
            kept = slope(model, [batch]), trained
            model.train()
            for name, parameter in model.named_parameters():
                parameter.grad = apart[name]
        result = steps(model, inputs, *args, **kwargs)
        if kept is not None:
            expected.append(kept)
        return result

    trainer.training_step = training_step
    trainer.train()
    assert len(told) == len(expected) > 3
    for (held, trained, squared), (a, b) in zip(told, expected, strict=True):
        assert math.isclose(held, a, rel_tol=1e-4, abs_tol=1e-6) and math.isclose(
            trained, b, rel_tol=1e-4, abs_tol=1e-6
        )
        assert squared > 0 and abs(held - trained) > 1e-5


def test_lambda_is_found_and_told(make):
    trainer = make(num_train_epochs=8, max_steps=-1, learning_rate=5e-3)
    trainer.train()
    values = strengths(trainer)
    assert math.isclose(values[0], START * (8 / 20) ** 2) and values[3] == values[0]  # a fifth of 48 steps begins
    assert len(set(values)) > 4 and all(SMALLEST <= value <= LARGEST for value in values)
    # Random labels cannot be learnt: held-out rows call back.
    assert max(values) > 1e-3
    assert trainer._l2sp_state()["strength"]["current"] == trainer._l2sp_auto.value == values[-1]
    assert trainer.l2sp_drift_report().settings["lambda"] == values[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_rows_are_trained_on_only_after_their_release(make, classification_data, workers):
    seen = []

    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(None)

    trainer = make(data_collator=collate, dataloader_num_workers=workers, max_steps=24, callbacks=[Watch()])
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        seen[-1] = {tuple(row.tolist()) for row in inputs["input_ids"]}
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    rows = trainer._l2sp_rows
    held = {tuple(classification_data[row]["input_ids"].tolist()) for row in rows.indices}
    release = math.ceil(rows.held.release * 24)
    assert len(held) >= 2
    assert not any(batch & held for batch in seen[: release - 1])
    assert held <= set().union(*seen[release:])


@pytest.mark.parametrize("given", [False, True])
def test_resumed_is_uninterrupted(make, classification_data, given):
    options = {"eval_dataset": classification_data[:9]} if given else {}
    common = {"save_strategy": "steps", "save_steps": 6, "num_train_epochs": 4, "max_steps": -1, **options}
    whole = make("whole", **common)
    whole.train()
    for step in (6, 12, 18):  # ends of epochs: Trainer of transformers 4 goes on elsewhere in the middle of one
        resumed = make("resumed", **common)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert same(whole, resumed) and resumed._l2sp_auto == whole._l2sp_auto
        assert strengths(resumed) == strengths(whole)


def test_one_by_four_is_four_by_one(make):
    one = make("one", dropout=0.0)
    four = make("four", dropout=0.0, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one.train()
    four.train()
    assert one._l2sp_portions == four._l2sp_portions
    torch.testing.assert_close(strengths(four), strengths(one), rtol=1e-3, atol=1e-7)


def test_the_starting_value_does_not_matter(make):
    trainers = []
    for start in (1e-3, 0.1, 10.0):
        trainers.append(make(f"{start}", l2sp_lambda=start))
        trainers[-1].train()
    assert strengths(trainers[0])[-1] > SMALLEST
    assert same(trainers[0], trainers[1]) and same(trainers[0], trainers[2])


def test_evaluation_rows_cost_no_training_rows(make, classification_data):
    trainer = make(eval_dataset={"first": classification_data[:5], "second": classification_data})
    loader = trainer.get_train_dataloader()
    assert not isinstance(loader.get_sampler(), HeldOutSampler)
    assert len(trainer._l2sp_rows.indices) == 5
    assert isinstance(make().get_train_dataloader().get_sampler(), HeldOutSampler)


def test_classes_are_found_in_a_dataset(make, classification_data):
    data = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in classification_data])
    trainer = make(data=data)
    trainer.get_train_dataloader()
    held = trainer._l2sp_rows.held
    assert all(data[a]["labels"] == data[b]["labels"] for a, b in held.stand_ins.items())
    trainer.train()


def test_too_few_rows_to_hold_any_out(make, classification_data, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("hf_l2sp.auto_mixin"), "level", 30)
    trainer = make(data=classification_data[:6], max_steps=3, l2sp_lambda=0.02)
    trainer.train()
    assert strengths(trainer) == [0.02] * 3
    assert "nothing to hold out of 6 training examples" in caplog.text


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("label", "epochs", "expected"),
    [
        (torch.tensor(1), 40, START),
        (torch.tensor(1), 10, START / 4),
        (torch.tensor(1), 0.05, SMALLEST),  # next to nothing, but never 0
        (torch.tensor(1.0), 40, SMALLEST),  # regression: a loss of another size
        (torch.ones(10, dtype=torch.long), 40, SMALLEST),  # a class per token
        (torch.ones(3), 40, SMALLEST),  # many classes at a time
    ],
)
def test_it_begins_with_a_pull_where_rows_of_a_class_are_learned_by_heart(
    make, classification_data, label, epochs, expected, given
):
    data = [{**row, "labels": label} for row in classification_data]
    trainer = make(data=data, num_train_epochs=epochs, max_steps=-1, **({"eval_dataset": data[:9]} if given else {}))
    trainer.get_train_dataloader()
    assert math.isclose(trainer._l2sp_first_strength(trainer._l2sp_rows), expected)


def test_it_begins_without_a_pull_where_labels_are_not_to_be_seen(make, classification_data):
    trainer = make(max_steps=400, data_collator=lambda rows: [row["input_ids"] for row in rows])
    trainer.get_train_dataloader()
    assert trainer._l2sp_first_strength(trainer._l2sp_rows) == SMALLEST
    stream = datasets.IterableDataset.from_generator(lambda: iter(classification_data))
    trainer = make(data=stream, eval_dataset=classification_data[:5], max_steps=400)
    trainer.get_train_dataloader()
    assert trainer._l2sp_first_strength(trainer._l2sp_rows) == SMALLEST


def test_a_stream_needs_an_evaluation_set(make, classification_data):
    stream = datasets.IterableDataset.from_generator(lambda: iter(classification_data))
    with pytest.raises(ValueError, match="without a length. Give the trainer an eval_dataset"):
        make(data=stream).train()
    trainer = make(data=stream, eval_dataset=classification_data[:5], max_steps=4)
    trainer.train()
    assert trainer._l2sp_auto.measured > 0


def test_without_strength_there_is_nothing_to_find():
    with pytest.raises(ValueError, match="l2sp_schedule='auto' has no effect with l2sp_lambda=0"):
        L2SPTrainingArguments("out", l2sp_schedule="auto", l2sp_lambda=0.0)


def test_the_loss_scale_does_not_enter(make):
    """The scale is a power of two, with which float32 gradients are scaled and unscaled exactly."""
    runs = []
    for scale in (None, 2.0**10):
        trainer = make(f"scale-{scale}", learning_rate=5e-3, max_grad_norm=0.5, max_steps=48)
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
    assert len(set(strengths(plain))) > 4 and max(strengths(plain)) > 1e-3
    assert strengths(scaled) == pytest.approx(strengths(plain), rel=1e-6)
    assert scaled._l2sp_auto.held == pytest.approx(plain._l2sp_auto.held, rel=1e-6)

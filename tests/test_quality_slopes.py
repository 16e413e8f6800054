"""The quality study's rule from held-out examples: against closed forms; which rows it holds out, and for how long."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification

from hf_l2sp import L2SPTrainingArguments

from .helpers import quick

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

from _quality_held_out import (  # noqa: E402  # isort: skip
    BUDGET,
    CATCH_UP,
    EVALUATION_BUDGET,
    RELEASE,
    HeldOutSampler,
    Portions,
    by_heart,
    hold_out,
)
from _quality_slopes import LARGEST, SMALLEST, START, SlopeRule, SlopeTrainer  # noqa: E402  # isort: skip


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
        rule = SlopeRule(5.0)
        for _ in range(200):
            now = minimiser(rule.value)
            # Held-out rows without number: the gradient of their mean loss is that of ½‖θ − θ*‖².
            squared = float(now @ now)
            rule.update(float((now - theta) @ now), -2 * rule.value * squared, squared)
        now = minimiser(rule.value)
        assert abs((now - theta) @ now) < 1e-6 * (now @ now)
        found.append(rule.value / expected)
    assert abs(numpy.mean(found) - 1) < 0.05, found


def test_its_fixed_point_is_mackays_update():
    """With the optimism γ/N, λ = γ/(2N‖θ − θ0‖²)."""
    minimiser, _, _ = gaussian(0)
    rule, gamma_share = SlopeRule(1e-3), 0.4
    for _ in range(300):
        squared = float(minimiser(rule.value) @ minimiser(rule.value))
        trained = -2 * rule.value * squared
        rule.update(gamma_share + trained, trained, squared)
    squared = float(minimiser(rule.value) @ minimiser(rule.value))
    assert math.isclose(rule.value, gamma_share / (2 * squared), rel_tol=1e-6)


def test_it_is_not_summed_up_while_the_model_lags_behind():
    """a, b and the distance stay as they are, as if θ did not answer: λ stays at what makes up for them."""
    rule = SlopeRule(SMALLEST)
    for _ in range(50):
        rule.update(0.3, -0.1, 10.0)
        assert rule.value <= 0.4 / 20.0
    assert math.isclose(rule.value, 0.4 / 20.0)


def test_it_gives_way_where_the_model_has_still_to_learn():
    """Though the held-out examples gain somewhat less by it than those that are trained on."""
    rule = SlopeRule(0.5)
    for _ in range(30):
        rule.update(-0.4, -0.55, 10.0)
    assert rule.value < 1.01 * SMALLEST
    # Where they gain less, it sets in.
    values = []
    for _ in range(12):
        rule.update(-0.1, -0.55, 10.0)
        values.append(rule.value)
    assert values == sorted(values)
    assert math.isclose(rule.value, 0.4 / 20.0, rel_tol=1e-3)


def test_near_the_anchor_the_same_optimism_asks_for_more():
    """Hence λ begins with a pull: a model that has gone far is left there."""
    near, far = (SlopeRule(START) for _ in range(2))
    for _ in range(12):
        near.update(-0.1, -0.55, 2.0)
        far.update(-0.1, -0.55, 20.0)
    assert math.isclose(near.value, 10 * far.value, rel_tol=1e-2) and near.value > START > far.value


def test_it_does_not_nail_the_model_to_its_anchor():
    """However long a few held-out rows ask for it."""
    rule = SlopeRule(SMALLEST)
    for _ in range(30):
        rule.update(0.5, 0.0, 10.0)
    assert math.isclose(rule.value, 0.5 / 20.0, rel_tol=1e-3)
    for _ in range(30):
        rule.update(0.5, 0.0, 2.6)  # more than a quarter of 10
    assert math.isclose(rule.value, 0.5 / 5.2, rel_tol=1e-3)
    for _ in range(30):
        rule.update(0.5, 0.0, 1.875)  # half way from a quarter to an eighth
    assert math.isclose(rule.value, 0.5 * 0.5 / 3.75, rel_tol=1e-3)
    for _ in range(30):
        rule.update(0.5, 0.0, 1.2)
    assert rule.value < 1.01 * SMALLEST


@pytest.mark.parametrize(
    "measurement",
    [(math.nan, 0.0, 1.0), (math.inf, 0.0, 1.0), (1.0, math.nan, 1.0), (1.0, 0.0, math.nan), (1.0, 0.0, 0.0)],
)
def test_what_is_no_measurement_changes_nothing(measurement):
    rule = SlopeRule(0.1)
    rule.update(0.3, -0.1, 2.0)
    before = dict(vars(rule))
    rule.update(*measurement)
    assert dict(vars(rule)) == before


def test_it_stays_within_bounds():
    rule = SlopeRule(0.1)
    for sign, bound in ((-1.0, SMALLEST), (1.0, LARGEST), (-1.0, SMALLEST)):
        for _ in range(40):
            rule.update(sign * 1e6, 0.0, 1e-9)
            assert SMALLEST <= rule.value <= LARGEST
        assert math.isclose(rule.value, bound, rel_tol=1e-3)


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


@pytest.mark.parametrize("given", [False, True])
def test_trainer_measures_the_slope_of_autograd(tiny_bert_dir, classification_data, tmp_path, monkeypatch, given):
    told = []
    update = SlopeRule.update

    def tell(self, *found):
        told.append(found)
        update(self, *found)

    monkeypatch.setattr(SlopeRule, "update", tell)
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in classification_data])
    data = data.map(lambda row: {"labels": int(row["labels"])})
    args = L2SPTrainingArguments(**quick(tmp_path, max_steps=24, learning_rate=2e-3, l2sp_lambda=0.01))
    trainer = SlopeTrainer(model, args, train_dataset=data, eval_dataset=data.select(range(5)) if given else None)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    assert len(told) >= 3 and all(squared > 0.0 for *_, squared in told)
    assert (trainer.held is None) == given and trainer._l2sp_strength() == trainer.rule.value != 0.01
    # At the end of training, of a batch.
    batch = trainer.data_collator([data[row] for row in range(4)])
    names = set(dict(trainer.l2sp_anchor.items()))
    end = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss(share):  # θ0 + share·(θ − θ0)
        values = {n: start[n] + share * (v - start[n]) if n in names else v for n, v in end.items()}
        return torch.func.functional_call(model.eval(), values, kwargs=dict(batch)).loss

    share = torch.ones((), requires_grad=True)
    (expected,) = torch.autograd.grad(loss(share), share)
    model.zero_grad()
    model(**batch).loss.backward()
    along, squared = trainer._slope()
    assert math.isclose(along, float(expected), rel_tol=1e-3) and abs(along) > 1e-4
    assert math.isclose(squared, sum(float((end[n] - start[n]).square().sum()) for n in names), rel_tol=1e-5)

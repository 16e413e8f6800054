"""The quality study's own parts: the methods of others against their formulas, what is concluded from the runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))

import few_classes  # noqa: E402  # isort: skip
from _paired import paired, paired_in_groups  # noqa: E402  # isort: skip
from _quality_rivals import AdamSPD, RecAdam, freeze_below, layer_groups, with_pretrained  # noqa: E402  # isort: skip
from _quality_summary import beside_oracle, beside_other_draws, by_method, overall, strengths, summary  # noqa: E402  # isort: skip

RATE = 0.05


def run(make, steps=6, **options):
    """Weights and gradients, step by step, of a pretrained and a new parameter pulled towards 1 and -1."""
    torch.manual_seed(0)
    old, new = (torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [old], "pretrained": True}, {"params": [new], "pretrained": False}]
    optimizer = make(groups, lr=RATE, **options)
    course = [(old.detach().clone(), new.detach().clone(), None, None)]
    for _ in range(steps):
        optimizer.zero_grad()
        ((old - 1.0).square().sum() + (new + 1.0).square().sum()).backward()
        gradients = old.grad.clone(), new.grad.clone()
        optimizer.step()
        course.append((old.detach().clone(), new.detach().clone(), *gradients))
    return course


def adam_steps(gradients):
    """What Adam adds at every step, written out."""
    first = second = torch.zeros_like(gradients[0])
    for step, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        yield -RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def test_recadam_is_its_formula():
    course = run(RecAdam, middle=3, speed=0.7, pull=4.0)
    steps = adam_steps([gradient for *_, gradient, _ in course[1:]])
    start = theta = course[0][0]
    for number, (added, entry) in enumerate(zip(steps, course[1:], strict=True), start=1):
        share = 1 / (1 + math.exp(-0.7 * (number - 3)))
        theta = theta + share * added - RATE * (1 - share) * 4.0 * (theta - start)
        torch.testing.assert_close(entry[0], theta, rtol=1e-12, atol=1e-12)
    new = course[0][1]
    for added, entry in zip(adam_steps([gradient for *_, gradient in course[1:]]), course[1:], strict=True):
        new = new + added
        torch.testing.assert_close(entry[1], new, rtol=1e-12, atol=1e-12)


def test_adamspd_takes_back_only_where_the_gradient_points_back():
    course = run(AdamSPD, strength=0.6, steps=150)  # beyond the minimum
    start = theta = course[0][0]
    taken_back = 0
    for added, (entry, _, gradient, _) in zip(adam_steps([g for *_, g, _ in course[1:]]), course[1:], strict=True):
        moved = theta + added
        if float(gradient @ (theta - start)) > 0:
            ratio = 1 - float((theta - start).norm() / (moved - start).norm())
            taken_back += ratio > 0
            moved = moved - 0.6 * max(ratio, 0.0) * (moved - start)
        theta = moved
        torch.testing.assert_close(entry, theta, rtol=1e-10, atol=1e-10)
    assert 0 < taken_back < 150


@pytest.fixture
def bert(tiny_bert_dir):
    return BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)


def test_groups_hold_every_parameter_once(bert):
    layers = bert.config.num_hidden_layers
    for groups in (with_pretrained(bert), layer_groups(bert, 1.0, 0.5)):
        ids = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(ids) == sorted(map(id, bert.parameters()))
    rates = {id(p): group["lr"] for group in layer_groups(bert, 1.0, 0.5) for p in group["params"]}
    assert rates[id(bert.classifier.weight)] == rates[id(bert.bert.pooler.dense.weight)] == 1.0
    assert rates[id(bert.bert.encoder.layer[-1].output.dense.weight)] == 0.5
    assert rates[id(bert.bert.embeddings.word_embeddings.weight)] == 0.5 ** (layers + 1)
    assert [group["pretrained"] for group in with_pretrained(bert)] == [True, False]
    assert len(with_pretrained(bert)[1]["params"]) == 2


def test_frozen_half(bert):
    freeze_below(bert, 1)
    frozen = {name for name, parameter in bert.named_parameters() if not parameter.requires_grad}
    assert all(".embeddings." in name or ".layer.0." in name for name in frozen)
    assert any(".layer.0." in name for name in frozen) and bert.classifier.weight.requires_grad


def entry(method, seed, f1, nll, data="d", shots=8, course=(), rows=24):
    scores = {"f1_macro": f1, "nll": nll, "ece": 0.1}
    about = {"data": data, "shots": shots, "seed": seed, "method": method, "rows": rows}
    return {**about, "scores": scores, "course": {"l2sp_lambda": list(course)}}


RUNS = [
    entry("plain", 1, 0.5, 2.0),
    entry("plain", 2, 0.6, 1.0),
    entry("l2sp 0.1", 1, 0.4, 1.5),
    entry("l2sp 0.1", 2, 0.5, 1.5),
    entry("l2sp 0.3", 1, 0.56, 1.4),
    entry("auto", 1, 0.52, 1.2, course=[0.0, 0.0, 0.2, 0.4]),
    entry("auto", 2, 0.66, 1.1, course=[0.0, 0.0, 0.1, 0.1]),
]


def test_methods_are_compared_on_the_draws_that_both_have():
    rows = {row["method"]: row for row in by_method(RUNS, 8)}
    assert rows["l2sp 0.3"]["all"]["f1_macro"]["mean"] == pytest.approx(0.06) and rows["l2sp 0.3"]["draws"] == 1
    assert rows["auto"]["all"]["nll"]["mean"] == pytest.approx((-0.8 + 0.1) / 2)
    assert rows["auto"]["all"]["nll"]["wins"] == 1 and rows["auto"]["all"]["f1_macro"]["wins"] == 2
    assert rows["auto"]["sets"]["d"]["f1_macro"]["mean"] == pytest.approx(0.59)


def test_oracle_is_the_best_constant_strength_zero_among_them():
    (row,) = beside_oracle(RUNS)
    assert row["grid"] == [0.0, 0.1] and row["best"] == 0.0 and row["oracle"]["f1_macro"]["draws"] == 2
    assert row["plain"]["f1_macro"]["auto_adds"] == row["oracle"]["f1_macro"]["auto_adds"] == pytest.approx(0.04)
    assert row["plain"]["f1_macro"]["error"] == pytest.approx(0.02)
    assert row["oracle"]["f1_macro"]["own_mean"] == pytest.approx(0.55)
    assert row["oracle"]["f1_macro"]["own_error"] == pytest.approx(0.05)
    # Means are of the draws that both have.
    (shared,) = beside_oracle([*RUNS, entry("plain", 3, 0.9, 0.1)])
    assert shared["f1_macro"] == {"plain": pytest.approx(0.55), "auto": pytest.approx(0.59)}
    # All on the first draw alone.
    (first,) = beside_oracle([run for run in RUNS if run["seed"] == 1 or not run["method"].startswith("l2sp")])
    assert first["grid"] == [0.0, 0.1, 0.3] and first["best"] == 0.3 and first["draws"] == 2
    assert first["oracle"]["f1_macro"] == {
        "auto_adds": pytest.approx(-0.04),
        "error": None,
        "draws": 1,
        "own_mean": pytest.approx(0.56),
        "own_error": None,
    }
    (found,) = strengths(RUNS)
    assert found["lambda"] == pytest.approx([0.3, 0.1]) and found["rows"] == [24, 24]


def test_strength_of_the_other_draws_is_not_chosen_on_the_draw_that_it_is_scored_on():
    # A pull of 0.1 is best by far on draw 1 and worse than none on the others: the best in the mean of all.
    runs = [
        *(entry("plain", seed, 0.5, 1.0) for seed in (1, 2, 3)),
        *(entry("l2sp 0.1", seed, f1, 1.2) for seed, f1 in ((1, 0.9), (2, 0.45), (3, 0.45))),
        *(entry("l2sp 0.3", seed, f1, 1.4) for seed, f1 in ((1, 0.4), (2, 0.52), (3, 0.52))),
        entry("l2sp 1", 1, 0.99, 0.1),  # tried on no other draw: no reason to choose it
        *(entry("auto", seed, 0.6, 1.1) for seed in (1, 2, 3)),
    ]
    (row,) = beside_other_draws(runs)
    assert row["chosen"] == {"1": 0.3, "2": 0.1, "3": 0.1}
    assert row["differences"]["f1_macro"] == pytest.approx([0.6 - 0.4, 0.6 - 0.45, 0.6 - 0.45])
    assert row["differences"]["nll"] == pytest.approx([1.1 - 1.4, 1.1 - 1.2, 1.1 - 1.2])
    # Of equally good ones the smallest; none where there is nothing to choose from.
    same = [{**run, "method": "l2sp 0.2"} for run in runs if run["method"] == "l2sp 0.3"]
    (equal,) = beside_other_draws([*runs, *same])
    assert equal["chosen"] == {"1": 0.2, "2": 0.1, "3": 0.1} and not beside_other_draws(RUNS[:2] + RUNS[-2:])
    found = summary(runs)
    assert found["overall_other_draws"]["f1_macro"]["mean"] == pytest.approx(0.5 / 3)
    assert found["overall_other_draws"]["cells"] == found["overall"]["cells"] == 1


def test_mean_over_all_cells_weighs_each_the_same():
    others = [entry("plain", 1, 0.5, 2.0, data="e"), entry("auto", 1, 0.3, 2.5, data="e")]
    found = overall(RUNS + others + [entry("plain", 1, 0.5, 2.0, data="without")])
    assert found["cells"] == 2 and found["f1_macro"]["mean"] == pytest.approx((0.04 - 0.2) / 2)
    assert found["nll"]["mean"] == pytest.approx((-0.35 + 0.5) / 2)
    assert found["f1_macro"]["low"] == pytest.approx(-0.2) and not overall(RUNS[:3])


def test_intervals_cover_what_they_should():
    found = paired([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and 1.0 <= found["low"] < 2.0 < found["high"] <= 3.0
    groups = paired_in_groups([[1.0], [3.0, 5.0]])
    assert groups["mean"] == 2.5 and groups["low"] == 1.0 and groups["high"] <= 5.0


def test_few_classes_are_the_same_every_time_and_keep_their_rows(tmp_path, monkeypatch, capsys):
    rows = [{"text": f"text {number}, é", "label": "abcde"[number % 5]} for number in range(40)]
    (tmp_path / "notes").mkdir()
    for split, part in (("train", rows[:25]), ("test", rows[25:])):
        lines = [json.dumps(row) for row in part]
        (tmp_path / "notes" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def make(output, classes):
        asked = ["--data", tmp_path, "--sets", "notes", "--classes", classes, "--output", tmp_path / output]
        monkeypatch.setattr(sys, "argv", ["few_classes.py", *map(str, asked)])
        few_classes.main()
        read = [(tmp_path / output / f"notes_{classes}" / f"{split}.jsonl") for split in ("train", "test")]
        return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in read]

    train, test = make("one", 3)
    kept = {row["label"] for row in train}
    assert len(kept) == 3 and train == [row for row in rows[:25] if row["label"] in kept]
    assert test == [row for row in rows[25:] if row["label"] in kept]
    assert make("two", 3) == [train, test] and ", ".join(sorted(kept)) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="notes_3 is there already"):
        make("one", 3)
    for classes in (1, 6):
        with pytest.raises(SystemExit, match="there are 5 classes; take 2 to 5"):
            make("three", classes)
    assert not (tmp_path / "three").exists()

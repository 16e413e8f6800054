"""Which numbers are scores, and which direction is better."""

from __future__ import annotations

import doctest
import math

import pytest

from hf_l2sp import score_table
from hf_l2sp.score_table import direction, entity_types, pairs, score_names, splits, without_entity_types


def test_examples_in_the_docstrings():
    assert doctest.testmod(score_table).failed == 0


def test_scores_and_nothing_of_the_machine():
    metrics = dict.fromkeys(
        ["epoch", "test_loss", "eval_runtime", "eval_f1", "train_loss", "notes_f1", "eval_samples", "total_flos"], 1.0
    )
    metrics["test_samples_per_second"] = metrics["eval_model_preparation_time"] = 1.0
    assert score_names(metrics) == ["eval_f1", "test_loss", "notes_f1"]


@pytest.mark.parametrize("name", ["eval_loss", "test_ece", "test_perplexity", "eval_nll"])
def test_lower_is_better(name):
    assert direction(name) == -1


@pytest.mark.parametrize("name", ["eval_f1_macro", "test_mcc", "test_accuracy", "eval_recall_macro", "test_LOSS_f1"])
def test_higher_is_better(name):
    assert direction(name) == 1


def test_nobody_knows():
    assert direction("eval_length") == direction("eval_perplexity_gain") == 0


def test_pairs():
    first = {
        "eval_loss": 0.5,
        "eval_f1": 0.5,
        "eval_x": 1.0,
        "only_a_loss": 1.0,
        "test_f1": 0.5,
        "test_loss": math.nan,
    }
    second = {"eval_loss": 0.25, "eval_f1": 0.25, "eval_x": 2.0, "only_b_f1": 1.0, "test_f1": 0.5, "test_loss": 1.0}
    found = {p.name: (p.difference, p.verdict) for p in pairs(first, second)}
    assert found["eval_loss"] == (-0.25, "better")
    assert found["eval_f1"] == (-0.25, "worse")
    assert found["eval_x"] == (1.0, "")
    assert found["test_f1"] == (0.0, "same")
    assert found["only_a_loss"] == found["only_b_f1"] == (None, "")
    assert found["test_loss"][1] == ""
    assert {p.name: (p.first, p.second) for p in pairs(first, {"eval_f1": None})}["eval_f1"] == (0.5, None)


def test_splits_and_types_of_entities():
    metrics = dict.fromkeys(
        f"{split}_{kind}{score}"
        for split in ("test", "eval", "eval_long")
        for kind in ("", "DRUG_", "BLOOD_LOSS_")
        for score in ("precision", "recall", "f1")
    )
    metrics |= {"test_loss": 1, "eval_loss": 1, "eval_long_loss": 1, "train_loss": 1, "test_f1_macro": 1}
    assert splits(metrics) == ["eval", "test", "eval_long"]
    for split in splits(metrics):
        assert "BLOOD_LOSS" in entity_types(metrics, split) and "DRUG" in entity_types(metrics, split)
        assert "long" not in entity_types(metrics, split)
    overall = {f"{s}_{n}" for s in splits(metrics) for n in ("loss", "precision", "recall", "f1")}
    assert set(without_entity_types(metrics)) == overall | {"test_f1_macro"}

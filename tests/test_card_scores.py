"""Scores that the card's metadata carry: of the model that is there, from this run, with a task and a data set."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_l2sp.card_scores import add_scores, scores_by_split

TRAINED = {"train_runtime": 12.5, "train_loss": 0.3, "step": 4}


def evaluation(step: int, loss: float, prefix: str = "eval") -> dict[str, float]:
    names = {"loss": loss, "accuracy": loss / 2, "runtime": 1.0, "samples_per_second": 5.0, "ece": math.nan}
    return {**{f"{prefix}_{name}": value for name, value in names.items()}, "epoch": 1.0, "step": step}


def state_of(*history: dict[str, float], **values: object) -> SimpleNamespace:
    return SimpleNamespace(log_history=list(history), best_global_step=None, **values)


def test_last_evaluation(tmp_path):
    state = state_of({"loss": 1.0, "step": 1}, evaluation(2, 0.8), evaluation(4, 0.6), TRAINED)
    assert scores_by_split(state, tmp_path) == {"eval": {"loss": 0.6, "accuracy": 0.3}}
    assert scores_by_split(state_of(TRAINED), tmp_path) == {}
    assert scores_by_split(state_of(), tmp_path) == {}


def test_several_evaluation_sets(tmp_path):
    state = state_of(evaluation(4, 0.6, "eval_near"), evaluation(4, 0.8, "eval_far"), evaluation(4, 0.4), TRAINED)
    assert scores_by_split(state, tmp_path) == {
        "eval": {"loss": 0.4, "accuracy": 0.2},
        "eval_far": {"loss": 0.8, "accuracy": 0.4},
        "eval_near": {"loss": 0.6, "accuracy": 0.3},
    }


def test_best_model_has_the_scores_of_its_step(tmp_path):
    history = [evaluation(2, 0.4), evaluation(4, 0.6), TRAINED]
    state = state_of(*history)
    state.best_global_step, state.best_model_checkpoint = 2, "out/checkpoint-2"
    assert scores_by_split(state, tmp_path)["eval"]["loss"] == 0.4
    state.log_history.append(evaluation(4, 0.5))  # after training, of the best model too
    assert scores_by_split(state, tmp_path)["eval"]["loss"] == 0.5


@pytest.mark.parametrize("runtime", [12.5, 99.0])
def test_scores_on_a_test_set_are_those_of_this_run(tmp_path, runtime):
    written = {**evaluation(4, 0.1), **evaluation(4, 0.9, "test"), "train_runtime": runtime, "test_samples": 7}
    (tmp_path / "all_results.json").write_text(json.dumps(written))
    scores = scores_by_split(state_of(evaluation(4, 0.6), TRAINED), tmp_path)
    assert scores["eval"]["loss"] == 0.6
    assert scores.get("test") == ({"loss": 0.9, "accuracy": 0.45} if runtime == 12.5 else None)


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_other_files_of_that_name_are_passed_over(tmp_path, content):
    (tmp_path / "all_results.json").write_text(content)
    assert scores_by_split(state_of(evaluation(4, 0.6), TRAINED), tmp_path)["eval"]["loss"] == 0.6


def index_of(text: str = "---\nlicense: mit\n---\n", scores=None, model="BertForTokenClassification", **about):
    card = ModelCard(text)
    add_scores(card, {"eval": {"f1_macro": 0.5}, "test": {"mcc": 0.25}} if scores is None else scores, model, about)
    again = ModelCard(str(card))  # as the Hub's own parser reads it
    return again.data.eval_results, again.data.model_name


def test_metadata():
    results, name = index_of(dataset="notes", tasks=["token-classification"])
    common = {"task_type": "token-classification", "dataset_type": "unknown", "dataset_name": "notes"}
    assert results == [
        EvalResult(**common, dataset_split="validation", metric_type="f1", metric_name="f1 macro", metric_value=0.5),
        EvalResult(
            **common, dataset_split="test", metric_type="matthews_correlation", metric_name="mcc", metric_value=0.25
        ),
    ]
    assert name == "BertForTokenClassification"


@pytest.mark.parametrize(
    ("about", "dataset"),
    [
        ({}, "unknown"),
        ({"dataset": ["one", "two"]}, "one"),
        ({"dataset_name": "of trl"}, "of trl"),
        ({"dataset": "/data/patients/notes.csv"}, "notes.csv"),
    ],
)
def test_name_of_the_data(about, dataset):
    assert {result.dataset_name for result in index_of(**about)[0]} == {dataset}


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("DebertaV2ForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("PeftModelForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
    ],
)
def test_task_of_the_model(model, task):
    assert {result.task_type for result in index_of(model=model)[0]} == {task}


def test_without_a_task_or_scores_there_is_no_index():
    empty = "---\nmodel-index:\n- name: out\n  results: []\n---\n"
    for options in ({"model": "Net"}, {"scores": {}}):
        card = ModelCard(empty)
        options = {"scores": {"eval": {"loss": 1.0}}, "model": "BertForMaskedLM", **options}
        add_scores(card, options["scores"], options["model"], {})
        assert "model-index" not in str(card) and "model_name" not in str(card)


def test_what_transformers_knows_of_a_data_set_of_the_hub_is_kept():
    text = """---
model-index:
- name: out
  results:
  - task: {name: Text Classification, type: text-classification}
    dataset: {name: glue, type: glue, config: sst2, split: validation, args: sst2}
    metrics:
    - {name: Accuracy, type: accuracy, value: 0.9}
---
"""
    results, name = index_of(text, {"eval": {"accuracy": 0.9, "loss": 0.5}, "test": {"loss": 0.7}}, dataset="other")
    assert name == "out"
    told = [(r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in results]
    assert told == [
        ("glue", "sst2", "validation", "accuracy", 0.9),
        ("glue", "sst2", "validation", "loss", 0.5),
        ("glue", "sst2", "test", "loss", 0.7),
    ]

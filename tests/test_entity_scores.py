"""Entity scores against a brute-force oracle, hand-made cases and seqeval; offline; in a Trainer."""

from __future__ import annotations

import doctest
import json
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from hf_l2sp.entity_scores import IGNORED, entity_spans, split_tag
from hf_l2sp.metrics import EntityScores, entity_scores, make_entity_metrics

TYPES = ("DRUG", "DOSE", "creative-work")
NAMES = ["O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI")]
MICRO = ("precision", "recall", "f1")
KEYS = ("precision", "recall", "f1-score")  # as seqeval names them


def brute_force_spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """The definition, tried on every stretch: B-X, then I-X only, and no I-X after it."""
    found = set()
    for first in range(len(tags)):
        for end in range(first + 1, len(tags) + 1):
            for kind in {tag[2:] for tag in tags if tag != "O"}:
                opened = tags[first] == f"B-{kind}" and all(tag == f"I-{kind}" for tag in tags[first + 1 : end])
                if opened and (end == len(tags) or tags[end] != f"I-{kind}"):
                    found.add((kind, first, end))
    return found


def brute_force_scores(references: list[list[str]], predictions: list[list[str]]) -> dict[str, float]:
    true = {(n, *span) for n, tags in enumerate(references) for span in brute_force_spans(tags)}
    predicted = {(n, *span) for n, tags in enumerate(predictions) for span in brute_force_spans(tags)}

    def ratios(true: set, predicted: set) -> list[float]:
        correct = len(true & predicted)
        precision = correct / len(predicted) if predicted else 0.0
        recall = correct / len(true) if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if correct else 0.0
        return [precision, recall, f1]

    scores = dict(zip(MICRO, ratios(true, predicted), strict=True))
    per_type = {
        kind: ratios({s for s in true if s[1] == kind}, {s for s in predicted if s[1] == kind})
        for kind in sorted({s[1] for s in true | predicted})
    }
    for index, name in enumerate(MICRO):
        scores[f"{name}_macro"] = sum(v[index] for v in per_type.values()) / max(1, len(per_type))
        scores.update({f"{kind}_{name}": values[index] for kind, values in per_type.items()})
    return scores


def random_tags(rng: np.random.Generator, length: int, valid: bool) -> list[str]:
    tags: list[str] = []
    for _ in range(length):
        kind = str(rng.choice(TYPES[: rng.integers(1, 4)]))
        tag = str(rng.choice(["O", f"B-{kind}", f"I-{kind}"], p=[0.3, 0.3, 0.4]))
        if valid and tag[0] == "I" and (not tags or tags[-1] not in (f"B-{kind}", f"I-{kind}")):
            tag = "O"
        tags.append(tag)
    return tags


def random_pairs(seed: int, valid: bool) -> tuple[list[list[str]], list[list[str]]]:
    """True tags, and predictions that are right for most words."""
    rng = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(30):
        true = random_tags(rng, int(rng.integers(0, 12)), valid)
        guess = random_tags(rng, len(true), valid)
        references.append(true)
        predictions.append([a if rng.random() < 0.7 else b for a, b in zip(true, guess, strict=True)])
    return references, predictions


# ------------------------------------------------------------------ spans


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("", []),
        ("O O", []),
        ("B-a", [("a", 0, 1)]),
        ("B-a I-a I-a", [("a", 0, 3)]),
        ("O B-a I-a O B-a", [("a", 1, 3), ("a", 4, 5)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),  # touching entities of one type
        ("B-a B-b I-b", [("a", 0, 1), ("b", 1, 3)]),
        ("I-a I-a", []),  # never opened
        ("O I-a B-a", [("a", 2, 3)]),
        ("B-a I-b I-b", [("a", 0, 1)]),  # another type: the open one ends, the other was never opened
        ("B-a I-b I-a", [("a", 0, 1)]),  # and is not opened again
        ("B-a O I-a", [("a", 0, 1)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 2)]),
        ("B-O I-O O", [("O", 0, 2)]),  # a type of that name is a type
        ("B-a I-A", [("a", 0, 1)]),
    ],
)
def test_spans_are_strict(tags: str, spans: list[tuple[str, int, int]]) -> None:
    assert entity_spans(tags.split()) == spans
    assert brute_force_spans(tags.split()) == set(spans)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("valid", [True, False])
def test_spans_equal_the_definition_on_random_tags(seed: int, valid: bool) -> None:
    rng = np.random.default_rng(seed)
    sequences = [random_tags(rng, int(rng.integers(0, 14)), valid) for _ in range(60)]
    orphans = 0
    for tags in sequences:
        spans = entity_spans(tags)
        assert spans == sorted(brute_force_spans(tags), key=lambda span: span[1])
        orphans += sum(tag != "O" for tag in tags) - sum(end - first for _, first, end in spans)
    assert (orphans == 0) == valid


@pytest.mark.parametrize(
    "tag", ["", "o", "PER", "B", "B-", "I- ", "b-PER", "E-PER", "S-PER", "B_PER", "BPER", "O-PER"]
)
def test_what_is_not_a_tag_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=r"is not an IOB2 tag: write O, B-TYPE or I-TYPE"):
        split_tag(tag)


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("valid", [True, False])
def test_scores_equal_the_oracle_on_random_tags(seed: int, valid: bool) -> None:
    references, predictions = random_pairs(seed, valid)
    scores = entity_scores(references, predictions)
    assert scores == pytest.approx(brute_force_scores(references, predictions), abs=1e-12)
    assert 0.1 < scores["f1"] < 0.9 and scores["f1"] != pytest.approx(scores["f1_macro"])
    assert all(type(value) is float for value in scores.values())
    assert entity_scores(references, references)["recall"] == 1.0


def test_scores_of_a_case_counted_by_hand() -> None:
    references = [["B-DRUG", "I-DRUG", "O", "B-DOSE"], ["B-DRUG", "O", "B-DRUG", "O"], ["O"], []]
    predictions = [["B-DRUG", "O", "O", "B-DOSE"], ["B-DRUG", "I-DOSE", "B-DOSE", "B-DRUG"], ["I-DRUG"], []]
    # DRUG: 3 true, 3 predicted, 1 right. DOSE: 1 true, 2 predicted, 1 right.
    assert entity_scores(references, predictions) == pytest.approx(
        {
            **{"precision": 2 / 5, "recall": 2 / 4, "f1": 4 / 9},
            **{"precision_macro": 5 / 12, "recall_macro": 2 / 3, "f1_macro": 1 / 2},
            **{"DOSE_precision": 1 / 2, "DOSE_recall": 1.0, "DOSE_f1": 2 / 3},
            **{"DRUG_precision": 1 / 3, "DRUG_recall": 1 / 3, "DRUG_f1": 1 / 3},
        }
    )


EDGES = {
    "no entity, none predicted": ([["O", "O"]], [["O", "O"]]),
    "no entity, one predicted": ([["O", "O"]], [["B-a", "O"]]),
    "an entity, none predicted": ([["B-a", "O"]], [["O", "O"]]),
    "only an orphan predicted": ([["B-a", "I-a"]], [["I-a", "I-a"]]),
    "a type predicted that is nowhere true": ([["B-a", "O"]], [["B-a", "B-b"]]),
    "a type missed": ([["B-a", "B-b"]], [["B-a", "O"]]),
    "right words, wrong type": ([["B-a", "I-a"]], [["B-b", "I-b"]]),
    "touching ones run together": ([["B-a", "B-a"]], [["B-a", "I-a"]]),
    "an empty sentence": ([[], ["B-a"]], [[], ["B-a"]]),
    "only empty sentences": ([[], []], [[], []]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name: str) -> None:
    references, predictions = EDGES[name]
    scores = entity_scores(references, predictions)
    assert scores == pytest.approx(brute_force_scores(references, predictions))
    assert all(0 <= value <= 1 for value in scores.values())


def test_wanted_types_are_reported_without_weighing_on_the_mean() -> None:
    scores = entity_scores([["B-b", "O"]], [["B-b", "O"]], types=["c", "a", "b"])
    assert [key for key in scores if key.endswith("_f1")] == ["a_f1", "b_f1", "c_f1"]
    assert (scores["a_f1"], scores["b_f1"], scores["f1_macro"]) == (0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def seqeval_scores() -> Any:
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval, the reference of these scores, is not installed")
    scheme = pytest.importorskip("seqeval.scheme").IOB2

    def compute(references: list[list[str]], predictions: list[list[str]]) -> dict[str, float]:
        arguments = {"mode": "strict", "scheme": scheme, "zero_division": 0}
        report = metrics.classification_report(references, predictions, output_dict=True, **arguments)
        scores = {}
        for suffix, row in [("", report.pop("micro avg")), ("_macro", report.pop("macro avg"))]:
            scores |= {f"{name}{suffix}": row[key] for name, key in zip(MICRO, KEYS, strict=True)}
        del report["weighted avg"]
        for kind, row in report.items():
            scores |= {f"{kind}_{name}": row[key] for name, key in zip(MICRO, KEYS, strict=True)}
        return scores

    return compute


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("valid", [True, False])
def test_scores_equal_seqeval_on_random_tags(seqeval_scores: Any, seed: int, valid: bool) -> None:
    references, predictions = random_pairs(100 + seed, valid)
    assert entity_scores(references, predictions) == pytest.approx(seqeval_scores(references, predictions), abs=1e-12)


@pytest.mark.parametrize("name", EDGES)
def test_scores_equal_seqeval_on_edge_cases(seqeval_scores: Any, name: str) -> None:
    references, predictions = EDGES[name]
    own = entity_scores(references, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of means over no type
        expected = seqeval_scores(references, predictions)
    # Without a single entity its macro means are NaN, which would end a search for the best checkpoint; here 0.
    assert own == pytest.approx({key: 0.0 if np.isnan(value) else value for key, value in expected.items()})
    assert np.isnan(expected["f1_macro"]) == (not any(map(entity_spans, references + predictions)))


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        ([["O"], ["O"]], [["O"]], r"1 predictions but 2 references"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], r"sentence 1 has 1 predictions but 2 references: pass one of each per"),
        ([["O"]], [["X-a"]], r"predictions, sentence 0: 'X-a' is not an IOB2 tag"),
        ([["O"], ["O", "B-"]], [["O"], ["O", "O"]], r"references, sentence 1: 'B-' is not an IOB2 tag"),
        ([[0, 1]], [["O", "O"]], r"references, sentence 0: 0 is not a tag: map label ids to names first"),
        (["O", "B-a"], [["O"], ["O"]], r"references must be lists of tags.*item 0 is 'O': wrap the tags"),
        ([["O"]], None, r"predictions are missing"),
        (None, [["O"]], r"references are missing"),
        ([], [], r"No examples"),
    ],
)
def test_bad_input_is_refused_by_function_and_metric(references: Any, predictions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entity_scores(references, predictions)
    metric = EntityScores()
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    assert metric.compute(predictions=[["B-a"]], references=[["B-a"]])["f1"] == 1.0  # nothing lingers


# ------------------------------------------------------------------ evaluate.Metric


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield


def test_the_metric_pools_batches_offline_and_in_memory(
    no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    references, predictions = random_pairs(7, valid=False)
    references[0], predictions[0] = [], []  # an empty sentence first must not decide the type of the column
    metric = EntityScores(cache_dir=str(tmp_path / "file" / "cache"))  # nothing can be created below a file
    assert isinstance(metric, evaluate.Metric) and metric.name == "entity_scores"
    for _ in range(2):  # the second round shows that compute has emptied the metric
        metric.add_batch(predictions=predictions[:1], references=references[:1])
        metric.add_batch(predictions=predictions[1:9], references=references[1:9])
        metric.add_batch(predictions=[], references=[])
        metric.add(prediction=predictions[9], reference=references[9])
        pooled = metric.compute(predictions=predictions[10:], references=references[10:])
        assert pooled == pytest.approx(entity_scores(references, predictions))
    with pytest.raises(ValueError, match="No examples: pass them to compute"):
        metric.compute()
    assert metric.compute(predictions=[["O"]], references=[["O"]], types=["a"])["a_f1"] == 0.0
    assert os.listdir(tmp_path) == ["file"]


def test_the_metric_in_several_processes_goes_through_files(tmp_path: Path) -> None:
    references, predictions = random_pairs(8, valid=True)
    metric = EntityScores(keep_in_memory=False, cache_dir=str(tmp_path))
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(
        entity_scores(references, predictions)
    )
    with pytest.raises(ValueError, match="num_process=2 needs keep_in_memory=False"):
        EntityScores(num_process=2)


def test_info_is_complete_and_its_example_runs() -> None:
    metric = EntityScores()
    assert metric.description.startswith("Entity scores") and metric.citation.startswith("@")
    for text in (metric.inputs_description, metric.compute.__doc__):
        test = doctest.DocTestParser().get_doctest(text, {}, "EntityScores", None, None)
        outcome = doctest.DocTestRunner().run(test)
        assert outcome.attempted == 4 and outcome.failed == 0


# ------------------------------------------------------------------ the Trainer's function


def as_eval_prediction(
    references: list[list[str]], predictions: list[list[str]], rng: np.random.Generator
) -> EvalPrediction:
    """Logits and label ids with special tokens, second sub-words and padding in between, as Trainer stacks them."""
    width = 2 * max(map(len, references)) + 3
    labels = np.full((len(references), width), IGNORED)
    logits = rng.normal(size=(len(references), width, len(NAMES))).astype(np.float32)
    for row, (true, predicted) in enumerate(zip(references, predictions, strict=True)):
        places = np.sort(rng.choice(width, size=len(true), replace=False))
        labels[row, places] = [NAMES.index(tag) for tag in true]
        logits[row, places, [NAMES.index(tag) for tag in predicted]] += 100
    return EvalPrediction(logits, labels)


@pytest.mark.parametrize("valid", [True, False])
def test_entity_metrics_look_at_labelled_tokens_alone(valid: bool, rng: np.random.Generator) -> None:
    references, predictions = random_pairs(9, valid)
    prediction = as_eval_prediction(references, predictions, rng)
    expected = entity_scores(references, predictions, TYPES)
    compute = make_entity_metrics(NAMES)
    assert compute(prediction) == expected
    assert pickle.loads(pickle.dumps(compute))(prediction) == expected
    hidden_states = np.zeros((len(references), 3, 2))
    assert compute(EvalPrediction((prediction.predictions, hidden_states), prediction.label_ids)) == expected
    assert compute(EvalPrediction(prediction.predictions.argmax(-1), prediction.label_ids)) == expected
    assert json.loads(json.dumps(expected)) == expected
    # Trainer fills up the logits with -100, and what diverges outside of labelled tokens is no matter.
    broken = np.where((prediction.label_ids == IGNORED)[..., None], np.nan, prediction.predictions)
    assert compute(EvalPrediction(broken, prediction.label_ids)) == expected


def test_the_keys_do_not_depend_on_the_predictions() -> None:
    labels = np.array([[0, 1]])
    logits = np.zeros((1, 2, len(NAMES)))
    logits[..., 0] = 1
    keys = list(make_entity_metrics(NAMES)(EvalPrediction(logits, labels)))
    assert keys == list(make_entity_metrics(NAMES)(EvalPrediction(-logits, labels)))
    assert {f"{kind}_f1" for kind in TYPES} < set(keys) and "creative-work_recall" in keys


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            np.zeros((2, 3)),
            np.zeros((2, 3), int),
            r"logits of shape .*here \[2, 3, 7\].*got shape \[2, 3\]: check num_l",
        ),
        (np.zeros((2, 3, 5)), np.zeros((2, 3), int), r"here \[2, 3, 7\], .*got shape \[2, 3, 5\]: check num_labels"),
        (np.zeros((2, 4, 7)), np.zeros((2, 3), int), r"got shape \[2, 4, 7\]"),
        ((), np.zeros((2, 3), int), r"got shape \[0\]"),
        (np.full((2, 3), 7), np.zeros((2, 3), int), r"6 predicted ids are outside 0\.\.6 \(first: 7\)"),
        (np.zeros((2, 3, 7)), None, r"label_ids are missing: .*column `labels`"),
        (np.zeros((2, 3, 7)), np.zeros(2, int), r"integers of shape \[rows, tokens\], got int64 of shape \[2\]"),
        (np.zeros((2, 3, 7)), np.zeros((2, 3)), r"integers of shape \[rows, tokens\], got float64"),
        (np.zeros((2, 3, 7)), np.array([[0, 7, -1]] * 2), r"4 label_ids are outside 0\.\.6 \(first: 7\)"),
        (np.zeros((2, 3, 7)), np.full((2, 3), IGNORED), r"No examples: no token of the evaluation set has a label"),
        (np.full((2, 3, 7), np.nan), np.array([[0, 1, IGNORED]] * 2), r"logits of 4 of 4 tokens are NaN or infinite"),
    ],
)
def test_entity_metrics_refuse_bad_input(logits: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_entity_metrics(NAMES)(EvalPrediction(logits, labels))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["LABEL_0", "LABEL_1"], r"'LABEL_0' is not an IOB2 tag"),
        (["O", "PER"], r"'PER' is not an IOB2 tag"),
        (["O", "B-a", "B-a"], r"two or more different tags, got \['O', 'B-a', 'B-a'\]"),
        (["O"], r"two or more different tags"),
        ({0: "O", 1: "B-a"}, r"order of their ids, got \{0: 'O'.*pass list\(id2label\.values\(\)\)"),
        ("O", r"order of their ids"),
    ],
)
def test_label_names_are_checked_at_once(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_entity_metrics(names)


def test_entity_metrics_in_a_trainer(tmp_path: Path) -> None:
    class Tokenizer:
        """As much of one as the collator needs."""

        padding_side = "right"

        def pad(self, features: list[dict[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
            width = max(len(feature["input_ids"]) for feature in features)
            ids = [feature["input_ids"] + [0] * (width - len(feature["input_ids"])) for feature in features]
            return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=len(NAMES),
        initializer_range=1.0,
        output_hidden_states=True,  # predictions arrive as a tuple
    )
    rng = np.random.default_rng(11)
    rows = []
    for length in (3, 9, 5, 2, 7):
        ids = rng.integers(1, 40, size=length).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *rng.integers(len(NAMES), size=length - 1).tolist()]})
    model = BertForTokenClassification(config)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=rows,
        data_collator=DataCollatorForTokenClassification(Tokenizer()),
        compute_metrics=make_entity_metrics(NAMES),
    )
    predictions, references = [], []
    model.eval()
    for row in rows:
        with torch.no_grad():
            best = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        predictions.append([NAMES[i] for i in best[1:]])
        references.append([NAMES[i] for i in row["labels"][1:]])
    expected = entity_scores(references, predictions, TYPES)
    scores = trainer.evaluate()
    assert {key: scores[f"eval_{key}"] for key in expected} == pytest.approx(expected)
    assert len({tag for tags in predictions for tag in tags}) > 2

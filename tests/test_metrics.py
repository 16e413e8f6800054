"""Metrics against scikit-learn and slow references, their input checks, and that they work with no network."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

from hf_l2sp import metrics
from hf_l2sp.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    MacroF1,
    MatthewsCorrelation,
    accuracy_from_confusion,
    compute_classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    macro_f1_from_confusion,
    mcc_from_confusion,
)

LABEL_METRICS = (Accuracy, MacroF1, MatthewsCorrelation)
ALL_METRICS = (*LABEL_METRICS, ExpectedCalibrationError)


def sklearn_scores(references, predictions):
    return {
        "accuracy": accuracy_score(references, predictions),
        "f1_macro": f1_score(references, predictions, average="macro", zero_division=0),
        "mcc": matthews_corrcoef(references, predictions),
    }


def own_scores(references, predictions):
    return {
        k: v for m in LABEL_METRICS for k, v in m().compute(predictions=predictions, references=references).items()
    }


def slow_ece(scores, references, n_bins=15):
    total = 0.0
    for b in range(n_bins):
        inside = []
        for row, reference in zip(scores, references, strict=True):
            confidence = max(row)
            if b / n_bins < confidence <= (b + 1) / n_bins:
                inside.append((confidence, float(list(row).index(confidence) == reference)))
        if inside:
            mean_confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(a for _, a in inside) / len(inside)
            total += len(inside) / len(scores) * abs(accuracy - mean_confidence)
    return total


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("n_classes", [2, 3, 7, 40])
@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
def test_label_metrics_equal_scikit_learn(n_classes, skill):
    rng = np.random.default_rng(n_classes)
    references = rng.integers(n_classes, size=300)
    predictions = np.where(rng.random(300) < skill, references, rng.integers(n_classes, size=300))
    expected = sklearn_scores(references, predictions)
    assert own_scores(references, predictions) == pytest.approx(expected, abs=1e-12)
    if skill == 1:
        assert own_scores(references, predictions) == {"accuracy": 1.0, "f1_macro": 1.0, "mcc": 1.0}


@pytest.mark.parametrize(
    ("references", "predictions"),
    [
        pytest.param([0, 1, 2, 2, 4], [0, 0, 0, 2, 4], id="class never predicted, id 3 unused"),
        pytest.param([0, 0, 4, 4], [0, 9, 4, 2], id="classes only predicted"),
        pytest.param([0, 0, 0], [1, 1, 2], id="disjoint"),
        pytest.param([1, 1, 1], [1, 1, 1], id="one class, right"),
        pytest.param([1, 1, 1], [0, 0, 0], id="one class, wrong"),
        pytest.param([0, 1, 0, 1], [1, 1, 1, 1], id="constant prediction"),
        pytest.param([1, 1, 1, 1], [0, 1, 0, 1], id="constant reference"),
        pytest.param([0, 1, 1], [1, 0, 0], id="all swapped"),
        pytest.param([-1, 1, -1, 1], [-1, -1, -1, 1], id="labels -1 and 1"),
        pytest.param([7], [7], id="one example"),
    ],
)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_label_metrics_equal_scikit_learn_when_classes_are_missing(references, predictions):
    scores = own_scores(references, predictions)
    assert scores == pytest.approx(sklearn_scores(references, predictions), abs=1e-12)
    if len(set(references)) == 1 or len(set(predictions)) == 1:
        assert scores["mcc"] == 0.0


def test_confusion_matrix_counts_true_rows_and_predicted_columns():
    matrix = confusion_matrix([5, 5, 5, 9], [5, 9, 9, 2])
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 2], [1, 0, 0]]  # labels 2, 5, 9


def test_functions_take_a_matrix_with_a_label_that_never_occurs():
    matrix = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    references, predictions = [0] * 4 + [1] * 6, [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    assert accuracy_from_confusion(matrix) == pytest.approx(0.7)
    expected = f1_score(references, predictions, labels=[0, 1, 2], average="macro", zero_division=0)
    assert macro_f1_from_confusion(matrix) == pytest.approx(expected)
    assert mcc_from_confusion(matrix) == pytest.approx(matthews_corrcoef(references, predictions))


def test_mcc_does_not_overflow_on_millions_of_examples():
    matrix = np.array([[4_000_000, 1_000_000], [2_000_000, 9_000_000]])
    expected = matthews_corrcoef([0, 0, 1, 1], [0, 1, 0, 1], sample_weight=matrix.ravel())
    assert mcc_from_confusion(matrix) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric_class", LABEL_METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0], r"2 predictions but 1 references: pass one of each per example"),
        ([0.2, 0.9], [0, 1], r"predictions must be integers, but 2 of 2 are not \(first: 0.2\): pass class ids"),
        ([0.0, float("nan")], [0, 1], r"predictions must be integers, but 1 of 2 are not \(first: nan\)"),
        ([float("-inf"), 0.0], [0, 1], r"predictions must be integers, but 1 of 2 are not \(first: -inf\)"),
        ([[0.1, 0.9], [0.7, 0.3]], [1, 0], r"predictions .* got shape \[2, 2\]. Take argmax\(-1\) of logits"),
        ([0, 1], ["neg", "pos"], r"references must be integers, .*\(first item .*'neg'.*\): map label names to ids"),
        ([0, 1], [0, None], r"references must be integers, got object"),
        ([0, 1], [[0], [1, 2]], r"references must be one integer label per example, but the items differ in length"),
        ([0, 1], None, r"references are missing"),
        (None, [0, 1], r"predictions are missing"),
        ([], [], r"No examples: pass them to compute"),
    ],
)
def test_label_metrics_refuse_bad_input(metric_class, predictions, references, message):
    metric = metric_class()
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    # What was refused must not linger in the metric.
    assert list(metric.compute(predictions=[0, 1], references=[0, 1]).values()) == [1.0]


def test_whole_floats_and_booleans_are_labels():
    assert Accuracy().compute(predictions=np.array([0.0, 2.0]), references=torch.tensor([0, 2])) == {"accuracy": 1.0}
    assert Accuracy().compute(predictions=[True, False], references=[1, 1]) == {"accuracy": 0.5}


def test_confusion_matrix_refuses_no_examples():
    with pytest.raises(ValueError, match="No examples: a metric needs at least one prediction"):
        confusion_matrix([], [])


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_ece_equals_slow_reference(n_classes, n_bins):
    rng = np.random.default_rng(n_classes)
    scores = rng.dirichlet(np.full(n_classes, 0.4), size=400)
    references = np.where(rng.random(400) < 0.6, scores.argmax(1), rng.integers(n_classes, size=400))
    expected = slow_ece(scores, references, n_bins)
    assert expected > 0.01
    assert expected_calibration_error(scores, references, n_bins) == pytest.approx(expected, abs=1e-12)
    computed = ExpectedCalibrationError().compute(prediction_scores=scores, references=references, n_bins=n_bins)
    assert computed == {"ece": pytest.approx(expected, abs=1e-12)}


def test_ece_has_fifteen_bins_by_default():
    rng = np.random.default_rng(1)
    scores, references = rng.dirichlet([1, 1, 1], size=200), rng.integers(3, size=200)
    assert slow_ece(scores, references, 15) != pytest.approx(slow_ece(scores, references, 10), abs=1e-6)
    assert expected_calibration_error(scores, references) == pytest.approx(slow_ece(scores, references), abs=1e-12)


@pytest.mark.parametrize("n_bins", [15, 49])  # 49: multiples of the float 1 / 49 miss edges
def test_ece_puts_confidences_on_an_edge_into_the_lower_bin(n_bins):
    # .8 = 12/15 is right and closes the bin below; .85 is wrong and in the bin above. In one bin they would offset.
    assert expected_calibration_error([[0.8, 0.2], [0.15, 0.85]], [0, 0]) == pytest.approx((0.2 + 0.85) / 2)
    edges = np.arange(n_bins // 2 + 1, n_bins + 1) / n_bins
    confidences = np.concatenate([edges, edges[:-1] + 1e-6])  # right on the edge, wrong just above it
    scores = np.stack([confidences, 1 - confidences], axis=1)
    references = [0] * len(edges) + [1] * (len(edges) - 1)
    expected = slow_ece(scores, references, n_bins)
    assert expected_calibration_error(scores, references, n_bins) == pytest.approx(expected, abs=1e-12)


def test_ece_is_zero_when_calibrated_and_one_when_sure_and_wrong():
    three_in_four = [[0.75, 0.25]] * 4
    assert expected_calibration_error(three_in_four, [0, 0, 0, 1]) == 0.0
    assert expected_calibration_error([[1, 0], [0, 1]], [0, 1]) == 0.0
    assert expected_calibration_error([[1, 0], [0, 1]], [1, 0]) == 1.0


@pytest.mark.parametrize(
    ("scores", "references", "message"),
    [
        (None, [0, 1], r"prediction_scores are missing: pass softmax probabilities \[examples, classes\]"),
        ([[0.5, 0.5]], None, r"references are missing"),
        ([[2.0, -1.0], [0.5, 0.5]], [0, 1], r"1 of 2 rows are not \(row 0: minimum -1, sum 1\): pass softmax prob"),
        ([[0.5, 0.5], [3.0, 1.2]], [0, 1], r"1 of 2 rows .*row 1: minimum 1.2, sum 4.2\): pass softmax .*not logits"),
        ([[0.5, 0.502]], [0], r"every row summing to 1 within 0.001\), but 1 of 1 rows are not"),
        ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], r"NaN or infinite values in 1 of 2 rows"),
        ([[0.5, 0.5], [None, 1.0]], [0, 1], r"NaN or infinite values in 1 of 2 rows"),
        ([0.3, 0.9], [0, 1], r"shape \[examples, classes\] with at least 2 classes, got \[2\].*\[1 - p, p\]"),
        ([[1.0], [1.0]], [0, 0], r"at least 2 classes, got \[2, 1\]"),
        ([[[0.5, 0.5]]], [0], r"at least 2 classes, got \[1, 1, 2\]"),
        ([[0.5, 0.5], [0.2, 0.3, 0.5]], [0, 1], r"with the same classes in every row"),
        ([["a", "b"]], [0], r"prediction_scores must be numbers"),
        ([[0.5, 0.5]] * 3, [0, 2, -1], r"2 of 3 references are outside 0..1 \(first: 2\), .* scores 2 classes"),
        ([[0.5, 0.5]], [0, 1], r"1 prediction_scores but 2 references"),
        ([], [], r"No examples"),
        (np.zeros((0, 3)), [], r"No examples"),
    ],
)
def test_ece_refuses_bad_input(scores, references, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(scores, references)
    metric = ExpectedCalibrationError()
    with pytest.raises(ValueError, match=message):
        metric.compute(prediction_scores=scores, references=references)
    assert metric.compute(prediction_scores=[[1.0, 0.0]], references=[1]) == {"ece": 1.0}


def test_ece_says_that_predictions_are_not_scores():
    with pytest.raises(ValueError, match="prediction_scores are missing: .*not predicted labels"):
        ExpectedCalibrationError().compute(predictions=[0, 1], references=[0, 1])


@pytest.mark.parametrize("n_bins", [0, -3, 1.5, True])
def test_ece_refuses_bad_bin_counts(n_bins):
    with pytest.raises(ValueError, match=rf"n_bins must be an integer of at least 1, got {n_bins}"):
        expected_calibration_error([[0.5, 0.5]], [0], n_bins)


def test_ece_tolerates_rounded_probabilities():
    scores = np.array([[0.9996, 0.0], [1.0004, 0.0]], dtype=np.float32)
    assert expected_calibration_error(scores, [0, 0]) == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------ evaluate.Metric


@pytest.mark.parametrize("metric_class", ALL_METRICS)
def test_info_is_complete_and_its_example_runs(metric_class):
    metric = metric_class()
    assert isinstance(metric, evaluate.Metric)
    assert metric.description and metric.citation.startswith("@")
    assert set(metric.features) - {"references"} <= {"predictions", "prediction_scores"}
    for text in (metric.inputs_description, metric.add_batch.__doc__, metric.compute.__doc__):
        test = doctest.DocTestParser().get_doctest(text, {}, metric_class.__name__, None, None)
        outcome = doctest.DocTestRunner().run(test)
        assert outcome.attempted >= 2 and outcome.failed == 0


def test_add_batch_add_and_compute_pool_their_examples():
    rng = np.random.default_rng(3)
    scores, references = rng.dirichlet([1, 1, 1], size=90), rng.integers(3, size=90)
    predictions = scores.argmax(1)
    for metric_class in ALL_METRICS:
        names = ["predictions"] if metric_class is not ExpectedCalibrationError else ["prediction_scores"]
        values = predictions if names == ["predictions"] else scores
        whole = metric_class().compute(**{names[0]: values, "references": references})
        metric = metric_class()
        for _ in range(2):  # the second round shows that compute has emptied the metric
            metric.add_batch(**{names[0]: values[:40], "references": references[:40]})
            metric.add_batch(**{names[0]: values[:0], "references": references[:0]})
            for i in range(40, 60):
                name = "prediction" if names == ["predictions"] else names[0]
                metric.add(**{name: values[i], "reference": references[i]})
            assert len(metric) == 60
            assert metric.compute(**{names[0]: values[60:], "references": references[60:]}) == pytest.approx(whole)
        with pytest.raises(ValueError, match="No examples: pass them to compute, or add some"):
            metric.compute()


def test_a_refused_batch_leaves_earlier_ones_and_unknown_inputs_are_named():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 0], references=[0, 1])
    with pytest.raises(ValueError, match="3 predictions but 1 references"):
        metric.add_batch(predictions=[0, 0, 0], references=[0])
    with pytest.raises(
        ValueError, match=r"Unknown inputs \['labels'\]: accuracy takes \['predictions', 'references'\]"
    ):
        metric.add_batch(predictions=[0], labels=[0])
    assert metric.compute() == {"accuracy": 0.5}


def test_ece_refuses_batches_with_other_classes_and_recovers():
    metric = ExpectedCalibrationError()
    metric.add_batch(prediction_scores=[[0.5, 0.5]], references=[0])
    metric.add_batch(prediction_scores=[[0.5, 0.25, 0.25]], references=[0])
    with pytest.raises(ValueError, match="with the same classes in every row"):
        metric.compute()
    with pytest.raises(ValueError, match="No examples"):
        metric.compute()
    assert metric.compute(prediction_scores=[[1.0, 0.0]], references=[0]) == {"ece": 0.0}


def test_combine_gives_the_keys_of_the_trainer_function():
    logits, labels = np.log([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.1, 0.4]]), np.array([0, 1, 2])
    columns = {"predictions": logits.argmax(1), "prediction_scores": np.exp(logits), "references": labels}
    combined = evaluate.combine([metric() for metric in ALL_METRICS])
    expected = compute_classification_metrics(EvalPrediction(logits, labels))
    assert combined.compute(**columns) == pytest.approx(expected, abs=1e-12)
    combined.add_batch(**columns)
    assert combined.compute() == pytest.approx(expected, abs=1e-12)


def test_in_memory_is_the_default_and_touches_no_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    impossible = str(tmp_path / "file" / "cache")  # nothing can be created below a file
    assert Accuracy(cache_dir=impossible).compute(predictions=[0], references=[0]) == {"accuracy": 1.0}
    with pytest.raises(NotADirectoryError):
        Accuracy(cache_dir=impossible, keep_in_memory=False)
    assert os.listdir(tmp_path) == ["file"]


def test_many_processes_need_files():
    with pytest.raises(ValueError, match="num_process=2 needs keep_in_memory=False"):
        Accuracy(num_process=2)


TWO_PROCESSES = """
    import os, socket, sys, time
    from pathlib import Path

    sys.modules["sklearn"] = None  # any import of it fails

    def refuse(*args):
        raise OSError("the network was used")

    socket.socket.connect = socket.getaddrinfo = refuse

    from hf_l2sp.metrics import Accuracy, ExpectedCalibrationError

    rank, meeting, cache = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def meet(name):  # both processes hold examples before either goes on
        (meeting / f"{name}-{rank}").touch()
        while not (meeting / f"{name}-{1 - rank}").exists():
            time.sleep(0.01)

    meet("start")
    # Two runs that know nothing of each other share the default experiment id and the cache.
    for keep_in_memory in (True, False):
        metric = Accuracy(keep_in_memory=keep_in_memory, cache_dir=cache)
        for round in range(2):
            metric.add_batch(predictions=[rank, rank], references=[0, 0])
            meet(f"{keep_in_memory}-{round}")
            assert metric.compute() == {"accuracy": 1.0 - rank}
    scores = [[0.0, 1.0], [1.0, 0.0]]
    ece = ExpectedCalibrationError().compute(prediction_scores=scores, references=[rank, 0])
    assert ece == {"ece": (1 - rank) / 2}
    # One evaluation over two processes, under an id of its own.
    metric = Accuracy(keep_in_memory=False, cache_dir=cache, num_process=2, process_id=rank, experiment_id="shared")
    result = metric.compute(predictions=[rank, rank, rank], references=[0, 0, 1])
    assert result == ({"accuracy": 0.5} if rank == 0 else None), result
    meet("end")
    assert os.listdir() == [], os.listdir()
"""


def test_two_processes_at_once_without_network_and_scikit_learn(tmp_path):
    for name in ("cwd", "meeting", "cache", "home"):
        (tmp_path / name).mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(Path(metrics.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [str(tmp_path / "meeting"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(rank), *arguments],
            cwd=tmp_path / "cwd",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        # The partner of a process that failed waits for ever: watch both.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            try:
                processes[0].wait(0.2)
                processes[1].wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    finally:
        failed = [p.poll() for p in processes]
        for p in processes:
            p.kill()
        output = [p.communicate()[0] for p in processes]
    assert failed == [0, 0], "\n".join(output)
    assert not list((tmp_path / "home").rglob("*.arrow")) and not list((tmp_path / "cache").rglob("*.arrow"))


# ------------------------------------------------------------------ the Trainer's function


def test_classification_metrics_equal_the_oracles():
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(500, 4)) * 3).astype(np.float32)
    scores = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=-1).numpy()
    # Calibrated but for chance, so that gaps of both signs occur: were all of one sign, the bins would not matter.
    labels = np.array([rng.choice(4, p=row) for row in scores])
    assert slow_ece(scores, labels, 15) != pytest.approx(slow_ece(scores, labels, 10), abs=1e-4)
    expected = {**sklearn_scores(labels, logits.argmax(1)), "ece": slow_ece(scores, labels)}
    got = compute_classification_metrics(EvalPrediction(logits, labels))
    assert got == pytest.approx(expected, abs=1e-12)
    assert list(got) == ["accuracy", "f1_macro", "mcc", "ece"]
    assert all(type(value) is float for value in got.values())
    assert json.loads(json.dumps(got)) == got
    hidden_states = np.zeros((500, 7, 2))
    assert compute_classification_metrics(EvalPrediction((logits, hidden_states), labels)) == got


def test_classification_metrics_of_extreme_logits():
    logits = np.array([[6e4, -6e4], [-6e4, 6e4], [0, -np.inf]], dtype=np.float16)
    expected = {"accuracy": 1.0, "f1_macro": 1.0, "mcc": 1.0, "ece": 0.0}
    assert compute_classification_metrics(EvalPrediction(logits, np.array([0, 1, 0]))) == expected


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((4, 3, 2)), np.zeros(4), r"need logits of shape \[examples, classes\], got shape \[4, 3, 2\]"),
        (np.zeros(4), np.zeros(4), r"need logits of shape \[examples, classes\], got shape \[4\]"),
        ((), np.zeros(4), r"got shape \[0\]"),
        (np.zeros((4, 1)), np.zeros(4), r"at least 2 classes, got shape \[4, 1\]: num_labels=1 .* regression"),
        (np.zeros((0, 3)), np.zeros(0), r"No examples: the evaluation set is empty \(logits of shape \[0, 3\]\)"),
        (np.array([[0, 1], [np.nan, 0], [1, np.nan]]), np.zeros(3), r"logits of 2 of 3 examples are NaN or infinite"),
        (np.array([[np.inf, 1], [1, 0]]), np.zeros(2), r"logits of 1 of 2 examples are NaN or infinite.*bf16"),
        (np.full((2, 2), -np.inf), np.zeros(2), r"logits of 2 of 2 examples are NaN or infinite"),
        (np.zeros((3, 2)), np.array([0, -100, 2]), r"2 of 3 label_ids are outside 0..1 \(first: -100\).*num_labels"),
        (np.zeros((3, 2)), np.zeros(2), r"3 rows of logits but 2 label_ids"),
        (np.zeros((3, 2)), np.zeros((3, 2)), r"label_ids .* got shape \[3, 2\].*multi-label"),
        (np.zeros((3, 2)), np.array([0.5, 1, 0]), r"label_ids must be integers, but 1 of 3 are not \(first: 0.5\)"),
        (np.zeros((3, 2)), None, r"label_ids are missing"),
    ],
)
def test_classification_metrics_refuse_bad_input(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_classification_metrics(EvalPrediction(logits, labels))


def test_classification_metrics_in_a_trainer(tmp_path):
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        output_hidden_states=True,  # predictions arrive as a tuple
    )
    rows = [{"input_ids": [i % 20, 3, 5], "labels": i % 3} for i in range(11)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4, disable_tqdm=True
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        eval_dataset=rows,
        compute_metrics=compute_classification_metrics,
    )
    scores = trainer.evaluate()
    output = trainer.predict(rows)
    assert isinstance(output.predictions, tuple)
    expected = sklearn_scores(output.label_ids, output.predictions[0].argmax(-1))
    assert {key: scores[f"eval_{key}"] for key in expected} == pytest.approx(expected)
    assert 0 <= scores["eval_ece"] <= 1 and output.metrics["test_ece"] == scores["eval_ece"]

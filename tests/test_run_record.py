"""What a run writes down for its report: counts against their definition, the command without its secrets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from hf_l2sp.run_record import describe_predictions, describe_run
from hf_l2sp.scores import N_BINS, expected_calibration_error

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def scored(rng):
    labels = rng.integers(0, 4, 200)
    logits = 2 * rng.normal(size=(200, 4))
    logits[np.arange(200), labels] += 1
    return logits, labels


def test_confusion_is_that_of_scikit_learn(scored):
    logits, labels = scored
    found = describe_predictions(logits, labels, NAMES)
    assert found["confusion"] == confusion_matrix(labels, logits.argmax(1), labels=range(4)).tolist()
    assert found["labels"] == NAMES and found["examples"] == 200


def test_labels_that_never_occur_have_their_row_and_column():
    found = describe_predictions(np.eye(4)[[0, 0, 2]], [0, 2, 2], NAMES)
    assert found["confusion"] == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_bins_against_one_example_at_a_time(scored):
    logits, labels = scored
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), logits.argmax(1) == labels
    found = describe_predictions(logits, labels, NAMES)
    assert len(found["bins"]) == N_BINS
    for b in found["bins"]:
        inside = (confidence > b["low"]) & (confidence <= b["high"])
        assert b["count"] == inside.sum()
        if b["count"]:
            assert b["confidence"] == pytest.approx(confidence[inside].mean(), rel=1e-12)
            assert b["accuracy"] == pytest.approx(right[inside].mean(), rel=1e-12)
        else:
            assert "accuracy" not in b
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in found["bins"] if b["count"])
    assert found["ece"] == pytest.approx(gaps / 200, abs=1e-12)
    assert found["ece"] == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-12)


def test_confidence_on_an_edge_closes_its_bin():
    # Three equal logits of fifteen bins: confidence 1/3 is the upper edge of the fifth.
    found = describe_predictions(np.zeros((1, 3)), [0], ["a", "b", "c"])
    assert [i for i, b in enumerate(found["bins"]) if b["count"]] == [4]


def test_it_is_json_and_takes_what_trainer_gives(scored):
    logits, labels = scored
    found = describe_predictions((logits.astype(np.float32), "hidden states"), labels, NAMES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_it_refuses(scored):
    logits, labels = scored
    with pytest.raises(ValueError, match="3 label names for logits of 4 classes"):
        describe_predictions(logits, labels, NAMES[:3])
    logits[0] = np.nan
    with pytest.raises(ValueError, match="1 of 200 examples are NaN or infinite"):
        describe_predictions(logits, labels, NAMES)


def test_the_command_can_be_pasted_into_a_shell():
    found = describe_run(["recipes/x.py", "--train_file", "my data.csv", "--tokens_column", "words"])
    assert found["command"] == "recipes/x.py --train_file 'my data.csv' --tokens_column words"
    assert found["versions"]["torch"] and found["versions"]["hf-l2sp"] and found["processes"] >= 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "s3cret"],
        ["--hub-token", "s3cret"],
        ["--hub_token=s3cret"],
        ["--push_to_hub_token", "s3cret", "--compare"],
        ["--wandb_api_key", "s3cret"],
        ["--password=s3cret"],
        ["--hub_model_id", "hf_s3cretS3cretS3cret"],
    ],
)
def test_tokens_and_passwords_are_not_written_down(words):
    found = describe_run(["x.py", *words, "--seed", "1"])
    assert "s3cret" not in json.dumps(found)
    assert found["argv"][-2:] == ["--seed", "1"] and len(found["argv"]) == len(words) + 3
    assert "***" in found["command"]


def test_processes_of_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert describe_run(["x.py"])["processes"] == 4

"""Classification and calibration scores as pure functions over numpy arrays, with checks of what they are given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import EvalPrediction

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

N_BINS = 15
SUM_TOLERANCE = 1e-3

# --------------------------------------------------------------------------- input checks


def as_labels(name: str, values: Any) -> IntArray:
    """`values` as int64 `[examples]`. Not left to `datasets`, which turns 0.7 into label 0 without a word."""
    if values is None:
        raise ValueError(f"{name} are missing: pass one integer label per example.")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be one integer label per example, but the items differ in length.") from error
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be one integer label per example, shape [examples], got shape {list(array.shape)}. "
            "Take argmax(-1) of logits or one-hot rows first; multi-label targets are not supported."
        )
    if array.size == 0 or array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype.kind != "f":
        raise ValueError(
            f"{name} must be integers, got {array.dtype} (first item {array[0]!r}): map label names to ids first."
        )
    fractional = ~np.isfinite(array) | (array != np.trunc(array))
    if fractional.any():
        raise ValueError(
            f"{name} must be integers, but {int(fractional.sum())} of {array.size} are not (first: "
            f"{array[fractional][0]}): pass class ids, not scores."
        )
    return array.astype(np.int64)


def check_same_length(first: str, n_first: int, second: str, n_second: int) -> None:
    if n_first != n_second:
        raise ValueError(f"{n_first} {first} but {n_second} {second}: pass one of each per example.")


def _check_label_range(name: str, labels: IntArray, n_classes: int) -> None:
    outside = (labels < 0) | (labels >= n_classes)
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {labels.size} {name} are outside 0..{n_classes - 1} (first: "
            f"{labels[outside][0]}), but the model scores {n_classes} classes: check num_labels and the label ids, "
            "and drop unlabelled examples (-1, -100)."
        )


def _as_probabilities(scores: Any) -> FloatArray:
    """`scores` as float64 `[examples, classes]`, refused unless every row is a probability distribution."""
    if scores is None:
        raise ValueError(
            "prediction_scores are missing: pass softmax probabilities [examples, classes], not predicted labels."
        )
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "prediction_scores must be numbers of shape [examples, classes] with the same classes in every row: "
            f"{error}"
        ) from error
    if array.size == 0 and array.ndim < 2:
        return array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            "prediction_scores must have the shape [examples, classes] with at least 2 classes, got "
            f"{list(array.shape)}. Write the probability p of a binary classifier as the row [1 - p, p]."
        )
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(f"prediction_scores hold NaN or infinite values in {int(bad.sum())} of {len(array)} rows.")
    sums = array.sum(axis=1)
    bad = (array < 0).any(axis=1) | (np.abs(sums - 1) > SUM_TOLERANCE)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"prediction_scores must be probabilities (at least 0, every row summing to 1 within {SUM_TOLERANCE:g}), "
            f"but {int(bad.sum())} of {len(array)} rows are not (row {row}: minimum {array[row].min():.4g}, sum "
            f"{sums[row]:.4g}): pass softmax probabilities, not logits."
        )
    return array


def check_scored(scores: Any, references: Any) -> tuple[FloatArray, IntArray]:
    probabilities, labels = _as_probabilities(scores), as_labels("references", references)
    check_same_length("prediction_scores", len(probabilities), "references", len(labels))
    _check_label_range("references", labels, probabilities.shape[1])
    return probabilities, labels


# --------------------------------------------------------------------------- the numbers


def confusion_matrix(references: npt.ArrayLike, predictions: npt.ArrayLike) -> IntArray:
    """Counts examples by true (row) and predicted (column) label.

    Rows and columns are the sorted labels that occur in either argument, so a class that no example has and
    nothing predicts has no row: it cannot weigh on a macro average.

    Args:
        references: true labels, integers.
        predictions: predicted labels, integers.

    Shape:
        references, predictions: `[examples]`; result: `[labels that occur, labels that occur]`.

    Raises:
        ValueError: no examples, different lengths, or labels that are not integers.
    """
    true, predicted = as_labels("references", references), as_labels("predictions", predictions)
    check_same_length("predictions", len(predicted), "references", len(true))
    if not len(true):
        raise ValueError("No examples: a metric needs at least one prediction and its reference.")
    labels, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    cells = np.bincount(codes[: len(true)] * len(labels) + codes[len(true) :], minlength=len(labels) ** 2)
    return cells.reshape(len(labels), len(labels)).astype(np.int64, copy=False)


def accuracy_from_confusion(matrix: IntArray) -> float:
    """Share of examples on the diagonal of a [`confusion_matrix`], 0 to 1."""
    return float(np.trace(matrix) / matrix.sum())


def macro_f1_from_confusion(matrix: IntArray) -> float:
    """Unweighted mean over the labels of F1 = 2·TP / (true + predicted), 0 to 1.

    The mean of the F1 scores, not the F1 of mean precision and recall (Opitz and Burst 2019, arXiv 1911.03347).
    A label without true positives counts as 0. Equals scikit-learn's `f1_score(average="macro", zero_division=0)`.
    """
    occurrences = matrix.sum(axis=0) + matrix.sum(axis=1)
    # A caller's matrix may have a label that never occurs; it scores 0 as in scikit-learn, not 0/0.
    return float(np.mean(2 * np.diag(matrix) / np.maximum(occurrences, 1)))


def mcc_from_confusion(matrix: IntArray) -> float:
    """Matthews correlation coefficient for any number of classes, -1 to 1 (Gorodkin 2004).

    0 where it is undefined, which is when all references, or all predictions, have one label.
    Equals scikit-learn's `matthews_corrcoef`.
    """
    # Python integers: the products reach examples**4, which int64 cannot hold from some 55,000 examples on.
    true, predicted = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    n, correct = sum(true), int(np.trace(matrix))
    covariance: int = correct * n - sum(t * p for t, p in zip(true, predicted, strict=True))
    variance_true = n * n - sum(t * t for t in true)
    variance_predicted = n * n - sum(p * p for p in predicted)
    if not variance_true or not variance_predicted:
        return 0.0
    return covariance / math.sqrt(variance_true * variance_predicted)


def _calibration_error(confidence: FloatArray, correct: npt.NDArray[np.bool_], n_bins: int) -> float:
    if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < 1:
        raise ValueError(f"n_bins must be an integer of at least 1, got {n_bins!r}.")
    if not len(confidence):
        raise ValueError("No examples: the calibration error needs at least one scored example.")
    # Divided, not a linspace: multiples of a rounded width miss some edges by a bit, and with them a confidence there.
    inner_edges = np.arange(1, n_bins) / n_bins
    # side="left" closes a bin on the right. Rounding above 1 falls into the last bin.
    bins = np.searchsorted(inner_edges, confidence, side="left")
    gaps = np.bincount(bins, weights=correct, minlength=n_bins) - np.bincount(bins, confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def expected_calibration_error(
    prediction_scores: npt.ArrayLike, references: npt.ArrayLike, n_bins: int = N_BINS
) -> float:
    """Mean gap between confidence and accuracy, 0 (calibrated) to 1 (sure and wrong).

    Σ_b n_b/n · |accuracy_b − mean confidence_b| over equal-width bins ((k−1)/n_bins, k/n_bins] of the confidence,
    the highest probability of an example. Guo et al. 2017, arXiv 1706.04599, equation 3.

    Args:
        prediction_scores: softmax probabilities; of equal ones the first counts as the prediction.
        references: true labels, integers in `0..classes-1`.
        n_bins: number of bins; 15 as in the paper.

    Shape:
        prediction_scores: `[examples, classes]`; references: `[examples]`.

    Raises:
        ValueError: no examples, another shape, NaN, rows that are not probabilities, labels out of range, n_bins < 1.
    """
    probabilities, labels = check_scored(prediction_scores, references)
    return _calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, n_bins)


def compute_classification_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro-F1, MCC and calibration error of a classifier, for `Trainer(compute_metrics=...)`.

    Every example counts, there is no ignored label. The softmax is taken in float64.

    Args:
        eval_prediction: `predictions` are logits or a tuple that starts with them; `label_ids` are class ids.

    Shape:
        logits: `[examples, classes]`; label_ids: `[examples]`.

    Returns:
        `accuracy`, `f1_macro`, `mcc` and `ece` (fractions, not percent) as Python floats.

    Raises:
        ValueError: logits of another shape, of one class (regression), with rows of NaN or infinity; labels that are
            missing, not integers or out of range; no examples.
    """
    logits = eval_prediction.predictions
    if isinstance(logits, tuple) and logits:
        logits = logits[0]
    shape = list(np.shape(logits))
    if len(shape) != 2:
        raise ValueError(
            f"Classification metrics need logits of shape [examples, classes], got shape {shape}. "
            "Token classification and generation need metrics of their own."
        )
    if shape[1] < 2:
        raise ValueError(
            f"Classification metrics need logits of at least 2 classes, got shape {shape}: num_labels=1 makes the "
            "model a regression. Set num_labels to the number of classes."
        )
    scores = np.asarray(logits, dtype=np.float64)
    labels = as_labels("label_ids", eval_prediction.label_ids)
    check_same_length("rows of logits", len(scores), "label_ids", len(labels))
    if not len(scores):
        raise ValueError(f"No examples: the evaluation set is empty (logits of shape {shape}).")
    # One class at -inf is a masked class and fine; its row maximum is finite all the same.
    broken = ~np.isfinite(scores.max(axis=1))
    if broken.any():
        raise ValueError(
            f"The logits of {int(broken.sum())} of {len(scores)} examples are NaN or infinite: training has diverged "
            "or overflowed. Lower the learning rate, or train in bf16 or fp32 instead of fp16."
        )
    _check_label_range("label_ids", labels, shape[1])

    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    # The highest probability is exp(0) over the sum. Predictions come from the logits: softmax can make new ties.
    confidence = 1 / exponentials.sum(axis=1)
    predictions = scores.argmax(axis=1)
    matrix = confusion_matrix(labels, predictions)
    return {
        "accuracy": accuracy_from_confusion(matrix),
        "f1_macro": macro_f1_from_confusion(matrix),
        "mcc": mcc_from_confusion(matrix),
        "ece": _calibration_error(confidence, predictions == labels, N_BINS),
    }

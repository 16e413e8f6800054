"""Classification and calibration metrics that need neither the Hub nor scikit-learn.

The numbers are pure functions over numpy arrays; the `evaluate.Metric` classes around them are instantiated
directly (`Accuracy()`), because `evaluate.load("accuracy")` downloads a script and therefore fails offline.
[`compute_classification_metrics`] goes straight into `Trainer(compute_metrics=...)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from transformers import EvalPrediction

__all__ = [
    "Accuracy",
    "ExpectedCalibrationError",
    "MacroF1",
    "MatthewsCorrelation",
    "accuracy_from_confusion",
    "compute_classification_metrics",
    "confusion_matrix",
    "expected_calibration_error",
    "macro_f1_from_confusion",
    "mcc_from_confusion",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

N_BINS = 15
_COLUMNS = {"predictions", "references", "prediction_scores"}
SUM_TOLERANCE = 1e-3

# --------------------------------------------------------------------------- input checks


def _as_labels(name: str, values: Any) -> IntArray:
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


def _check_same_length(first: str, n_first: int, second: str, n_second: int) -> None:
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


def _check_scored(scores: Any, references: Any) -> tuple[FloatArray, IntArray]:
    probabilities, labels = _as_probabilities(scores), _as_labels("references", references)
    _check_same_length("prediction_scores", len(probabilities), "references", len(labels))
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
    true, predicted = _as_labels("references", references), _as_labels("predictions", predictions)
    _check_same_length("predictions", len(predicted), "references", len(true))
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
    covariance = correct * n - sum(t * p for t, p in zip(true, predicted, strict=True))
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
    probabilities, labels = _check_scored(prediction_scores, references)
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
    labels = _as_labels("label_ids", eval_prediction.label_ids)
    _check_same_length("rows of logits", len(scores), "label_ids", len(labels))
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


# --------------------------------------------------------------------------- evaluate.Metric around them

_LABEL_INPUTS = """
Args:
    predictions: predicted class ids, one integer per example.
    references: true class ids, one integer per example.

Returns:
    {key}: see the description.

Example:

    >>> from hf_l2sp.metrics import {name}
    >>> {name}().compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1])
    {result}
"""

_ECE_INPUTS = """
Args:
    prediction_scores: softmax probabilities, one row of classes per example.
    references: true class ids, one integer per example.
    n_bins: number of equal-width confidence bins, 15 by default; only for `compute`.

Returns:
    ece: see the description.

Example:

    >>> from hf_l2sp.metrics import ExpectedCalibrationError
    >>> scores = [[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]
    >>> ExpectedCalibrationError().compute(prediction_scores=scores, references=[0, 0, 1, 0])
    {'ece': 0.3125}
"""


class _OfflineMetric(evaluate.Metric):
    """An `evaluate.Metric` to instantiate directly, that checks inputs when they are added.

    The class docstring is the description of its `MetricInfo`.

    Args:
        config_name: name of the configuration, part of the cache path.
        keep_in_memory: hold the examples in memory and touch no file. False for `num_process > 1`, where the
            processes meet through files under `cache_dir`; give concurrent evaluations an `experiment_id` then.
        **kwargs: as in `evaluate.Metric`.

    Raises:
        ValueError: `keep_in_memory` together with `num_process > 1`.
    """

    citation_text: str

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        if keep_in_memory and kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process={kwargs['num_process']} needs keep_in_memory=False: the processes exchange examples "
                "through files under cache_dir."
            )
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # evaluate makes a cache folder even for examples kept in memory, which fails on a read-only home.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _make_info(self, inputs: str, scored: dict[str, Any]) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            citation=self.citation_text,
            inputs_description=inputs,
            features=datasets.Features({**scored, "references": datasets.Value("int64")}),
        )

    def _checked(self, columns: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    # The base class appends inputs_description, with its example, to the docstrings of the next three.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds checked examples; an empty batch adds none."""
        unknown = sorted(set(kwargs) - _COLUMNS)
        if unknown:
            raise ValueError(f"Unknown inputs {unknown}: {self.name} takes {self._feature_names()}.")
        columns = self._checked({"predictions": predictions, "references": references, **kwargs})
        if len(columns["references"]):
            super().add_batch(**columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one checked example: the arguments of `add_batch`, each without its first axis."""
        given = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in given.items() if value is not None})

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """Computes the metric of the examples added so far and of those given here, and forgets them."""
        given = {"predictions": predictions, "references": references, **kwargs}
        # A column that is not of this metric passes unused: evaluate.combine hands every metric all of them.
        columns = {name: given.pop(name) for name in _COLUMNS & given.keys()}
        if any(value is not None for value in columns.values()):
            self.add_batch(**columns)
        if self.writer is None:
            raise ValueError("No examples: pass them to compute, or add some with add or add_batch before it.")
        return super().compute(**given)


class _ConfusionMetric(_OfflineMetric):
    key: str
    example_result: str
    function: Callable[[IntArray], float]

    def _info(self) -> evaluate.MetricInfo:
        inputs = _LABEL_INPUTS.format(name=type(self).__name__, key=self.key, result=self.example_result)
        return self._make_info(inputs, {"predictions": datasets.Value("int64")})

    def _checked(self, columns: dict[str, Any]) -> dict[str, Any]:
        labels = {name: _as_labels(name, columns.get(name)) for name in ("predictions", "references")}
        _check_same_length("predictions", len(labels["predictions"]), "references", len(labels["references"]))
        return labels

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.key: type(self).function(confusion_matrix(references, predictions))}


class Accuracy(_ConfusionMetric):
    """Accuracy: share of examples whose predicted label is the true one, 0 to 1 (key `accuracy`)."""

    key = "accuracy"
    example_result = "{'accuracy': 0.75}"
    function = staticmethod(accuracy_from_confusion)
    citation_text = """@article{pedregosa2011scikit,
  title = {Scikit-learn: Machine Learning in {P}ython},
  author = {Pedregosa, F. and Varoquaux, G. and Gramfort, A. and others},
  journal = {Journal of Machine Learning Research}, volume = {12}, pages = {2825--2830}, year = {2011}
}"""


class MacroF1(_ConfusionMetric):
    """Macro-F1: unweighted mean F1 of the labels in references or predictions, 0 to 1 (key `f1_macro`).

    A label without true positives counts as 0.
    """

    key = "f1_macro"
    example_result = "{'f1_macro': 0.7777777777777777}"
    function = staticmethod(macro_f1_from_confusion)
    citation_text = """@article{opitz2019macro,
  title = {Macro {F1} and Macro {F1}}, author = {Opitz, Juri and Burst, Sebastian},
  journal = {arXiv preprint arXiv:1911.03347}, year = {2019}
}"""


class MatthewsCorrelation(_ConfusionMetric):
    """Matthews correlation coefficient for any number of classes, -1 to 1 (key `mcc`).

    1 is perfect and 0 no better than chance; 0 also where all references, or all predictions, have one label.
    """

    key = "mcc"
    example_result = "{'mcc': 0.7}"
    function = staticmethod(mcc_from_confusion)
    citation_text = """@article{gorodkin2004comparing,
  title = {Comparing two {K}-category assignments by a {K}-category correlation coefficient},
  author = {Gorodkin, Jan},
  journal = {Computational Biology and Chemistry}, volume = {28}, number = {5-6}, pages = {367--374}, year = {2004}
}"""


class ExpectedCalibrationError(_OfflineMetric):
    """Expected calibration error: mean gap between confidence and accuracy, 0 to 1 (key `ece`).

    Taken over equal-width confidence bins closed on the right; 0 is calibrated, 1 is sure and wrong.
    """

    citation_text = """@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {Proceedings of the 34th International Conference on Machine Learning},
  year = {2017}, note = {arXiv:1706.04599}
}"""

    def _info(self) -> evaluate.MetricInfo:
        return self._make_info(_ECE_INPUTS, {"prediction_scores": datasets.Sequence(datasets.Value("float64"))})

    def _checked(self, columns: dict[str, Any]) -> dict[str, Any]:
        scores, labels = _check_scored(columns.get("prediction_scores"), columns.get("references"))
        return {"prediction_scores": scores, "references": labels}

    def _compute(self, prediction_scores: Any, references: Any, n_bins: int = N_BINS) -> dict[str, float]:
        return {"ece": expected_calibration_error(prediction_scores, references, n_bins)}

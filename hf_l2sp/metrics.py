"""Classification, calibration and entity metrics that need neither the Hub nor scikit-learn.

The `evaluate.Metric` classes are instantiated directly (`Accuracy()`), because `evaluate.load("accuracy")` downloads a
script and therefore fails offline. The numbers are the pure functions of `scores.py` and `entity_scores.py`, given
out here as well; `compute_classification_metrics`, and for token classification `make_entity_metrics(label_names)`,
go straight into `Trainer(compute_metrics=...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import evaluate

from .entity_scores import check_tagged, entity_scores, make_entity_metrics
from .scores import (
    N_BINS,
    IntArray,
    accuracy_from_confusion,
    as_labels,
    check_same_length,
    check_scored,
    compute_classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    macro_f1_from_confusion,
    mcc_from_confusion,
)

__all__ = [
    "Accuracy",
    "EntityScores",
    "ExpectedCalibrationError",
    "MacroF1",
    "MatthewsCorrelation",
    "accuracy_from_confusion",
    "compute_classification_metrics",
    "confusion_matrix",
    "entity_scores",
    "expected_calibration_error",
    "macro_f1_from_confusion",
    "make_entity_metrics",
    "mcc_from_confusion",
]

_COLUMNS = {"predictions", "references", "prediction_scores"}

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

_ENTITY_INPUTS = """
Args:
    predictions: predicted IOB2 tags, one list of strings per sentence.
    references: true IOB2 tags, one list of strings per sentence.
    types: entity types to report even if they occur nowhere; only for `compute`.

Returns:
    precision, recall, f1, the same with _macro, and TYPE_precision, TYPE_recall, TYPE_f1: see the description.

Example:

    >>> from hf_l2sp.metrics import EntityScores
    >>> true = [["B-DRUG", "I-DRUG", "O", "B-DOSE"]]
    >>> scores = EntityScores().compute(predictions=[["B-DRUG", "O", "O", "B-DOSE"]], references=true)
    >>> scores["f1"], scores["DRUG_f1"], scores["DOSE_f1"]
    (0.5, 0.0, 1.0)
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
        folder: str = self._data_dir_root if self.keep_in_memory else super()._build_data_dir()
        return folder

    def _make_info(self, inputs: str, scored: dict[str, Any]) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            citation=self.citation_text,
            inputs_description=inputs,
            features=datasets.Features(scored | {"references": scored.get("references", datasets.Value("int64"))}),
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
        scores: dict[str, float] | None = super().compute(**given)
        return scores


class _ConfusionMetric(_OfflineMetric):
    key: str
    example_result: str
    function: Callable[[IntArray], float]

    def _info(self) -> evaluate.MetricInfo:
        inputs = _LABEL_INPUTS.format(name=type(self).__name__, key=self.key, result=self.example_result)
        return self._make_info(inputs, {"predictions": datasets.Value("int64")})

    def _checked(self, columns: dict[str, Any]) -> dict[str, Any]:
        labels = {name: as_labels(name, columns.get(name)) for name in ("predictions", "references")}
        check_same_length("predictions", len(labels["predictions"]), "references", len(labels["references"]))
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
        scores, labels = check_scored(columns.get("prediction_scores"), columns.get("references"))
        return {"prediction_scores": scores, "references": labels}

    def _compute(self, prediction_scores: Any, references: Any, n_bins: int = N_BINS) -> dict[str, float]:
        return {"ece": expected_calibration_error(prediction_scores, references, n_bins)}


class EntityScores(_OfflineMetric):
    """Entity scores: precision, recall and F1 over entities, of which type and both ends must be right, 0 to 1.

    Keys: `precision`, `recall`, `f1` over all entities; `precision_macro`, `recall_macro`, `f1_macro`, the unweighted
    means over the types in references or predictions; `TYPE_precision`, `TYPE_recall`, `TYPE_f1` of each type. Tags
    are read as strict IOB2: an `I-` that continues nothing belongs to no entity. What is undefined counts as 0.
    """

    citation_text = """@inproceedings{tjong2003introduction,
  title = {Introduction to the {CoNLL}-2003 Shared Task: Language-Independent Named Entity Recognition},
  author = {Tjong Kim Sang, Erik F. and De Meulder, Fien},
  booktitle = {Proceedings of CoNLL-2003}, pages = {142--147}, year = {2003}
}"""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return self._make_info(_ENTITY_INPUTS, {"predictions": tags, "references": tags})

    def _checked(self, columns: dict[str, Any]) -> dict[str, Any]:
        references, predictions = check_tagged(columns.get("references"), columns.get("predictions"))
        return {"predictions": predictions, "references": references}

    def _compute(self, predictions: Any, references: Any, types: Iterable[str] = ()) -> dict[str, float]:
        return entity_scores(references, predictions, types)

"""Entity scores of IOB2 tags as pure functions: strict spans, precision, recall and F1 per type and over all.

The numbers are those of seqeval 1.2.2 in strict mode, which the tests hold them against. It is not used itself: it
has had no release since 2020, brings scikit-learn along, and would be a dependency of the library.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from .scores import IntArray, check_same_length

# What Trainer and the collators of transformers put where a token has no label.
IGNORED = -100

Tags = list[list[str]]
Span = tuple[str, int, int]


@functools.lru_cache(maxsize=4096)
def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and entity type of an IOB2 tag: `B-PER` is `("B", "PER")`, `O` is `("O", "")`.

    Raises:
        ValueError: `tag` is none of `O`, `B-TYPE` and `I-TYPE`.
    """
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I") or not dash or not kind.strip():
        raise ValueError(f"{tag!r} is not an IOB2 tag: write O, B-TYPE or I-TYPE.")
    return prefix, kind


def entity_spans(tags: Iterable[str]) -> list[Span]:
    """The entities of one sequence of IOB2 tags, strictly read.

    `B-X` opens an entity and the `I-X` right after it continue it. An `I-` that continues nothing, because it follows
    `O`, the start of the sequence or another type, belongs to no entity; the entity before it stands.

    Args:
        tags: one tag per word.

    Returns:
        `(type, first word, one past the last word)` of each entity, in order.

    Raises:
        ValueError: a tag is none of `O`, `B-TYPE` and `I-TYPE`.
    """
    spans: list[Span] = []
    kind: str | None = None  # of the entity that is open
    first = index = 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, tag_kind = split_tag(tag)
        if prefix == "I" and tag_kind == kind:
            continue
        if kind is not None:
            spans.append((kind, first, index))
        kind, first = (tag_kind, index) if prefix == "B" else (None, index)
    return spans


# --------------------------------------------------------------------------- input checks


def _as_tags(name: str, sequences: Any) -> Tags:
    """`sequences` as lists of checked tags."""
    if sequences is None:
        raise ValueError(f"{name} are missing: pass one list of IOB2 tags per sentence.")
    rows: Tags = []
    for number, row in enumerate(sequences):
        if isinstance(row, str) or not isinstance(row, (list, tuple, np.ndarray)):
            raise ValueError(
                f"{name} must be lists of tags, one per sentence, but item {number} is {row!r}: wrap the tags of a "
                "single sentence in a list."
            )
        for tag in row:
            if not isinstance(tag, str):
                raise ValueError(f"{name}, sentence {number}: {tag!r} is not a tag: map label ids to names first.")
            try:
                split_tag(str(tag))
            except ValueError as error:
                raise ValueError(f"{name}, sentence {number}: {error}") from None
        rows.append([str(tag) for tag in row])
    return rows


def check_tagged(references: Any, predictions: Any) -> tuple[Tags, Tags]:
    """Both as lists of lists of tags; raises `ValueError` unless they are IOB2 and of the same lengths."""
    true, predicted = _as_tags("references", references), _as_tags("predictions", predictions)
    check_same_length("predictions", len(predicted), "references", len(true))
    for number, (one, other) in enumerate(zip(true, predicted, strict=True)):
        if len(one) != len(other):
            raise ValueError(
                f"sentence {number} has {len(other)} predictions but {len(one)} references: pass one of each per word."
            )
    return true, predicted


# --------------------------------------------------------------------------- the numbers


def _ratios(correct: int, predicted: int, true: int) -> tuple[float, float, float]:
    """Precision, recall and F1; 0 where nothing was predicted, or nothing there to find."""
    return (
        correct / predicted if predicted else 0.0,
        correct / true if true else 0.0,
        2 * correct / (predicted + true) if predicted + true else 0.0,
    )


def entity_scores(references: Any, predictions: Any, types: Iterable[str] = ()) -> dict[str, float]:
    """Precision, recall and F1 over entities, where one counts if its type and both its ends are right.

    Equals seqeval's `classification_report(mode="strict", scheme=IOB2, zero_division=0)`, but for two kinds of input:
    where there is no entity on either side every score is 0 (its macro means are NaN), and what is not an IOB2 tag is
    refused (it takes `BPER` for `B-PER`).

    Args:
        references: true IOB2 tags, one list per sentence.
        predictions: predicted IOB2 tags, one list per sentence; how they are read if they are no valid IOB2 is told
            at `entity_spans`.
        types: types to report even if they occur nowhere (with scores of 0), so that the keys do not depend on the
            predictions.

    Returns:
        `precision`, `recall`, `f1` over all entities (micro); `precision_macro`, `recall_macro`, `f1_macro`, the
        unweighted means over the types in references or predictions; and `TYPE_precision`, `TYPE_recall`, `TYPE_f1`
        of each type in alphabetical order.

    Raises:
        ValueError: no sentences, different lengths, or tags that are not IOB2.
    """
    true_tags, predicted_tags = check_tagged(references, predictions)
    if not true_tags:
        raise ValueError("No examples: a metric needs at least one sentence and its predictions.")
    true: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for one, other in zip(true_tags, predicted_tags, strict=True):
        spans, found = entity_spans(one), entity_spans(other)
        true.update(kind for kind, _, _ in spans)
        predicted.update(kind for kind, _, _ in found)
        correct.update(kind for kind, _, _ in set(spans) & set(found))

    per_type = {
        kind: _ratios(correct[kind], predicted[kind], true[kind]) for kind in sorted({*true, *predicted, *types})
    }
    occurring = [per_type[kind] for kind in sorted({*true, *predicted})]
    macro = np.mean(occurring, axis=0).tolist() if occurring else [0.0, 0.0, 0.0]
    micro = _ratios(correct.total(), predicted.total(), true.total())
    names = ("precision", "recall", "f1")
    return {
        **dict(zip(names, micro, strict=True)),
        **{f"{name}_macro": value for name, value in zip(names, macro, strict=True)},
        **{
            f"{kind}_{name}": value
            for kind, values in per_type.items()
            for name, value in zip(names, values, strict=True)
        },
    }


# --------------------------------------------------------------------------- for Trainer


def check_label_names(label_names: Sequence[str]) -> list[str]:
    """The names as a list; raises `ValueError` unless they are distinct IOB2 tags."""
    names = list(label_names)
    if isinstance(label_names, (str, Mapping)) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"label_names must be the tags in the order of their ids, got {label_names!r}; of a model's "
            "config.id2label pass list(id2label.values())."
        )
    for name in names:
        split_tag(name)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"label_names must be two or more different tags, got {names}.")
    return names


def predicted_ids(predictions: Any, labels: IntArray, n_labels: int) -> IntArray:
    """Predicted label ids of Trainer's predictions.

    Args:
        predictions: logits, a tuple that starts with them, or label ids (where `preprocess_logits_for_metrics` took
            the argmax to save memory).
        labels: true label ids, -100 where a token has none.
        n_labels: number of labels.

    Shape:
        logits: `[rows, tokens, labels]`; label ids and result: `[rows, tokens]`.

    Raises:
        ValueError: another shape; at a token that has a label: NaN, infinity, or an id out of range.
    """
    values = np.asarray(predictions[0] if isinstance(predictions, tuple) and predictions else predictions)
    if values.shape == labels.shape and values.dtype.kind in "iu":
        strange = (labels != IGNORED) & ((values < 0) | (values >= n_labels))
        if strange.any():
            raise ValueError(
                f"{int(strange.sum())} predicted ids are outside 0..{n_labels - 1} (first: {values[strange][0]})."
            )
        return values.astype(np.int64)
    if values.shape != (*labels.shape, n_labels):
        raise ValueError(
            f"Entity metrics need logits of shape [rows, tokens, labels], here {[*labels.shape, n_labels]}, or label "
            f"ids of shape {list(labels.shape)}, got shape {list(values.shape)}: check num_labels and label_names."
        )
    # Trainer fills up with -100: only labelled tokens are looked at. A label at -inf is a masked one and fine.
    best = values.max(axis=-1)
    broken = ~np.isfinite(best) & (labels != IGNORED)
    if broken.any():
        raise ValueError(
            f"The logits of {int(broken.sum())} of {int((labels != IGNORED).sum())} tokens are NaN or infinite: "
            "training has diverged or overflowed. Lower the learning rate, or train in bf16 or fp32 instead of fp16."
        )
    ids: IntArray = values.argmax(axis=-1)
    return ids


def label_matrix(label_ids: Any, n_labels: int) -> IntArray:
    """Trainer's `label_ids` as int64 `[rows, tokens]`; raises `ValueError` for other shapes and unknown ids."""
    if label_ids is None:
        raise ValueError("label_ids are missing: the evaluation set needs a column `labels`.")
    labels = np.asarray(label_ids)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"label_ids must be integers of shape [rows, tokens], got {labels.dtype} of shape {list(labels.shape)}."
        )
    strange = (labels != IGNORED) & ((labels < 0) | (labels >= n_labels))
    if strange.any():
        raise ValueError(
            f"{int(strange.sum())} label_ids are outside 0..{n_labels - 1} (first: {labels[strange][0]}), but there "
            f"are {n_labels} label_names: check num_labels and the label ids."
        )
    return labels.astype(np.int64)


def _compute_entity_metrics(eval_prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    labels = label_matrix(eval_prediction.label_ids, len(names))
    ids = predicted_ids(eval_prediction.predictions, labels, len(names))
    labelled = labels != IGNORED
    if not labelled.any():
        raise ValueError(f"No examples: no token of the evaluation set has a label (label_ids are all {IGNORED}).")
    references, predictions = (
        [[names[i] for i in row[mask]] for row, mask in zip(array, labelled, strict=True)] for array in (labels, ids)
    )
    types = {split_tag(name)[1] for name in names} - {""}
    return entity_scores(references, predictions, types)


def make_entity_metrics(label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The function for `Trainer(compute_metrics=...)` of a token classifier, which gives `entity_scores`.

    A row is one sentence whose words have their label on one sub-word each and -100 on the rest.

    Args:
        label_names: IOB2 tags in the order of the model's label ids.

    Returns:
        Function from `EvalPrediction` to the scores, which can be pickled. It takes logits `[rows, tokens, labels]`,
        a tuple that starts with them, or label ids `[rows, tokens]`, and raises `ValueError` for other shapes, ids out
        of range, NaN or infinity, and where no token has a label.

    Raises:
        ValueError: the names are not distinct IOB2 tags.
    """
    return functools.partial(_compute_entity_metrics, names=check_label_names(label_names))

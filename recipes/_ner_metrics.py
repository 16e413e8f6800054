"""Entity scores over whole sentences, however these were split into rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from _ner_align import Encoded, to_words
from _ner_tags import entity_types, fill_gaps
from transformers import EvalPrediction

from hf_l2sp.entity_scores import IGNORED, check_label_names, entity_scores, label_matrix, predicted_ids


class SentenceMetrics:
    """`entity_scores` of sentences, for `Trainer(compute_metrics=...)`.

    `make_entity_metrics` takes every row for a sentence: an entity that runs from one window of a long sentence into
    the next would count as two, and one of words that no model sees not at all. Here the predictions are put together
    again and held against all tags.

    Args:
        names: The tags in the order of their label ids.
        parts: Per split its encoded sentences and their tags. Trainer does not say which one it evaluates: it is
            known by its labels, row by row (where two have the very same, the first is as good).
    """

    def __init__(self, names: Sequence[str], parts: dict[str, tuple[Encoded, Sequence[Sequence[str]]]]) -> None:
        self.names = check_label_names(names)
        self.parts = parts
        self.labels = {
            split: [[label for label in row if label != IGNORED] for row in encoded.columns["labels"]]
            for split, (encoded, _) in parts.items()
        }

    def __call__(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """The scores; raises `ValueError` if the predictions are of no split, and as `predicted_ids` does."""
        labels = label_matrix(eval_prediction.label_ids, len(self.names))
        ids = predicted_ids(eval_prediction.predictions, labels, len(self.names))
        labelled = labels != IGNORED
        rows = [row[mask].tolist() for row, mask in zip(labels, labelled, strict=True)]
        split = next((split for split, own in self.labels.items() if own == rows), None)
        if split is None:
            raise ValueError(
                f"The {len(rows)} rows of label_ids are those of no split; known are "
                f"{', '.join(f'{name} ({len(own)} rows)' for name, own in self.labels.items())}."
            )
        encoded, tags = self.parts[split]
        # Trainer pads on either side and anew for every batch: the first label tells where a row begins.
        firsts = [next(i for i, v in enumerate(row) if v != IGNORED) for row in encoded.columns["labels"]]
        shifts = (np.argmax(labelled, axis=1) - firsts).tolist()
        found = to_words(encoded.placements, [len(row) for row in tags], ids.tolist(), shifts)
        predictions = [fill_gaps([None if i is None else self.names[i] for i in row]) for row in found]
        return entity_scores(tags, predictions, entity_types(self.names))

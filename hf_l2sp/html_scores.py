"""Sections of the HTML report on the results: scores, comparison with plain fine-tuning, labels, entities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .charts import reliability_diagram
from .html_training import percent, shown
from .markup import Cell, Safe, details, element, join, named, note, section, table
from .run_folder import COMPARISON_NAME, RESULTS_NAME, RunFolder, as_number
from .run_record import PREDICTIONS_NAME
from .score_table import ScorePair, direction, entity_types, pairs, splits, without_entity_types

SPLIT_NAMES = {"eval": "validation", "test": "test"}
_MARKS = {"better": "▲ better", "worse": "▼ worse", "same": "= same", "": ""}
_COUNTED = (("better", "better"), ("the same", "same"), ("worse", "worse"))
_MATRIX = 60  # labels; a larger matrix cannot be read
_BESIDE = 12  # labels whose matrix leaves room for the diagram beside it
_CONFUSED = 10


def scores_section(folder: RunFolder) -> Safe:
    """All scores, beside those of plain fine-tuning where they were compared."""
    title = "Scores"
    if folder.compared is not None:
        return section("Comparison with plain fine-tuning", _comparison(folder, *folder.compared))
    missing = note(folder.why(COMPARISON_NAME))
    if not folder.has_scores:
        return section(title, note(folder.why(RESULTS_NAME)), missing)
    source = None if RESULTS_NAME in folder.contents else note(folder.why(RESULTS_NAME), " These are the last logged.")
    rows = [
        [name, shown(folder.scores[name]), Cell(_better_is(name), "words")]
        for name in without_entity_types(folder.scores)
    ]
    return section(title, source, table("Scores", ["score", "value", "better is"], rows), missing)


def _better_is(name: str) -> str:
    return {1: "higher", -1: "lower", 0: "–"}[direction(name)]


def _comparison(folder: RunFolder, plain: Mapping[str, Any], l2sp: Mapping[str, Any]) -> Safe:
    names = set(without_entity_types(l2sp)) | set(without_entity_types(plain))
    compared = [pair for pair in pairs(plain, l2sp) if pair.name in names]
    rows = [[p.name, _value(p.first), _value(p.second), _difference(p)] for p in compared]
    head = ["score", "plain", "L2-SP", "difference"]
    seed = folder.get(COMPARISON_NAME).get("seed")
    seeded = "" if seed is None else f" and seed {seed}"
    remark = (
        "Difference is L2-SP minus plain, and whether L2-SP is better; lower is better for losses, calibration errors "
        f"(ece) and perplexity. Both runs had the same data and settings{seeded}: one pair of runs, in which small "
        "differences are chance."
    )
    return join([_verdict(compared), table("Plain fine-tuning and L2-SP", head, rows), note(remark)])


def _verdict(compared: Sequence[ScorePair]) -> Safe | None:
    """How often L2-SP was better, in a sentence."""
    tested = [p.verdict for p in compared if p.name.startswith("test_") and p.verdict]
    scored = tested or [p.verdict for p in compared if p.verdict]
    if not scored:
        return None
    counts = [f"{word} in {scored.count(key)}" for word, key in _COUNTED if scored.count(key)]
    return element("p", f"Of {len(scored)} {'test ' if tested else ''}scores L2-SP is {', '.join(counts)}.")


def _value(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else shown(value, digits)


def _difference(pair: ScorePair) -> Cell:
    """Second minus first, and in a word whether that is better: never by colour alone."""
    if pair.difference is None:
        return Cell("–")
    number = f"{pair.difference:+.4f}" if math.isfinite(pair.difference) else "not finite"
    verdict = element("span", _MARKS[pair.verdict], class_=f"verdict {pair.verdict}".rstrip())
    return Cell(join([element("span", number), " ", verdict]), "difference")


# --------------------------------------------------------------------------- single labels and types of entities


def predictions_section(folder: RunFolder) -> Safe:
    """Confusion and calibration of a classifier, or the scores of single types of entities."""
    entities = [_entities(folder, split) for split in _tests_first(splits(folder.scores))]
    entities = [found for found in entities if found is not None]
    if entities:
        return section("Types of entities", *entities)
    title = "Predictions"
    described = folder.get(PREDICTIONS_NAME)
    if not described:
        return section(title, note(folder.why(PREDICTIONS_NAME)))
    parts = []
    for split in _tests_first(described):
        try:
            parts.append(_described(split, described[split]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            parts.append(note(f"{PREDICTIONS_NAME} cannot be read for {split!r}: {type(error).__name__}: {error}."))
    return section(title, *parts)


def _tests_first(names: Iterable[str]) -> list[str]:
    """The test split is the one that counts."""
    return sorted(names, key=lambda name: name != "test")


def _described(split: str, content: Mapping[str, Any]) -> Safe:
    labels, matrix = [str(label) for label in content["labels"]], content["confusion"]
    if len(matrix) != len(labels) or any(len(row) != len(labels) for row in matrix):
        raise ValueError(f"{len(labels)} labels need a matrix of as many rows and columns")
    name = SPLIT_NAMES.get(split, split)
    return element(
        "article",
        element("h3", f"On the {name} data, {int(content['examples']):,} examples"),
        element(
            "div",
            element("div", _confusion(name, labels, matrix), _most_confused(name, labels, matrix)),
            element("div", _reliability(name, content)),
            class_="pair" if len(labels) <= _BESIDE else None,
        ),
        _per_label(name, labels, matrix),
    )


def _confusion(name: str, labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> Safe:
    if len(labels) > _MATRIX:
        return note(f"{len(labels)} labels are too many for a matrix; below are the most frequent mistakes.")
    totals = [max(sum(row), 1) for row in matrix]
    columns = [
        element("th", str(number), scope="col", title=label, aria_label=label)
        for number, label in enumerate(labels, 1)
    ]
    head = ["true \\ predicted", *columns]
    rows = [
        [
            join([element("b", f"{i + 1} "), named(labels[i])]),
            *(_count(value, totals[i], i == j) for j, value in enumerate(row)),
        ]
        for i, row in enumerate(matrix)
    ]
    shape = "matrix" if len(labels) <= _BESIDE else "matrix dense"
    legend = note(
        "A row is a true label, a column the prediction, by the number of its label. Right ones are framed; the "
        "stronger the colour, the larger the share of the row."
    )
    return join([table(f"Confusion matrix, {name} data", head, rows, shape), legend])


def _count(value: int, total: int, right: bool) -> Cell:
    strength = f"{'h' if right else 'm'}{math.ceil(9 * value / total)}" if value else "zero"
    return Cell(f"{value:d}", f"{strength} right" if right else strength)


def _most_confused(name: str, labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> Safe | None:
    wrong = [(value, i, j) for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j and value]
    if not wrong or len(labels) < 3:
        return None
    wrong.sort(key=lambda item: (-item[0], *item[1:]))
    rows = [
        [labels[i], Cell(named(labels[j]), "words"), value, percent(value / sum(matrix[i]))]
        for value, i, j in wrong[:_CONFUSED]
    ]
    title = "Most frequent mistakes" + (f", {_CONFUSED} of {len(wrong)}" if len(wrong) > _CONFUSED else "")
    return details(title, table(f"{title}, {name} data", ["true", "taken for", "times", "of the true"], rows))


def _per_label(name: str, labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> Safe:
    rows = []
    for i, label in enumerate(labels):
        right, true, predicted = matrix[i][i], sum(matrix[i]), sum(row[i] for row in matrix)
        scores = (_ratio(right, predicted), _ratio(right, true), _ratio(2 * right, true + predicted))
        rows.append([label, true, predicted, *scores])
    head = ["label", "examples", "predicted", "precision", "recall", "F1"]
    return details("Scores of each label", table(f"Scores of each label, {name} data", head, rows))


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "–"


def _reliability(name: str, content: Mapping[str, Any]) -> Safe:
    bins, ece = content["bins"], as_number(content["ece"])
    used = [b for b in bins if b["count"]]
    right = sum(b["count"] * b["accuracy"] for b in used) / sum(b["count"] for b in used)
    sure = sum(b["count"] * b["confidence"] for b in used) / sum(b["count"] for b in used)
    leaning = "more sure than right" if sure > right else "less sure than right"
    words = f"Mean confidence {sure:.3f}, accuracy {right:.3f}: {leaning}. Calibration error (ECE) {shown(ece, 3)}."
    diagram = reliability_diagram(bins, f"Reliability diagram, {name} data. {words} The table below has all bins.")
    caption = element("figcaption", element("b", "Reliability"), " ", words)
    legend = note(
        "Bars: accuracy of the predictions of that confidence; dots: their mean confidence; dashed: a calibrated "
        "model, on which the dots would lie. Below: how many predictions."
    )
    rows = [
        [f"{b['low']:.2f} to {b['high']:.2f}", b["count"], shown(b["confidence"], 3), shown(b["accuracy"], 3)]
        for b in used
    ]
    bins_table = table(f"Reliability, {name} data", ["confidence", "examples", "mean confidence", "accuracy"], rows)
    return join([element("figure", caption, diagram, class_="single"), legend, details("Bins", bins_table)])


def _entities(folder: RunFolder, split: str) -> Safe | None:
    metrics = folder.scores
    types = entity_types(metrics, split)
    if not types:
        return None
    plain = folder.compared[0] if folder.compared is not None else {}
    rows = [_entity_row(kind, f"{split}_{kind}_", metrics, plain) for kind in types]
    rows.append(_entity_row("all", f"{split}_", metrics, plain))
    head = ["type", "precision", "recall", "F1"]
    if plain:
        head += ["F1 plain", "difference"]
    name = f"On the {SPLIT_NAMES.get(split, split)} data"
    return join([element("h3", name), table(f"Types of entities: {name}", head, rows, "total")])


def _entity_row(kind: str, start: str, metrics: Mapping[str, Any], plain: Mapping[str, Any]) -> list[object]:
    row: list[object] = [kind, *(shown(metrics.get(f"{start}{name}"), 3) for name in ("precision", "recall", "f1"))]
    if plain:
        (pair,) = pairs({"f1": plain.get(f"{start}f1")}, {"f1": metrics.get(f"{start}f1")})
        row += [_value(pair.first, 3), _difference(pair)]
    return row

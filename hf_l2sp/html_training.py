"""Sections of the HTML report on the training: its course, and how far each layer moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .charts import Series, bar, line_chart, thinned
from .markup import Cell, Safe, details, element, join, note, section, table
from .report import DriftReport
from .run_folder import REPORT_NAME, TRAINER_STATE_NAME, RunFolder, as_number

_ROWS = 60  # of the table beside the curves
_COLUMNS = {
    "task_loss": "task loss",
    "loss": "loss",
    "l2sp_penalty": "penalty",
    "l2sp_drift": "drift",
    "l2sp_lambda": "λ",
    "distill_loss": "distillation loss",
    "learning_rate": "learning rate",
}


def shown(value: Any, digits: int = 4) -> str:
    """A score or loss as text."""
    number = as_number(value)
    return f"{number:.{digits}f}" if math.isfinite(number) else "not finite"


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f} %" if math.isfinite(value) else "not finite"


def course_section(folder: RunFolder) -> Safe:
    """Loss, penalty, λ and drift over the optimizer steps."""
    title = "Training over time"
    logs = [e for e in folder.history if "loss" in e or "task_loss" in e]
    if not logs:
        if TRAINER_STATE_NAME in folder.contents:
            return section(title, note(f"{TRAINER_STATE_NAME} has no training log: logging_steps was never reached."))
        return section(title, note(folder.why(TRAINER_STATE_NAME)))
    anchored = any("task_loss" in e for e in logs)
    task = Series("task loss" if anchored else "training loss", _points(logs, "task_loss" if anchored else "loss"))
    evaluated = _points(folder.history, "eval_loss")
    losses = [task, Series("validation loss", evaluated, marked=True)] if evaluated else [task]
    charts = [line_chart(" and ".join(s.name for s in losses).capitalize(), losses)]
    for key, name, in_percent in (
        ("l2sp_penalty", "L2-SP penalty (λ included)", False),
        ("l2sp_lambda", "λ", False),
        ("l2sp_drift", "Drift ‖θ − θ0‖ / ‖θ0‖", True),
        ("distill_loss", "Distillation loss", False),
    ):
        points = _points(logs, key)
        if points:
            charts.append(line_chart(name, [Series(name, points)], percent=in_percent))
    remarks = [_gaps(logs, key, name) for key, name in _COLUMNS.items() if key != "loss" or not anchored]
    if not anchored:
        remarks.append("No penalty, λ and drift in the log: plain fine-tuning, or λ = 0.")
    if folder.state_file.parent != folder.path and TRAINER_STATE_NAME in folder.contents:
        remarks.append(f"From {folder.state_file.parent.name}, the last checkpoint: the run was not saved at its end.")
    drawn = element("div", *charts, class_="charts")
    return section(title, drawn, *(note(remark) for remark in remarks if remark), _log_table(logs))


def _points(entries: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return sorted(((as_number(e["step"]), as_number(e[key])) for e in entries if key in e), key=lambda point: point[0])


def _gaps(logs: Sequence[dict[str, Any]], key: str, name: str) -> str | None:
    points = _points(logs, key)
    steps = [x for x, y in points if not math.isfinite(y)]
    if not steps:
        return None
    listed = ", ".join(f"{x:g}" for x in steps[:5]) + (", ..." if len(steps) > 5 else "")
    found = f"{len(steps)} of {len(points)} logs (step {listed})"
    return f"The {name} is NaN or infinite in {found}: training diverged there."


def _log_table(logs: Sequence[dict[str, Any]]) -> Safe:
    columns = [key for key in _COLUMNS if any(key in e for e in logs)]
    kept = {x for x, _ in thinned([(float(i), 0.0) for i in range(len(logs))], 2 * _ROWS)} | {len(logs) - 1.0}
    chosen = [e for index, e in enumerate(logs) if index in kept]
    rows = [[f"{as_number(e['step']):g}", *(_logged(e.get(key)) for key in columns)] for e in chosen]
    rest = "" if len(chosen) == len(logs) else f", {len(chosen)} of {len(logs)}"
    head = ["step", *(_COLUMNS[key] for key in columns)]
    return details(f"Numbers{rest}", table(f"Training log{rest}", head, rows))


def _logged(value: Any) -> str:
    number = as_number(value)
    return f"{number:.4g}" if math.isfinite(number) else ("not finite" if value is not None else "–")


def drift_section(folder: RunFolder) -> Safe:
    """Relative drift per layer, and of attention, MLP and the rest in each."""
    title = "Drift from the pretrained weights, by layer"
    report = folder.report
    if report is None:
        return section(title, note(folder.why(REPORT_NAME)))
    known = [layer.drift for layer in report.layers.values() if math.isfinite(layer.drift)]
    most = max([*known, 1e-12])
    rows = [
        [
            name,
            Cell(join([element("span", percent(layer.drift)), bar(layer.drift / most)]), "wide"),
            f"{layer.distance:.4g}" if math.isfinite(layer.distance) else "not finite",
            f"{layer.parameters:,}",
        ]
        for name, layer in [*report.layers.items(), ("all", report.total)]
    ]
    columns = ["layer", element("th", "drift", scope="col", class_="words"), "distance", "numbers"]
    intro = note("Drift is ‖θ − θ0‖ / ‖θ0‖, from the input to the output; distance is ‖θ − θ0‖.")
    shape = table("Drift by layer", columns, rows, "bars total")
    return section(title, intro, shape, _parts(report))


def _parts(report: DriftReport) -> Safe | None:
    present = {part for values in report.parts.values() for part in values}
    columns = [part for part in ("embeddings", "attention", "MLP", "norm", "other") if part in present]
    if len(columns) < 2:
        return None
    most = max([*(v for values in report.parts.values() for v in values.values() if math.isfinite(v)), 1e-12])
    rows = [[name, *(_part_cell(values.get(part), most) for part in columns)] for name, values in report.parts.items()]
    return join([element("h3", "By part"), table("Drift by part of each layer", ["layer", *columns], rows, "heat")])


def _part_cell(value: float | None, most: float) -> Cell:
    if value is None:
        return Cell("–", "none", "none")
    return Cell(percent(value), f"h{round(9 * value / most)}" if math.isfinite(value) else None)

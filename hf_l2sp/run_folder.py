"""The files of an output folder that a report is made from; what is missing or damaged, and why."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from .checkpoints import checkpoints_in
from .report import DriftReport
from .run_record import PREDICTIONS_NAME, RUN_NAME
from .score_table import score_names
from .state import STATE_NAME

TRAINER_STATE_NAME = "trainer_state.json"
REPORT_NAME = "l2sp_report.json"
RESULTS_NAME = "all_results.json"
COMPARISON_NAME = "comparison.json"

# What a file is for, and when it is there.
FILES = {
    RESULTS_NAME: "The recipes write the scores into it at the end of a run.",
    TRAINER_STATE_NAME: "Trainer writes its logs into it with save_state() and into every checkpoint.",
    REPORT_NAME: "A run with l2sp_lambda > 0 writes it at its end; for any two checkpoints there is "
    "hf-l2sp drift MODEL ANCHOR.",
    STATE_NAME: "A run with l2sp_lambda > 0 writes it beside every saved model.",
    COMPARISON_NAME: "The recipes write it with --compare, which trains plain Trainer on the same data and seed, too.",
    PREDICTIONS_NAME: "The text classification recipes write it: how often each label was taken for each other.",
    RUN_NAME: "The recipes write command and versions into it.",
}


def as_number(value: Any) -> float:
    """The number, or NaN for what is none; JSON has `null` where a value was not finite."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


class RunFolder:
    """An output folder, read once.

    Attributes:
        path: The folder.
        contents: Of the files that could be read, by name.
        problems: Of those that are there and could not: the cause.

    Raises:
        ValueError: It is no folder, or none of the files is in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{str(path)!r} is no folder: name the output_dir of a run.")
        self.contents: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}
        # Where the trained model was not saved with its state, the last checkpoint knows as much.
        self.state_file = self._state_file()
        for name in FILES:
            self._read(name, self.state_file if name == TRAINER_STATE_NAME else self.path / name)
        if not self.contents and not self.problems:
            raise ValueError(
                f"{str(path)!r} has none of {', '.join(FILES)}: name the output_dir of a run of Trainer or a recipe."
            )

    def _state_file(self) -> Path:
        folders = [self.path, *map(Path, checkpoints_in(self.path))]
        return next((p for f in folders if (p := f / TRAINER_STATE_NAME).is_file()), self.path / TRAINER_STATE_NAME)

    def _read(self, name: str, path: Path) -> None:
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not an object")
            self.contents[name] = content
        except (OSError, ValueError, RecursionError) as error:
            self.problems[name] = f"{name} cannot be read: {error}."

    def get(self, name: str) -> dict[str, Any]:
        """Content of a file; empty where it is not there."""
        return self.contents.get(name, {})

    def why(self, name: str) -> str:
        """Why a file's content is not there."""
        return self.problems.get(name) or f"There is no {name}. {FILES[name]}"

    @cached_property
    def report(self) -> DriftReport | None:
        """The drift report; a damaged one is told among the problems."""
        if REPORT_NAME not in self.contents:
            return None
        try:
            return DriftReport.from_dict(self.contents[REPORT_NAME])
        except ValueError as error:
            self.problems[REPORT_NAME] = f"{REPORT_NAME} cannot be read: {error}."
            return None

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The entries of the log that have a step; of the drift report where Trainer's log is missing."""
        entries = self.get(TRAINER_STATE_NAME).get("log_history")
        if not isinstance(entries, list):
            entries = self.report.history if self.report is not None else []
        return [e for e in entries if isinstance(e, dict) and math.isfinite(as_number(e.get("step")))]

    @cached_property
    def scores(self) -> dict[str, Any]:
        """`all_results.json`, or what the comparison has of it, or the last evaluation that the log knows."""
        if RESULTS_NAME in self.contents:
            return self.contents[RESULTS_NAME]
        if self.compared is not None:
            return self.compared[1]
        evaluations = [e for e in self.history if any(name.startswith("eval_") for name in e)]
        return evaluations[-1] if evaluations else {}

    @cached_property
    def compared(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Scores of plain fine-tuning and of this run; None where they were not compared."""
        content = self.get(COMPARISON_NAME)
        plain, l2sp = content.get("plain"), content.get("l2sp")
        if not isinstance(plain, dict) or not isinstance(l2sp, dict):
            if content:
                self.problems[COMPARISON_NAME] = f"{COMPARISON_NAME} cannot be read: it has no plain and l2sp scores."
            return None
        return plain, l2sp

    @property
    def config(self) -> dict[str, Any]:
        """The training arguments that the comparison has on record."""
        config = self.get(COMPARISON_NAME).get("config")
        return config if isinstance(config, dict) else {}

    @property
    def strength(self) -> float | None:
        """λ, as far as a file knows it; 0 where the run's own settings say so."""
        recorded = self.get(STATE_NAME).get("strength")
        known = (
            self.report.settings.get("lambda") if self.report is not None else None,
            recorded.get("base") if isinstance(recorded, dict) else None,
            self.config.get("l2sp_lambda"),
        )
        return next((as_number(value) for value in known if math.isfinite(as_number(value))), None)

    @property
    def has_scores(self) -> bool:
        """Whether the run was ever evaluated."""
        return bool(score_names(self.scores))

"""The regularisation path: scores and drift by strength λ, kept in a file as they come, a table and a picture."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from _recipe_args import RecipeError
from _recipe_files import listed
from _recipe_output import write_json

from hf_l2sp.score_table import direction

PATH_NAME, PICTURE_NAME = "lambda_search.json", "lambda_search.png"
_SHOWN = ("f1_macro", "loss", "ece")
_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9722e", "#8a8f98"
_LINES = ("-", "--", ":", "-.")


class Point(NamedTuple):
    """One training of the path. `auto` finds λ by itself: there it is the value to start from."""

    schedule: str
    strength: float

    @property
    def name(self) -> str:
        """As the table calls it."""
        if self.schedule == "auto":
            return "auto"
        return f"{self.strength:g}" + ("" if self.schedule == "constant" else f" {self.schedule}")


@dataclass
class RegularisationPath:
    """The finished trainings.

    Attributes:
        file: Where they are kept.
        about: What all of them have in common.
        scores: By point.
        drifts: Relative drift by point; None where it is not known.
        found: λ at the end of a training that has chosen it by itself, by point.
    """

    file: Path
    about: dict[str, Any]
    scores: dict[Point, dict[str, Any]] = field(default_factory=dict)
    drifts: dict[Point, float | None] = field(default_factory=dict)
    found: dict[Point, float] = field(default_factory=dict)

    @classmethod
    def resumed(cls, file: Path, about: dict[str, Any]) -> RegularisationPath:
        """The trainings that an earlier run has finished.

        Raises:
            RecipeError: The file is damaged, or they had other settings or data than these.
        """
        path = cls(file, about)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            before = content["about"]
            for run in content["runs"]:
                scores = {name: math.nan if value is None else value for name, value in run["scores"].items()}
                point = Point(str(run["schedule"]), float(run["lambda"]))
                path.add(point, scores, run["drift"], run.get("found_lambda"))
            names = sorted({*before, *about} - {"config"})
            there, here = ({**each.get("config", {}), **{n: each.get(n) for n in names}} for each in (before, about))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"--resume_from_checkpoint: {str(file)!r} cannot be read ({error!r}); start anew with "
                "--overwrite_output_dir."
            ) from error
        here = json.loads(json.dumps(here))
        other = [name for name in here if here[name] != there.get(name) and name != "versions"]
        if other:
            told = listed(f"{name} {there.get(name)!r} there, {here[name]!r} now" for name in other)
            raise RecipeError(
                f"--resume_from_checkpoint: the trainings in {str(file)!r} are not comparable: {told}. Give the same "
                "arguments and data, another --output_dir, or start anew with --overwrite_output_dir."
            )
        return path

    def add(self, point: Point, scores: dict[str, Any], drift: float | None, found: float | None = None) -> None:
        """Takes a finished training up; `found` is the λ that it has chosen by itself."""
        self.scores[point], self.drifts[point] = scores, drift
        if found is not None:
            self.found[point] = float(found)

    def save(self, best: Point | None = None, metric: str | None = None) -> None:
        """Writes the file, whole or not at all."""
        runs = [
            {"lambda": p.strength, "schedule": p.schedule, "drift": self.drifts[p], "scores": self.scores[p]}
            | ({"found_lambda": self.found[p]} if p in self.found else {})
            for p in self.ordered()
        ]
        content: dict[str, Any] = {"about": self.about, "runs": runs}
        if best is not None:
            content["best"] = {"lambda": best.strength, "schedule": best.schedule, "metric": metric}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        write_json(temporary, content)
        os.replace(temporary, self.file)

    def ordered(self) -> list[Point]:
        """By schedule, then λ."""
        schedules = list(dict.fromkeys(point.schedule for point in self.scores))
        return sorted(self.scores, key=lambda point: (schedules.index(point.schedule), point.strength))

    def best(self, metric: str, greater: bool | None = None) -> Point:
        """The point with the best score; the strongest of equally good ones.

        Args:
            metric: Name of the score.
            greater: Whether more of it is better; None: as its name says.

        Raises:
            RecipeError: It is no score, or NaN everywhere.
        """
        names = set().union(*self.scores.values())
        if metric not in names:
            raise RecipeError(
                f"--metric_for_best_model: there is no {metric!r}; it is one of {listed(sorted(names))}."
            )
        sign = direction(metric) or 1 if greater is None else (1 if greater else -1)
        known = [
            (sign * float(scores[metric]), point.strength, point)
            for point, scores in self.scores.items()
            if not math.isnan(scores.get(metric, math.nan))
        ]
        if not known:
            raise RecipeError(f"{metric} is NaN for every λ: all trainings have diverged; lower --learning_rate.")
        return max(known)[2]

    def table(self, best: Point, metric: str) -> str:
        """Aligned text, a row for every training, with a star at the best."""
        points = self.ordered()
        names = [n for n in self.scores[best] if n == metric or n.startswith(("eval_", "test_")) and _is_shown(n)]
        names.sort(key=lambda name: not name.startswith("eval_"))
        rows = [["lambda", *names, "drift", "train_runtime"]]
        for point in points:
            scores, drift = self.scores[point], self.drifts[point]
            found = f" ({self.found[point]:.2g})" if point in self.found else ""
            row = [f"{point.name}{found}{' *' if point == best else '  '}"]
            row += [f"{scores[name]:.4f}" if name in scores else "-" for name in names]
            row += ["-" if drift is None else f"{drift:.2%}", f"{scores.get('train_runtime', math.nan):.1f} s"]
            rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def draw(self, best: Point, metric: str) -> None:
        """Draws score, loss and drift against λ, a panel each, beside the file."""
        from matplotlib.figure import Figure

        score = "eval_f1_macro" if metric.endswith("_loss") else metric
        figure = Figure(figsize=(13, 4), dpi=130, layout="constrained")
        figure.suptitle(f"{self.about['model']}, {self.about['data']}, seed {self.about['seed']}", fontsize=11)
        for axis, name in zip(figure.subplots(1, 3), (score, "eval_loss", "drift"), strict=True):
            self._draw_panel(axis, name, best)
        figure.savefig(self.file.with_name(PICTURE_NAME))

    def _draw_panel(self, axis: Any, name: str, best: Point) -> None:
        schedules = list(dict.fromkeys(point.schedule for point in self.scores))
        strengths = sorted({point.strength for point in self.scores if point.schedule != "auto"})
        places = _places(strengths)
        for schedule, line in zip(schedules, _LINES, strict=False):
            for split, color in (("", _BLUE),) if name == "drift" else (("eval", _BLUE), ("test", _ORANGE)):
                values = self._values(schedule, name.replace("eval_", f"{split}_", 1))
                label = " ".join(word for word in (split, schedule if len(schedules) > 1 else "") if word)
                if schedule == "auto":
                    for value in values.values():
                        axis.axhline(value, color=color, linestyle=line, label=label)
                        self._mark_found(axis, value, color, list(places.values()))
                elif values:
                    # Without a pull all courses are one.
                    at_0 = self._values("constant", name.replace("eval_", f"{split}_", 1)).get(0.0)
                    values = values if at_0 is None else {0.0: at_0, **values}
                    at = [places[strength] for strength in values]
                    axis.plot(at, list(values.values()), color=color, linestyle=line, marker="o", label=label)
        if best.schedule != "auto":
            axis.axvline(places[best.strength], color=_GREY, linewidth=1, linestyle=":")
        axis.set_xticks([places[s] for s in strengths], [f"{s:g}" for s in strengths])
        about = "λ (star: found by auto; " if self.found else "λ ("
        axis.set_xlabel(about + ("dotted line: chosen)" if best.schedule != "auto" else "chosen: auto)"))
        better = {1: " (higher is better)", -1: " (lower is better)"}.get(direction(name), "")
        title = {"drift": "relative drift ‖θ − θ0‖ / ‖θ0‖ in %", "eval_loss": "negative log-likelihood"}.get(
            name, name
        )
        axis.set_title(title.removeprefix("eval_") + better, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)

    def _mark_found(self, axis: Any, value: float, color: str, places: list[float]) -> None:
        """A star on the line of auto where its λ is; at the edge where that is beyond the values tried."""
        for strength in self.found.values() if places else ():
            place = min(max(math.log10(strength), min(places)), max(places))
            axis.plot(place, value, marker="*", markersize=13, color=color, zorder=3)

    def _values(self, schedule: str, name: str) -> dict[float, float]:
        """Finite values by λ; drifts in percent."""
        found = {}
        for point in self.ordered():
            drift = self.drifts[point]
            value = (None if drift is None else 100.0 * drift) if name == "drift" else self.scores[point].get(name)
            if point.schedule == schedule and value is not None and math.isfinite(value):
                found[point.strength] = float(value)
        return found


def _is_shown(name: str) -> bool:
    return name.endswith(tuple(f"_{end}" for end in _SHOWN))


def _places(strengths: list[float]) -> dict[float, float]:
    """Places on a logarithmic axis, on which 0 is a decade to the left of the rest."""
    logs = [math.log10(strength) for strength in strengths if strength > 0]
    return {s: math.log10(s) if s > 0 else min(logs, default=0.0) - 1.0 for s in strengths}

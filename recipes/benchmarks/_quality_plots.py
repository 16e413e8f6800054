"""Pictures of the quality study."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

BLUE, ORANGE, GREY = "#2f6db3", "#d9722e", "#8a8f98"
COLORS = (BLUE, ORANGE, "#3f9b5b", "#8b5fbf", "#b5484b", "#7a6a53")
TITLES = {
    "f1_macro": "macro-F1, beside plain (right: better)",
    "nll": "negative log-likelihood, beside plain (left: better)",
}


# Beyond these a point is drawn at the edge, as an arrow.
LIMITS = {"f1_macro": (-0.16, 0.1), "nll": (-1.2, 0.8)}


def draw_methods(rows: list[dict[str, Any]], path: Path) -> None:
    """What every method adds to plain fine-tuning, in the mean of the data sets, with intervals."""
    rows = [row for row in rows if row["method"] != "plain"]
    figure = Figure(figsize=(11, 0.27 * len(rows) + 1.3), dpi=130, layout="constrained")
    for axis, score in zip(figure.subplots(1, 2, sharey=True), TITLES, strict=True):
        for place, row in enumerate(reversed(rows)):
            found, color = row["all"][score], BLUE if row["method"].startswith("auto") else GREY
            axis.plot([found["low"], found["high"]], [place, place], color=color, linewidth=1.5)
            mean = min(max(found["mean"], LIMITS[score][0]), LIMITS[score][1])
            marker = "o" if mean == found["mean"] else ("<" if mean > found["mean"] else ">")
            axis.plot(mean, place, marker, color=color, markersize=5, clip_on=False)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [f"{row['method']}  ({row['draws']})" for row in reversed(rows)], fontsize=8)
        axis.set_title(TITLES[score], fontsize=10)
        axis.set_xlim(*LIMITS[score])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def draw_strengths(rows: list[dict[str, Any]], path: Path) -> None:
    """λ of auto against the number of training texts, a line per data set that was tried with several numbers."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    sets = {row["data"]: [r for r in rows if r["data"] == row["data"]] for row in rows}
    sets = {name: part for name, part in sets.items() if len(part) > 1}
    for color, (name, part) in zip(COLORS, sets.items(), strict=False):
        for row in part:
            axis.plot(row["rows"], row["lambda"], ".", color=color, alpha=0.5)
        means = [(statistics.mean(row["rows"]), statistics.mean(row["lambda"])) for row in part]
        axis.plot(*zip(*means, strict=True), "-o", color=color, label=name, markersize=5)
    axis.set_xscale("log")
    axis.set_xticks([20, 50, 100, 200, 500, 1000, 2000], ["20", "50", "100", "200", "500", "1000", "2000"])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=-0.001)
    axis.set_xlabel("labelled texts")
    axis.set_ylabel("λ of auto in the second half of training")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    figure.savefig(path)

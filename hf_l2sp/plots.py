"""The drift report's picture; needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import DriftReport

_BLUE, _ORANGE, _GREY, _GREEN = "#2f6db3", "#d9722e", "#8a8f98", "#3a8f5d"
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # numbers stay readable on the dashed line


def require_matplotlib() -> Any:
    """The class of matplotlib's figures: the object interface has no global state and needs no window system.

    Raises:
        ImportError: matplotlib is missing; names the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing the drift report needs matplotlib, which is not installed: pip install 'hf-l2sp[plots]'."
        ) from error
    return Figure


def draw_report(report: DriftReport, path: Path) -> Path:
    """Draws a drift report: bars of relative drift per layer, and the course of training where it is known.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = require_matplotlib()
    has_course = len(report.history) > 1
    rows = max(len(report.layers), 1)
    figure = figure_class(
        figsize=(13 if has_course else 7, max(4.2, 1.6 + 0.34 * rows)), dpi=150, layout="constrained"
    )
    axes = figure.subplots(1, 2 if has_course else 1, squeeze=False)[0]
    _draw_layers(axes[0], report)
    if has_course:
        _draw_course(axes[1], report)
    strength = report.settings.get("lambda")
    setting = f"  ·  λ = {strength:g}, {report.settings['schedule']}" if strength is not None else ""
    title = f"Drift from the pretrained weights: {report.total.drift:.2%} in total"
    figure.suptitle(title + (setting if has_course else setting.replace("  ·  ", "\n")), fontsize=14, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_layers(axis: Any, report: DriftReport) -> None:
    names = [_short(name) for name in report.layers]
    values = [100.0 * layer.drift for layer in report.layers.values()]
    # A layer that was 0, or a run that diverged, has no bar but still its label.
    widths = [value if math.isfinite(value) else 0.0 for value in values]
    bars = axis.barh(range(len(names)), widths, color=_BLUE, height=0.72)
    axis.bar_label(bars, [f"{value:.2f} %" for value in values], padding=4, fontsize=9, color="#333333", bbox=_CLEAR)
    if math.isfinite(report.total.drift):
        axis.axvline(100.0 * report.total.drift, color=_GREY, linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(names)), names, fontsize=10)
    axis.invert_yaxis()  # the input at the top, as one reads
    axis.set_xlim(0, 1.18 * max([*widths, 1e-9]))
    axis.set_xlabel("relative drift  ‖θ − θ0‖ / ‖θ0‖  in %   (dashed: total)")
    axis.set_title("by layer, from the input to the output", fontsize=11)
    _plain(axis)


def _draw_course(axis: Any, report: DriftReport) -> None:
    steps = [entry["step"] for entry in report.history]
    axis.plot(steps, [e["task_loss"] for e in report.history], color=_BLUE, linewidth=2, label="task loss")
    if report.settings.get("mode") != "decoupled":  # where it is no part of the loss and often far larger
        penalties = [e["l2sp_penalty"] for e in report.history]
        axis.plot(steps, penalties, color=_ORANGE, linewidth=2, label="L2-SP penalty")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    right = axis.twinx()
    right.plot(
        steps,
        [e["l2sp_lambda"] for e in report.history],
        color=_GREEN,
        linewidth=1.4,
        linestyle=":",
        label="λ (right)",
    )
    right.set_ylim(bottom=0)
    right.set_ylabel("λ", color=_GREEN)
    right.tick_params(axis="y", colors=_GREEN)
    right.spines[["top", "left"]].set_visible(False)
    lines = [*axis.get_lines(), *right.get_lines()]
    # Above the panel, where no curve runs through it.
    names = [line.get_label() for line in lines]
    axis.legend(lines, names, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, fontsize=10)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def _short(name: str, width: int = 34) -> str:
    return name if len(name) <= width else "…" + name[-(width - 1) :]

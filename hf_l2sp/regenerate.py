"""Makes the reports of a finished run again, from the files of its output folder."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from .checkpoint_drift import Checkpoint, checkpoint_drift
from .html_report import write_html_report
from .report import HISTORY_KEYS, DriftReport
from .run_folder import REPORT_NAME, RunFolder, as_number
from .state import STATE_NAME, entry_names, read_state

PICTURE_NAME = "l2sp_report.png"


def regenerate(output_dir: str | os.PathLike[str]) -> tuple[list[Path], list[str]]:
    """Writes `l2sp_report.html` and `l2sp_report.png` anew, and `l2sp_report.json` where it is missing.

    The drift of a run whose `l2sp_report.json` is gone is measured again: `l2sp_state.json` says what θ0 was.

    Args:
        output_dir: The run's output folder.

    Returns:
        The files that were written, and what could not be and why.

    Raises:
        ValueError: There is no such folder, or none of a run's files is in it.
        OSError: A file cannot be written.
    """
    folder = RunFolder(Path(output_dir))
    written: list[Path] = []
    remarks: list[str] = []
    report = folder.report
    if report is None and REPORT_NAME in folder.problems:
        remarks.append(f"{folder.problems[REPORT_NAME]} Delete it to have the drift measured again.")
    elif report is None and STATE_NAME in folder.contents:
        try:
            report = measured_again(folder)
            written.append(report.save(folder.path / REPORT_NAME))
        except ValueError as error:
            remarks.append(f"{REPORT_NAME} is not made: {error}")
    elif report is None:
        remarks.append(folder.why(REPORT_NAME))
    if report is not None:
        try:
            written.append(report.plot(folder.path / PICTURE_NAME))
        except ImportError as error:
            remarks.append(f"{PICTURE_NAME} is not made: {error}")
    return [*written, write_html_report(folder.path)], remarks


def measured_again(folder: RunFolder) -> DriftReport:
    """The drift report from the weights in the folder and θ0, which its `l2sp_state.json` names.

    Raises:
        ValueError: Weights or θ0 cannot be had, or θ0 is another one now.
    """
    state: dict[str, Any] = read_state(folder.path) or {}
    anchor = state["anchor"]
    if anchor["source"] is None:
        raise ValueError(f"{STATE_NAME} does not say where θ0 can be had; hf-l2sp drift takes it by name.")
    found = checkpoint_drift(
        Checkpoint(str(folder.path)), Checkpoint(anchor["source"], anchor["revision"]), only=set(entry_names(state))
    )
    for name, entry in anchor["entries"].items():
        if name not in found.tensors:
            raise ValueError(f"the weights in {str(folder.path)!r} or those of θ0 lack {name}, which is on record.")
        recorded, norm_squared = as_number(entry["sum_of_squares"]), found.tensors[name].norm_squared
        if not math.isclose(recorded, norm_squared, rel_tol=1e-3):
            raise ValueError(
                f"{anchor['source']!r} is another model now: ‖θ0‖² of {name} is {norm_squared:.6g}, {recorded:.6g} on "
                "record."
            )
    report = found.report
    strength = state.get("strength", {})
    report.anchor = {key: anchor[key] for key in ("source", "revision", "fingerprint")}
    # λ as it was set, or as `auto` has found it.
    found = strength.get("current") if "auto" in strength else strength.get("base")
    report.settings = {"lambda": found, "schedule": strength.get("schedule")}
    report.settings |= {name: state.get(name) for name in ("mode", "beta", "exclude")}
    if isinstance(state.get("interpolation"), dict):
        report.settings["alpha"] = state["interpolation"].get("alpha")
    report.history = [{k: as_number(e.get(k)) for k in HISTORY_KEYS} for e in folder.history if "task_loss" in e]
    return report

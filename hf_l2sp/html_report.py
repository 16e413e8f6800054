"""`l2sp_report.html`: all about a run on one page, made from the files of its output folder and nothing else.

The page needs no network, no script and no other file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from .html_scores import SPLIT_NAMES, predictions_section, scores_section
from .html_training import course_section, drift_section, percent, shown
from .markup import Safe, element, join, note, section, table
from .plan import ROLES
from .run_folder import COMPARISON_NAME, FILES, REPORT_NAME, TRAINER_STATE_NAME, RunFolder, as_number
from .run_record import RUN_NAME
from .score_table import direction, pairs, splits

__all__ = ["write_html_report"]

HTML_NAME = "l2sp_report.html"
PAPER = "https://arxiv.org/abs/1802.01483"

# The first of these that a run has lead the page.
_HEADLINES = ("f1_macro", "f1", "accuracy", "perplexity", "loss", "ece")
_CARDS = 4


def write_html_report(output_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of a finished run; an earlier one is replaced.

    A file that is missing or damaged costs its section, which says so; nothing else.

    Args:
        output_dir: The run's output folder.
        path: Where to write; None: `l2sp_report.html` in that folder.

    Raises:
        ValueError: There is no such folder, or none of a run's files is in it.
        OSError: The file cannot be written.
    """
    target = Path(output_dir) / HTML_NAME if path is None else Path(path)
    content = html_report(RunFolder(Path(output_dir)))
    target.write_text(content, encoding="utf-8", errors="replace")  # half of a surrogate pair in a label is no text
    return target


def html_report(folder: RunFolder) -> str:
    """The page."""
    sections = [
        _headline(folder),
        scores_section(folder),
        course_section(folder),
        drift_section(folder),
        predictions_section(folder),
        _settings_section(folder),
        _command_section(folder),
    ]
    template = Template((files(__package__) / "report.html").read_text(encoding="utf-8"))
    title = element("title", f"{folder.path.absolute().name} - L2-SP report")
    # The foot comes last: that a file is damaged may show only while the sections are made.
    return template.substitute(title=title, body=join([*sections, _foot(folder)]))


# --------------------------------------------------------------------------- headline


def _headline(folder: RunFolder) -> Safe:
    about = folder.get(COMPARISON_NAME)
    words = [f"{about[key]}" for key in ("model",) if about.get(key)]
    if about.get("data"):
        words.append(f"data: {about['data']}")
    if folder.strength is not None:
        words.append(f"λ = {folder.strength:g}" if folder.strength > 0 else "λ = 0, plain fine-tuning")
    steps = folder.get(TRAINER_STATE_NAME).get("global_step")
    if isinstance(steps, int):
        words.append(f"{steps:,} steps")
    return element(
        "header",
        element("h1", element("bdi", folder.path.absolute().name)),
        element("p", "L2-SP report", *(part for word in words for part in (" · ", element("bdi", word)))),
        element("dl", *_cards(folder), class_="cards"),
    )


def _cards(folder: RunFolder) -> Iterator[Safe]:
    found = splits(folder.scores)
    split = "test" if "test" in found else next(iter(found), None)
    names = [f"{split}_{name}" for name in _HEADLINES if f"{split}_{name}" in folder.scores] if split else []
    plain = folder.compared[0] if folder.compared is not None else {}
    for name in names[:_CARDS]:
        label = f"{SPLIT_NAMES.get(str(split), split)} {name[len(str(split)) + 1 :]}"
        yield _card(label, shown(folder.scores[name], 3), _beside_plain(name, plain, folder.scores))
    if folder.report is not None:
        yield _card("drift ‖θ − θ0‖ / ‖θ0‖", percent(folder.report.total.drift), "of the anchored weights")
    seconds = as_number(folder.scores.get("train_runtime"))
    if math.isfinite(seconds):
        minutes = f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
        yield _card("training time", minutes, None)


def _card(label: str, value: str, remark: str | None) -> Safe:
    small = element("dd", remark, class_="remark") if remark else None
    return element("div", element("dt", label), element("dd", value, class_="value"), small)


def _beside_plain(name: str, plain: dict[str, Any], scores: dict[str, Any]) -> str | None:
    better = {1: "higher is better", -1: "lower is better", 0: ""}[direction(name)]
    (pair,) = pairs({name: plain.get(name)}, {name: scores.get(name)})
    if pair.difference is None or not math.isfinite(pair.difference):
        return better
    if pair.difference == 0:
        return "same as plain"
    return f"{pair.difference:+.3f} against plain" + (f", {pair.verdict}" if pair.verdict else "")


# --------------------------------------------------------------------------- settings, command, files


def _settings_section(folder: RunFolder) -> Safe:
    title = "Settings"
    rows: list[list[object]] = []
    report, about = folder.report, folder.get(COMPARISON_NAME)
    if report is not None:
        rows += [[f"l2sp_{name}", _setting(value)] for name, value in report.settings.items()]
        source, revision = report.anchor.get("source"), report.anchor.get("revision")
        rows.append(["anchor θ0", _source(source) + (f" at {revision}" if revision else "")])
        rows.append(["fingerprint of θ0", element("code", str(report.anchor.get("fingerprint") or "unknown"))])
        rows += [[f"{role} numbers", f"{report.counts[role]:,}"] for role in ROLES if role in report.counts]
    config = folder.config
    told = {key: value for key, value in about.items() if key not in ("plain", "l2sp", "difference", "config")}
    known = {row[0] for row in rows}
    rows += [[k, _setting(v)] for k, v in {**told, **config}.items() if k != "versions" and k not in known]
    for key in ("num_train_epochs", "max_steps", "train_batch_size"):
        if key in folder.get(TRAINER_STATE_NAME) and key not in {row[0] for row in rows}:
            rows.append([key, _setting(folder.get(TRAINER_STATE_NAME)[key])])
    if not rows:
        return section(title, *(note(folder.why(name)) for name in (REPORT_NAME, COMPARISON_NAME)))
    return section(title, table("Settings of the run", ["setting", "value"], rows, "facts"))


def _setting(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _source(source: Any) -> str:
    """The anchor's Hub id, or the end of a path: where a folder lies on this machine is nobody else's business."""
    if not source:
        return "the weights that the trainer was given"
    path = Path(str(source))
    return f"local folder {'/'.join(path.parts[-2:])}" if path.is_absolute() else str(source)


def _command_section(folder: RunFolder) -> Safe:
    title = "Command and versions"
    run = folder.get(RUN_NAME)
    versions: Any = run.get("versions")
    remark = None
    if not run:
        remark = note(folder.why(RUN_NAME))
        versions = folder.config.get("versions")
    command = element("pre", element("code", str(run["command"])), tabindex="0") if run.get("command") else None
    facts = [[key, str(run[key])] for key in ("processes", "device", "platform", "written") if key in run]
    if isinstance(versions, dict):
        facts += [[name, str(value)] for name, value in versions.items()]
    shape = table("Versions and machine", ["what", "value"], facts, "facts") if facts else None
    return section(title, command, shape, remark)


def _foot(folder: RunFolder) -> Safe:
    from . import __version__

    read = ", ".join(name for name in FILES if name in folder.contents)
    missing = ", ".join(name for name in FILES if name not in folder.contents)
    problems = [note(problem) for problem in folder.problems.values()]
    paper = element("a", "Li, Grandvalet, Davoine 2018", href=PAPER)
    made = element("p", f"Made by hf_l2sp {__version__} from {read or 'no readable file'}. Method: ", paper, ".")
    return element("footer", *problems, made, note(f"Not there: {missing}.") if missing else None)

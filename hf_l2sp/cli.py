"""The command `hf-l2sp`: reports of finished runs, two runs side by side, drift between any two checkpoints."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging

from . import __version__
from .checkpoint_drift import Checkpoint, CheckpointDrift, checkpoint_drift
from .html_report import write_html_report
from .plots import require_matplotlib
from .regenerate import regenerate
from .report import LayerDrift, for_json
from .run_folder import RunFolder
from .score_table import pairs, score_names

_PICTURES = (".png", ".svg", ".pdf")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage; exit code 2."""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the arguments)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    # No abbreviations: what is not an argument is a typing error.
    parser = _Parser(prog="hf-l2sp", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hf-l2sp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    report = commands.add_parser(
        "report",
        help="make the reports of a finished run again",
        description="Makes l2sp_report.html and l2sp_report.png of a finished run again from the files of its output "
        "folder. Where l2sp_report.json is missing, the drift is measured again from the weights and θ0.",
        allow_abbrev=False,
    )
    report.add_argument("output_dir", metavar="OUTPUT_DIR", help="output folder of a run of a recipe or of Trainer")
    _add_output(report, "write the HTML alone, to FILE")
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare",
        help="put the scores of two runs side by side",
        description="Prints the scores of two runs with B minus A, whether B is better, and the drift of both.",
        allow_abbrev=False,
    )
    for name in ("A", "B"):
        help_text = "output folder of a run, or an all_results.json"
        compare.add_argument(name.lower(), metavar=f"DIR_{name}", help=help_text)
    _add_json(compare)
    _add_output(compare, "write to FILE instead of printing")
    compare.set_defaults(run=_compare)

    drift = commands.add_parser(
        "drift",
        help="measure how far a checkpoint is from another one",
        description="Prints ‖θ − θ0‖ and ‖θ − θ0‖ / ‖θ0‖ in total and per layer, for any two checkpoints with "
        "safetensors weights. Tensors are compared by name, one at a time; the models' classes need not be known.",
        allow_abbrev=False,
    )
    what = "folder, .safetensors file or Hub id of the"
    drift.add_argument("model", metavar="MODEL", help=f"{what} fine-tuned model")
    drift.add_argument("anchor", metavar="ANCHOR", help=f"{what} model that it began as")
    drift.add_argument("--revision", help="Hub revision of MODEL")
    drift.add_argument("--anchor-revision", help="Hub revision of ANCHOR")
    drift.add_argument("--plot", metavar="FILE.png", help="also draw it (needs matplotlib)")
    _add_json(drift)
    _add_output(drift, "write to FILE instead of printing")
    drift.set_defaults(run=_drift)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def _add_output(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--output", metavar="FILE", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code: 0, or 1 for what went wrong (2, from argparse, for a wrong command line)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has no θ
    args = make_parser().parse_args(argv)
    logging.disable_progress_bar()
    try:
        for path in (args.output, getattr(args, "plot", None)):
            if path is not None:
                _require_writable(Path(path), args.force)
        text = args.run(args)
        if args.command != "report" and args.output is not None:
            Path(args.output).write_text(text, encoding="utf-8")
            text = f"Written: {args.output}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough (| head); nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"hf-l2sp {args.command}: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _require_writable(path: Path, force: bool) -> None:
    """Before anything is measured."""
    if path.is_dir() or not path.parent.is_dir():
        cause = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {str(path.parent)!r}"
        raise ValueError(f"{str(path)!r} {cause}. Name a file in a folder that exists.")
    if path.exists() and not force:
        raise ValueError(f"{str(path)!r} exists. Name another file, or add --force to replace it.")


# --------------------------------------------------------------------------- commands


def _report(args: argparse.Namespace) -> str:
    if args.output is not None:
        return f"Written: {write_html_report(args.output_dir, args.output)}\n"
    written, remarks = regenerate(args.output_dir)
    return "".join([*(f"Written: {path}\n" for path in written), *(f"Note: {remark}\n" for remark in remarks)])


def _compare(args: argparse.Namespace) -> str:
    first, second = _Run(args.a), _Run(args.b)
    rows = pairs(first.scores, second.scores)
    if args.json:
        scores = {
            p.name: {"a": p.first, "b": p.second, "difference": p.difference, "b_is": p.verdict or None} for p in rows
        }
        runs = {key: {"path": run.path, **run.facts} for key, run in (("a", first), ("b", second))}
        return _as_json({**runs, "scores": scores})
    cells = [
        [p.name, _number(p.first), _number(p.second), _number(p.difference, signed=True), p.verdict] for p in rows
    ]
    for name in ("drift", "lambda"):
        if name in first.facts or name in second.facts:
            values = [run.facts.get(name) for run in (first, second)]
            cells.append([name, *("-" if v is None else f"{v:.4g}" for v in values), "", ""])
    return f"A  {first.path}\nB  {second.path}\n\n{_table([['', 'A', 'B', 'B - A', 'B is'], *cells])}\n"


class _Run:
    """Scores of a run, and drift and λ as far as its folder knows them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.facts: dict[str, float] = {}
        if Path(path).is_file():
            self.scores = _scores_of_file(path)
        else:
            folder = RunFolder(path)
            self.scores = folder.scores
            if folder.report is not None:
                self.facts["drift"] = folder.report.total.drift
            if folder.strength is not None:
                self.facts["lambda"] = folder.strength
        if not score_names(self.scores):
            raise ValueError(f"{path!r} has no scores: name the folder of a run that was evaluated.")


def _scores_of_file(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path!r} is no JSON ({error}): name an output folder or its all_results.json.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds no scores by name: name an output folder or its all_results.json.")
    return content


def _drift(args: argparse.Namespace) -> str:
    if args.plot is not None:
        if Path(args.plot).suffix.lower() not in _PICTURES:
            raise ValueError(f"--plot {args.plot!r}: name a file that ends in {', '.join(_PICTURES)}.")
        require_matplotlib()
    found = checkpoint_drift(Checkpoint(args.model, args.revision), Checkpoint(args.anchor, args.anchor_revision))
    if args.plot is not None:
        found.report.plot(args.plot)
    if args.json:
        return _as_json({"model": {"source": args.model, "revision": args.revision}, **found.to_dict()})
    return _drift_text(args, found)


def _drift_text(args: argparse.Namespace, found: CheckpointDrift) -> str:
    layers = [_layer_row(name, layer) for name, layer in found.report.layers.items()]
    lines = [
        f"MODEL   {args.model}",
        f"ANCHOR  {args.anchor}",
        "",
        _table([["layer", "numbers", "distance", "drift"], *layers, _layer_row("all", found.report.total)]),
    ]
    aside = {
        "only in MODEL": found.only_in_model,
        "only in ANCHOR": found.only_in_anchor,
        "of another shape, not compared": found.other_shape,
        "compared in the rows that both have": [f"{name} ({rows:,})" for name, rows in found.rows.items()],
    }
    notes = [f"{what}: {_listed(names)}" for what, names in aside.items() if names]
    if args.plot is not None:
        notes.append(f"Written: {args.plot}")
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _layer_row(name: str, layer: LayerDrift) -> list[str]:
    return [name, f"{layer.parameters:,}", f"{layer.distance:.6g}", f"{100 * layer.drift:.4g} %"]


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(for_json(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, the head underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])

"""The output folder of a recipe, its result table and its comparison with plain fine-tuning."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _recipe_args import RecipeError
from _recipe_files import listed
from _recipe_launch import say

from hf_l2sp.checkpoints import checkpoints_in, last_complete, why_incomplete
from hf_l2sp.html_report import write_html_report
from hf_l2sp.run_record import PREDICTIONS_NAME, RUN_NAME, describe_run
from hf_l2sp.score_table import score_names

# What a recipe or its Trainer writes: nothing else is ever deleted.
_OWN_FILES = re.compile(
    r"README\.md|(all|train|eval|test)_results\.json|comparison\.json|trainer_state\.json|training_args\.bin"
    r"|l2sp_(state\.json|fisher\.safetensors|report\.(json|png|html))|eval_predictions\.json|run\.json|perplexity\.png"
    r"|lambda_search\.(json|png)"
    r"|config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|vocab\.(txt|json)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model"
)
# One of these tells that the folder is the output of a Trainer, not the home of somebody's model.
_MARKS = ("training_args.bin", "trainer_state.json", "all_results.json", "lambda_search.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def _checkpoints(folder: Path) -> list[Path]:
    return [
        entry
        for entry in sorted(folder.glob("checkpoint-*"))
        if _CHECKPOINT.fullmatch(entry.name) and (entry / "trainer_state.json").is_file() and not entry.is_symlink()
    ]


def check_output_dir(output_dir: str, overwrite: bool, resume: Any, in_use: Iterable[str | None] = ()) -> None:
    """Checks that the run may write to `output_dir`.

    Args:
        output_dir: The output folder.
        overwrite: `--overwrite_output_dir`.
        resume: Checkpoint to resume from, or `None`.
        in_use: Folders that the run reads.

    Raises:
        RecipeError: results of another run, or anything else that is not to be touched, would be lost.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output_dir {output_dir!r} is a file; name a folder.")
    if overwrite and resume:
        raise RecipeError(
            "--overwrite_output_dir and --resume_from_checkpoint contradict each other: the first deletes the "
            "checkpoints that the second goes on from; give one of them."
        )
    if resume or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RecipeError(
            f"--output_dir {output_dir!r} is not empty. Name another folder, add --overwrite_output_dir to replace "
            "the results in it, or --resume_from_checkpoint to go on from its last checkpoint."
        )
    for path in in_use:
        if path is not None and Path(path).resolve().is_relative_to(folder.resolve()):
            raise RecipeError(
                f"--output_dir {output_dir!r} holds {path!r}, which this run reads; --overwrite_output_dir would "
                "delete it. Name another output folder."
            )
    if not any((folder / mark).is_file() for mark in _MARKS) and not _checkpoints(folder):
        raise RecipeError(
            f"--output_dir {output_dir!r} is not empty and does not look like the output of an earlier run (none of "
            f"{listed(_MARKS)}, no checkpoint); --overwrite_output_dir leaves it alone. It holds "
            f"{listed(sorted(entry.name for entry in folder.iterdir()))}. Name another output folder."
        )


def clear_output_dir(output_dir: str) -> None:
    """Deletes the files and checkpoints that an earlier run wrote, so that its results do not mix with new ones."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_file() and _OWN_FILES.fullmatch(path.name):
            path.unlink()
    drop_checkpoints(folder)
    drop_checkpoints(folder / "plain", remove_empty=True)


def drop_checkpoints(folder: Path, remove_empty: bool = False) -> None:
    """Deletes the checkpoints in a folder, and with `remove_empty` the folder if nothing else is in it."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    if remove_empty and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def find_checkpoint(resume: str | None, output_dir: str) -> str | None:
    """Folder of the checkpoint that `--resume_from_checkpoint` means: a path, or true for the last complete one.

    A process that is killed while it saves leaves a checkpoint that is not complete. It is passed over, which is said.

    Raises:
        RecipeError: there is none, or the one that was named is not complete.
    """
    if resume is None or resume.lower() in ("false", "no", "none", ""):
        return None
    if resume.lower() not in ("true", "yes"):
        return _named_checkpoint(resume)
    last, skipped = last_complete(checkpoints_in(output_dir))
    told = "; ".join(f"{path!r} is not complete ({cause})" for path, cause in skipped.items())
    if last is None:
        raise RecipeError(
            f"--resume_from_checkpoint: --output_dir {output_dir!r} has no checkpoint to go on from"
            + (f": {told}. Delete what is there" if told else "; leave the flag out")
            + " to start anew."
        )
    if told:
        say(f"{told}: training goes on from {last!r}, the last complete checkpoint.")
    return last


def _named_checkpoint(path: str) -> str:
    cause = why_incomplete(path) if Path(path).is_dir() else "there is no such folder"
    if cause is None:
        return path
    beside, _ = last_complete(checkpoints_in(Path(path).absolute().parent))
    raise RecipeError(
        f"--resume_from_checkpoint {path!r} is not the folder of a complete checkpoint: {cause}. "
        + (f"The last complete one there is {beside!r}." if beside else "Leave the flag out to start anew.")
    )


# --------------------------------------------------------------------------- results


def lower_is_better(results: dict[str, dict[str, Any]]) -> str:
    """Which of the scores in the table are better when they are lower, in words."""
    names = {name for metrics in results.values() for name in score_names(metrics)}
    kinds = [kind for kind in ("loss", "perplexity", "ece") if any(name.endswith(f"_{kind}") for name in names)]
    return " and ".join(kinds)


def result_table(results: dict[str, dict[str, Any]], difference: bool | None = None) -> str:
    """The scores of each run as aligned text; what a run lacks is a dash.

    Args:
        results: Scores by name of the run.
        difference: Whether a column says by how much the last run differs from the first. Default: if there are two.
    """
    runs = list(results)
    first, last = results[runs[0]], results[runs[-1]]
    difference = len(runs) > 1 if difference is None else difference
    rows = [["", *runs, *(["difference"] if difference else [])]]
    for name in score_names(last):
        row = [name, *(f"{results[run][name]:.4f}" if name in results[run] else "-" for run in runs)]
        rows.append(row + ([f"{last[name] - first[name]:+.4f}"] if difference else []))
    seconds = [f"{results[run]['train_runtime']:.1f} s" if "train_runtime" in results[run] else "-" for run in runs]
    rows.append(["train_runtime", *seconds, *([""] if difference else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def comparison(plain: dict[str, Any], l2sp: dict[str, Any], **about: Any) -> dict[str, Any]:
    """Content of `comparison.json`: both runs, l2sp - plain for every score, and what the runs had in common."""
    return {"plain": plain, "l2sp": l2sp, "difference": differences(plain, l2sp), **about}


def differences(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """By how much the scores of `last` differ from those of `first`."""
    return {name: last[name] - first[name] for name in score_names(last) if name in first}


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes JSON that every reader accepts: NaN and infinity, which JSON lacks, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    Path(path).write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_report(folder: Path, predictions: dict[str, Any]) -> None:
    """Writes the HTML report of an output folder whose other files are there, and what it needs beside them.

    Args:
        folder: The output folder.
        predictions: `describe_predictions` by split; empty where the task has none.
    """
    if predictions:
        write_json(folder / PREDICTIONS_NAME, predictions)
    write_json(folder / RUN_NAME, describe_run(sys.argv))
    write_html_report(folder)

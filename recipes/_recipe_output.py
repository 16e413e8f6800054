"""The output folder of a recipe, its result table and its comparison with plain fine-tuning."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _recipe_args import RecipeError
from _recipe_files import listed
from transformers.trainer_utils import get_last_checkpoint

# What a recipe or its Trainer writes: nothing else is ever deleted.
_OWN_FILES = re.compile(
    r"README\.md|(all|train|eval|test)_results\.json|comparison\.json|trainer_state\.json|training_args\.bin"
    r"|l2sp_(state\.json|report\.json|report\.png)|config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja"
    r"|vocab\.(txt|json)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model"
)
# One of these tells that the folder is the output of a Trainer, not the home of somebody's model.
_MARKS = ("training_args.bin", "trainer_state.json", "all_results.json")
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
    """Folder of the checkpoint that `--resume_from_checkpoint` means: a path, or true for the last one.

    Raises:
        RecipeError: there is none.
    """
    if resume is None or resume.lower() in ("false", "no", "none", ""):
        return None
    if resume.lower() not in ("true", "yes"):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise RecipeError(
                f"--resume_from_checkpoint {resume!r} is not the folder of a checkpoint (no trainer_state.json in "
                "it); give one such as 'OUTPUT_DIR/checkpoint-500', or no value for the last one."
            )
        return resume
    checkpoint = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if checkpoint is None:
        raise RecipeError(
            f"--resume_from_checkpoint: --output_dir {output_dir!r} has no checkpoint to go on from; leave the flag "
            "out to start anew."
        )
    return checkpoint


# --------------------------------------------------------------------------- results


def score_names(metrics: dict[str, Any]) -> list[str]:
    """The scores among `metrics`, validation first: nothing of the training, no runtimes, throughputs and counts."""
    aside = ("_runtime", "_per_second", "_samples", "_model_preparation_time")
    names = [n for n in metrics if n not in ("epoch", "total_flos") and not n.startswith("train_")]
    first = [name for prefix in ("eval_", "test_") for name in names if name.startswith(prefix)]
    return [name for name in dict.fromkeys([*first, *names]) if not name.endswith(aside)]


def result_table(results: dict[str, dict[str, Any]]) -> str:
    """The scores of each run as aligned text, with a column of differences where there are two runs."""
    runs = list(results)
    first, last = results[runs[0]], results[runs[-1]]
    rows = [["", *runs, *(["difference"] if len(runs) > 1 else [])]]
    for name in score_names(last):
        row = [name, *(f"{results[run][name]:.4f}" for run in runs)]
        rows.append(row + ([f"{last[name] - first[name]:+.4f}"] if len(runs) > 1 else []))
    seconds = [f"{results[run]['train_runtime']:.1f} s" for run in runs]
    rows.append(["train_runtime", *seconds, *([""] if len(runs) > 1 else [])])
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
    difference = {name: l2sp[name] - plain[name] for name in score_names(l2sp) if name in plain}
    return {"plain": plain, "l2sp": l2sp, "difference": difference, **about}


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes JSON that every reader accepts: NaN and infinity, which JSON lacks, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    Path(path).write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")

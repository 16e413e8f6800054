"""Which checkpoints are whole: marked when they are written, looked at before training, explained when they fail.

A process may be killed, or run out of disk, at any moment of a save. While a checkpoint is written its
`l2sp_state.json` says `"complete": false`; it is replaced by one that says `true` when everything is there, on all
ranks, and before older checkpoints are deleted. What is not whole is never resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from .state import STATE_NAME, OtherVersion, mark_complete, read_state, temporaries, write_state

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# How safetensors and tokenizers, how PyTorch's file writer tell of the system's errors; none of them is an OSError.
_WRITE_FAILURE = re.compile(
    r"\(os error \d+\)|Os \{ code: \d+|inline_container\.cc|^Parent directory .* does not exist"
)

_Told = TypeVar("_Told")


# --- judging --------------------------------------------------------------------------------------------------------


def why_incomplete(folder: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from; None for a whole one.

    A checkpoint that carries no mark (of plain `Trainer`, or of an earlier version) passes if its
    `trainer_state.json`, which `Trainer` writes last, can be read.
    """
    try:
        state = read_state(folder)
    except OtherVersion:
        return None  # refused in its own words, instead of training on from an older checkpoint
    except ValueError as error:
        return str(error).rstrip(".")
    if state is not None and not state.get("complete", True):
        return "the process that wrote it ended before it was done"
    try:
        json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except (OSError, ValueError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read ({error})"
    return None


def checkpoints_in(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all checkpoint folders of a run, whole or not, the last step first."""
    if not os.path.isdir(folder):
        return []
    steps = {int(found[1]): name for name in os.listdir(folder) if (found := _CHECKPOINT.fullmatch(name))}
    paths = [os.path.join(folder, steps[step]) for step in sorted(steps, reverse=True)]
    return [path for path in paths if os.path.isdir(path)]


def last_complete(
    checkpoints: list[str], verdict: Callable[[str], str | None] = why_incomplete
) -> tuple[str | None, dict[str, str]]:
    """The first checkpoint of a list that is whole, and those before it with the cause why they are not."""
    skipped: dict[str, str] = {}
    for checkpoint in checkpoints:
        cause = verdict(checkpoint)
        if cause is None:
            return checkpoint, skipped
        skipped[checkpoint] = cause
    return None, skipped


# --- before training ------------------------------------------------------------------------------------------------


def checked_resume(trainer: Any, resume: str | bool | None) -> str | bool | None:
    """What `Trainer.train` is to resume from, the same on all ranks: for True, the last checkpoint that is whole.

    Raises:
        OSError: Checkpoints are to be saved, and the output folder cannot be written to.
        ValueError: The checkpoint that was asked for is not whole, or none is.
    """
    _require_writable(trainer)
    if resume is None or resume is False:
        return resume

    def verdict(checkpoint: str) -> str | None:
        # Only a process that writes the mark can know of it: folders may belong to one node.
        cause = why_incomplete(checkpoint) if trainer.args.should_save and os.path.isdir(checkpoint) else None
        return next((told for told in _told_by_all(trainer, cause) if told is not None), None)

    if resume is True:
        return _last_of_run(trainer, verdict)
    cause = verdict(resume)
    if cause is None:
        return resume
    beside = _told_by_all(trainer, checkpoints_in(os.path.dirname(os.path.normpath(resume))))[0]
    last, _ = last_complete(beside, verdict)
    instead = f"Resume from {last}, the last complete one there" if last else "No checkpoint there is: start anew"
    raise ValueError(f"The checkpoint {resume} is not complete: {cause}. {instead}; {resume} can be deleted.")


def _last_of_run(trainer: Any, verdict: Callable[[str], str | None]) -> str | bool:
    checkpoints = _told_by_all(trainer, checkpoints_in(trainer.args.output_dir))[0]
    if not checkpoints:
        return True  # as `Trainer` answers it
    last, skipped = last_complete(checkpoints, verdict)
    told = "; ".join(f"{checkpoint} is not complete ({cause})" for checkpoint, cause in skipped.items())
    if last is None:
        raise ValueError(
            f"No complete checkpoint found in output directory ({trainer.args.output_dir}): {told}. Delete what is "
            "there and train without resume_from_checkpoint."
        )
    if skipped and trainer.is_world_process_zero():
        logger.warning(f"{told}: it can be deleted. Training goes on from {last}, the last complete checkpoint.")
    return last


def _require_writable(trainer: Any) -> None:
    args = trainer.args
    if args.save_strategy == SaveStrategy.NO:
        return
    cause = _unwritable(args.output_dir) if args.local_process_index == 0 else None
    for told in _told_by_all(trainer, cause):
        if told is not None:
            raise unwritable(args.output_dir, told)


def _unwritable(folder: str) -> str | None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        return str(error)
    return None


def unwritable(folder: str, cause: object) -> OSError:
    return OSError(
        f"output_dir={folder!r} cannot be written to ({cause}), so no checkpoint could be saved. Make it writable, "
        "free some space, remove the file that is in the way or choose another output_dir; or save nothing, with "
        "save_strategy='no'."
    )


@contextmanager
def output_folder_made(trainer: Any) -> Iterator[None]:
    """Around the constructor of `Trainer`, which makes the output folder: says what to do where that fails."""
    try:
        yield
    except OSError as error:
        folder = os.fspath(trainer.args.output_dir) if getattr(trainer, "args", None) is not None else ""
        if error.filename and folder.startswith(str(error.filename)) and trainer._l2sp_on:
            raise unwritable(folder, error) from error
        raise


def _told_by_all(trainer: Any, value: _Told) -> list[_Told]:
    """The value of every rank, by rank; all must take part."""
    if trainer.accelerator.num_processes == 1 or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def checkpoint_written(trainer: Any, folder: str, state: dict[str, Any]) -> Iterator[None]:
    """Around `Trainer._save_checkpoint`, on all ranks: marks the checkpoint once everything is in it.

    The mark is set between `trainer_state.json`, the last file, and what `Trainer` does next: push the folder to the
    Hub, and delete older checkpoints. Neither may see one that is not whole.

    Args:
        trainer: The trainer that saves.
        folder: Folder of the checkpoint.
        state: Content of its `l2sp_state.json`.

    Raises:
        OSError: It cannot be written; says where, why and what to do.
    """
    finished = False

    def finish() -> None:
        nonlocal finished
        if finished:
            return
        finished = True
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            mark_complete(folder)
            if (trainer.args.save_total_limit or 0) > 0:
                # They would count as checkpoints that are kept, and whole ones be deleted in their place.
                _delete_leftovers(os.path.dirname(folder))

    save_to_json = trainer.state.save_to_json

    def save_and_finish(path: str) -> None:
        save_to_json(path)
        if os.path.dirname(path) == folder:
            finish()

    with _explained(folder, os.path.dirname(folder)):
        if trainer.args.should_save:
            if _is_leftover(folder):
                _empty(folder)
            write_state(folder, state, complete=False)
        # No rank may write there before the mark, or into what is being emptied.
        trainer.accelerator.wait_for_everyone()
        trainer.state.save_to_json = save_and_finish
        try:
            yield
        finally:
            del trainer.state.save_to_json
        finish()


@contextmanager
def model_written(trainer: Any, folder: str, state: dict[str, Any] | None) -> Iterator[None]:
    """Around `Trainer.save_model` outside a checkpoint, which one rank may call alone: marks the folder when done.

    Args:
        trainer: The trainer that saves.
        folder: Where the model goes.
        state: Content of its `l2sp_state.json`; None where this process writes none.

    Raises:
        OSError: It cannot be written; says where, why and what to do.
    """
    with _explained(folder, trainer.args.output_dir):
        if state is not None:
            write_state(folder, state, complete=False)
        yield
        if state is not None:
            mark_complete(folder)


def _is_leftover(folder: str) -> bool:
    """Whether a folder is what remains of a checkpoint whose writer was killed; False where that is not certain."""
    if not os.path.isdir(folder):
        return False
    if not os.path.exists(os.path.join(folder, STATE_NAME)):
        # It is the first file of a checkpoint.
        return {Path(folder, name) for name in os.listdir(folder)} == set(temporaries(folder))
    try:
        state = read_state(folder)
    except ValueError:
        return False
    return state is not None and not state.get("complete", True)


def _empty(folder: str) -> None:
    """Deletes everything but the mark: whoever is killed here leaves a folder that is known not to be whole."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != STATE_NAME:
            os.unlink(entry.path)


def _delete_leftovers(run: str) -> None:
    for folder in filter(_is_leftover, checkpoints_in(run)):
        with suppress(OSError):  # as `Trainer` does where it deletes checkpoints
            _empty(folder)
            shutil.rmtree(folder)
            logger.info(f"Deleted {folder}, which was never complete, due to args.save_total_limit.")


# --- explaining -----------------------------------------------------------------------------------------------------


@contextmanager
def _explained(folder: str, run: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        cause = _write_failure(error)
        if cause is None:
            raise
        last, _ = last_complete(checkpoints_in(run))
        kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint yet"
        again = "train(resume_from_checkpoint=True)" if last else "train()"
        raise OSError(
            f"{folder} cannot be written: {cause} ({_free(folder)} free there). What is in it is not complete and "
            f"will not be resumed from. {kept}. Free some space or mend the cause, then go on with {again}; a model "
            "that is still in memory can be saved again with save_model()."
        ) from error


def _write_failure(error: BaseException) -> str | None:
    """What the system said when a file could not be written; None for errors of another kind."""
    # PyTorch's distributed checkpoints: what went wrong on each rank, with its traceback.
    for failure, *_ in getattr(error, "failures", {}).values():
        if (cause := _write_failure(failure)) is not None:
            return cause
    if isinstance(error, OSError):
        # The Hub's client tells of its failures by OSErrors too, which carry no number.
        network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
        return None if network or error.errno is None else str(error)
    if not isinstance(error, Exception) or not _WRITE_FAILURE.search(str(error)):
        return None
    # PyTorch knows only that a file is shorter than it should be.
    return f"a file cannot be written to its end ({error})" if "unexpected pos" in str(error) else str(error)


def _free(folder: str) -> str:
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB"

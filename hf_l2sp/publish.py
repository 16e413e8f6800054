"""Pushing to the Hub: saved first, without what is private, and explained where it fails.

`Trainer` uploads its folder as it is: with `training_args.bin`, which holds `hub_token`, with TensorBoard's events
and with paths of the machine. It loses a push in the background that fails without a word.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, create_commit, create_repo, run_as_future
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .public import CARD_NAME, public_files
from .state import STATE_NAME

__all__ = ["PushError", "push_folder"]

logger = logging.get_logger(__name__)

# What a checkpoint has beside the model.
_OF_TRAINING = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin"),
    *("global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
_CURES = {
    400: "Mend what it says",
    401: "Log in with 'hf auth login', or set hub_token",
    403: "Take a token that may write to this repository, or set hub_model_id to one of your own",
    404: "Check hub_model_id; of a private repository, only a token that may read it shows that it is there",
    409: "Another process has changed the repository at the same time",
    412: "Another process has changed the repository at the same time",
    429: "The Hub is asked too often: wait a while",
}


class PushError(OSError):
    """The Hub refused or could not be reached; says where the model is, and what to do."""


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Pushes a model that a trainer has saved, such as one whose push has failed; what is there is not sent again.

    Args:
        folder: Of the model.
        repo_id: Repository; made if need be.
        token: Default: that of `hf auth login`.
        private: Whether a new repository is private; None: as the Hub's default for the account.
        revision: Branch.
        commit_message: Message of the commit.

    Raises:
        PushError: The Hub refuses or cannot be reached.
        ValueError: There is no such folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {os.fspath(folder)!r} to push; give the folder that the model is in.")
    with _explained(repo_id, folder):
        repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        operations = public_files(folder, secrets=[token])
        return create_commit(repo_id, operations, commit_message=commit_message, token=token, revision=revision)


@contextmanager
def repository_opened(trainer: Any) -> Iterator[None]:
    """Around the creation of the repository, with which a trainer begins if it is to push."""
    if not trainer._l2sp_on:
        yield
        return
    try:
        yield
    except Exception as error:  # network, login and permission errors have no common class
        raise PushError(
            f"The repository {_repository(trainer)!r} cannot be opened: {_cause(error)}. {_cure(error)}, or leave out "
            "push_to_hub."
        ) from error


def push(
    trainer: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> Any:
    """`Trainer.push_to_hub`; saves before it asks the Hub for anything.

    Args:
        trainer: The trainer, on all ranks.
        commit_message: Message of the commit.
        blocking: Whether to wait for the upload; else a future is returned.
        token: Default: `hub_token`, then that of `hf auth login`.
        revision: Branch.
        private: Whether a new repository is private.
        card: For `create_model_card`.

    Raises:
        PushError: The Hub refuses or cannot be reached.
    """
    args = trainer.args
    _begin(trainer)
    token = token if token is not None else args.hub_token
    name = card.pop("model_name", None) or _repository(trainer).split("/")[-1]
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    model_tags = getattr(trainer.model, "model_tags", None)
    if model_tags:
        given = card.get("tags") or []
        card["tags"] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *model_tags]))
    trainer.create_model_card(model_name=name, **card)
    operations = public_files(args.output_dir, secrets=[token])

    def upload() -> CommitInfo:
        return _commit(trainer, operations, commit_message, token, revision)

    with _explained(_repository(trainer), args.output_dir):
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        trainer._finish_current_push()
    return upload() if blocking else _told_at_once(upload)


def push_checkpoint(trainer: Any, checkpoint: str) -> None:
    """`Trainer._push_from_checkpoint`: pushes a checkpoint's model, or all of it, while training goes on.

    A push that fails ends nothing: it is told of, and the next one brings what is missing.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if running and not args.hub_always_push:
        return
    if running:  # it reads the very files that are replaced below, and the Hub refuses what changed under way
        trainer.push_in_progress.wait_until_done()
    _begin(trainer)
    # Into the output folder, as `Trainer` does: older checkpoints are deleted while their upload still runs.
    with trainer._l2sp_marking(args.output_dir):
        _copy_model(checkpoint, args.output_dir)
    steps = args.save_strategy == SaveStrategy.STEPS
    when = f"step {trainer.state.global_step}" if steps else f"epoch {int(trainer.state.epoch)}"
    message = f"Training in progress, {when}"
    pushed = [(public_files(args.output_dir, secrets=[args.hub_token]), message)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        where = "last-checkpoint" if last else Path(checkpoint).name
        pushed.append((public_files(checkpoint, where, [args.hub_token]), f"{message}, checkpoint"))
    jobs: Any = []  # declared as one future, used as a list of them
    for operations, text in pushed:

        def upload(operations: list[CommitOperationAdd] = operations, text: str = text) -> CommitInfo:
            return _commit(trainer, operations, text, args.hub_token, None)

        jobs.append(_told_at_once(upload))
    trainer.push_in_progress = PushInProgress(jobs)


def _begin(trainer: Any) -> None:
    begin = getattr(trainer.callback_handler, "on_push_begin", None)  # not in transformers 4
    if begin is not None:
        begin(trainer.args, trainer.state, trainer.control)


def _copy_model(checkpoint: str, folder: str) -> None:
    for entry in os.scandir(checkpoint):
        target = os.path.join(folder, entry.name)
        if entry.name == STATE_NAME or any(fnmatch(entry.name, pattern) for pattern in _OF_TRAINING):
            continue
        if entry.is_dir():
            shutil.copytree(entry.path, target, dirs_exist_ok=True)
        elif entry.name != CARD_NAME or not os.path.exists(target):
            shutil.copy(entry.path, target)


def _commit(
    trainer: Any, operations: list[CommitOperationAdd], message: str | None, token: str | None, revision: str | None
) -> CommitInfo:
    repository = _repository(trainer)
    with _explained(repository, trainer.args.output_dir):
        return create_commit(
            repository,
            operations,
            commit_message=message or "Upload model",
            token=token,
            revision=revision if revision is not None else trainer.args.hub_revision,
        )


def _told_at_once(upload: Callable[[], CommitInfo]) -> Any:
    """A future for an upload; if it fails, that is logged, since nobody may ever look at the future."""

    def attempt() -> CommitInfo:
        try:
            return upload()
        except PushError as error:
            logger.warning(f"In the background: {error}")
            raise

    return run_as_future(attempt)


def _repository(trainer: Any) -> str:
    args = trainer.args
    return trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name


# --- explaining -----------------------------------------------------------------------------------------------------


@contextmanager
def _explained(repository: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, login and permission errors have no common class
        cause = error.__cause__ if isinstance(error, PushError) and error.__cause__ else error
        place = os.fspath(folder)
        raise PushError(
            f"The push to {repository!r} failed: {_cause(cause)}. Nothing is lost: the model is complete in "
            f"{place!r}. {_cure(cause)}. Then push again: trainer.push_to_hub(), or without the trainer "
            f"push_folder({place!r}, {repository!r}) of hf_l2sp.publish. Files that are there already are not sent "
            "again."
        ) from cause


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    errors = [error]
    while (before := errors[-1].__cause__ or errors[-1].__context__) is not None and before not in errors:
        errors.append(before)
    return errors


def _cause(error: BaseException) -> str:
    told = [_in_a_line(error)]
    # The client wraps what went wrong with a large file in an error that does not say it.
    if type(error) is RuntimeError:
        told += [_in_a_line(behind) for behind in _chain(error)[1:2]]
    return " ".join(told).rstrip(".")


def _in_a_line(error: BaseException) -> str:
    text = re.sub(r"\(Request ID: [^)]*\)|For more information check: \S+", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _cure(error: BaseException) -> str:
    statuses = (getattr(getattr(e, "response", None), "status_code", None) for e in _chain(error))
    status = next((status for status in statuses if status is not None), None)
    if status is not None:
        return _CURES.get(status, "The Hub has a trouble of its own: wait a while" if status >= 500 else "Mend that")
    if any(type(e).__name__ == "OfflineModeIsEnabled" for e in _chain(error)):
        return "Unset HF_HUB_OFFLINE"
    return "Check the connection to the Hub"

"""`l2sp_state.json`: the identity of θ0 and the state of λ, beside every saved model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .anchor import Anchor
from .identity import EntrySums
from .naming import unwrap
from .provenance import source_of

logger = logging.get_logger(__name__)

STATE_NAME = "l2sp_state.json"
FORMAT_VERSION = 1


def anchor_state(anchor: Anchor) -> dict[str, Any]:
    """Identity of θ0: where it can be had again, and what it must then be equal to."""
    return {
        "source": anchor.source,
        "revision": anchor.revision,
        "fingerprint": anchor.fingerprint,
        "entries": {
            name: {"shape": list(sums.shape), "sum": sums.total, "sum_of_squares": sums.squared}
            for name, sums in anchor.sums.items()
        },
    }


def write_state(folder: str | os.PathLike[str], state: dict[str, Any], complete: bool = True) -> Path:
    """Writes the state file, whole or not at all.

    Args:
        folder: Of the model or checkpoint; made if need be.
        state: What to write.
        complete: Whether everything else is in the folder already; if not, `mark_complete` says so later.
    """
    from . import __version__

    path = Path(folder) / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in temporaries(folder):  # of a process that was killed while it wrote
        stale.unlink(missing_ok=True)
    _replace(path, {"format_version": FORMAT_VERSION, "hf_l2sp_version": __version__, "complete": complete, **state})
    return path


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Says in the state file of a folder that everything is there."""
    path = Path(folder) / STATE_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["complete"] is not True:
        _replace(path, {**content, "complete": True})


def temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    """State files of a folder that were never finished."""
    return list(Path(folder).glob(f".{STATE_NAME}.*"))


def _replace(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{STATE_NAME}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The state beside a saved model; None where there is none.

    Raises:
        ValueError: The file is damaged or of a later format.
    """
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise _other_version(path, state)
        state["anchor"]["fingerprint"], state["anchor"]["source"], state["anchor"]["revision"]
        _recorded_sums(state)
        if not isinstance(state.get("complete", True), bool):
            raise TypeError(f"complete is {state['complete']!r}")
    except OtherVersion:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}), so the identity of θ0 is lost. Resume from another "
            "checkpoint, or delete the file if the model handed to the trainer is the pretrained one."
        ) from error
    return state


class OtherVersion(ValueError):
    """The state file is of a later format."""


def _other_version(path: Path, state: dict[str, Any]) -> OtherVersion:
    return OtherVersion(
        f"{path} has format version {state['format_version']!r}; this hf_l2sp reads {FORMAT_VERSION}. Install the "
        f"version that wrote it (hf_l2sp {state.get('hf_l2sp_version', 'unknown')})."
    )


def _recorded_sums(state: dict[str, Any]) -> dict[str, EntrySums]:
    return {
        name: EntrySums(tuple(entry["shape"]), float(entry["sum"]), float(entry["sum_of_squares"]))
        for name, entry in state["anchor"]["entries"].items()
    }


def entry_names(state: dict[str, Any]) -> list[str]:
    """Names of the parameters that had a stored θ0 when the state was written."""
    return list(state["anchor"]["entries"])


def check_fingerprint(anchor: Anchor, state: dict[str, Any], where: str | os.PathLike[str]) -> None:
    """Compares θ0 with the one on record, over the parameters that both know.

    Raises:
        ValueError: It is another θ0.
    """
    recorded = _recorded_sums(state)
    common = [name for name in recorded if name in anchor.sums]
    different = [n for n in common if not recorded[n].agrees_with(anchor.sums[n])]
    if common and not different:
        return
    if common:
        name = different[0]
        detail = (
            f"{len(different)} of {len(common)} tensors differ, first {name}: {_told(recorded[name])} on record, "
            f"{_told(anchor.sums[name])} here"
        )
    else:
        detail = f"no parameter is in common (on record: {', '.join(list(recorded)[:3])})"
    source = state["anchor"]["source"]
    raise ValueError(
        f"The anchor differs from the one that {Path(where) / STATE_NAME} was trained against: {detail}; fingerprint "
        f"{state['anchor']['fingerprint'][:12]} on record, {anchor.fingerprint[:12]} here. Resuming would pull the "
        f"weights elsewhere. Hand the trainer the same pretrained model as in the first run"
        + (f" ({source!r}), or set l2sp_anchor={source!r}." if source else ", or set l2sp_anchor to its folder.")
    )


def _told(sums: EntrySums) -> str:
    return f"shape {list(sums.shape)}, sum {sums.total:.9g}, sum of squares {sums.squared:.9g}"


def recorded_anchor(model: nn.Module, **options: Any) -> Anchor | None:
    """θ0 of a model that was loaded from a folder with an `l2sp_state.json`, from the source on record.

    Args:
        model: The model that was handed to the trainer.
        options: As for `Anchor.from_pretrained`.

    Returns:
        The anchor; None where the model's folder carries no state, so that the model itself is θ0.

    Raises:
        ValueError: The record has no source, or the source is gone or another one.
    """
    folder, _ = source_of(unwrap(model))
    if folder is None or not os.path.isdir(folder):
        return None
    state = read_state(folder)
    if state is None:
        return None
    source, revision = state["anchor"]["source"], state["anchor"]["revision"]
    path = Path(folder) / STATE_NAME
    if source is None:
        raise ValueError(
            f"The model was loaded from {folder}, which was fine-tuned with L2-SP; {path} does not say where its θ0 "
            "can be had. Set l2sp_anchor to the pretrained model. To take the fine-tuned weights as a new θ0 on "
            f"purpose, set l2sp_anchor={folder!r}."
        )
    try:
        anchor = Anchor.from_pretrained(source, model, revision=revision, **options)
    except ValueError as error:
        raise ValueError(
            f"The model was loaded from {folder}, which was fine-tuned with L2-SP; its θ0 is on record in {path} as "
            f"{source!r}{f' at {revision}' if revision else ''}, but: {error} To take the fine-tuned weights as a "
            f"new θ0 on purpose, set l2sp_anchor={folder!r}."
        ) from error
    anchor.when_attached(lambda: check_fingerprint(anchor, state, folder))
    logger.info(f"L2-SP: θ0 is {source!r}, on record in {path}; not the fine-tuned weights beside it.")
    return anchor

"""How far one checkpoint is from another: tensors by name from safetensors files, without the models' classes.

One tensor of each is in memory at a time. Pickles (`.bin`, `.pt`, `.ckpt`) are never opened.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from .naming import canonical_name
from .penalty import CHUNK
from .report import DriftReport, TensorDrift, by_layer, by_part, drift_of

_ADAPTER = "adapter_model.safetensors"
_CURE = (
    "Load the model with from_pretrained and save it with save_pretrained, which writes safetensors, on a machine "
    "where you trust the file."
)
# Another number of rows is another vocabulary or maximum length: the leading ones are the same entries.
_ROWS = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b|lm_head|decoder\.(weight|bias)$")
# Statistics that are no parameters, though they are numbers of the model.
_STATISTICS = re.compile(r"\.(running_mean|running_var)$")


class Checkpoint:
    """Names, shapes and single tensors of a checkpoint.

    Attributes:
        source: As it was named: a folder, a safetensors file or a Hub id.
        revision: Of a Hub id, if one was named.
        shapes: Of the floating-point tensors, by name; names as today's transformers writes them.

    Args:
        source: Folder, safetensors file or Hub id.
        revision: Of a Hub id.

    Raises:
        ValueError: There are no safetensors weights, or they cannot be read; says why and what to do.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        self.source = source
        self.revision = revision
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[Any, str]] = {}
        for path in _weight_files(source, revision):
            try:
                opened: Any = safe_open(path, framework="pt")
                for key in opened.keys():  # noqa: SIM118
                    stored = opened.get_slice(key)
                    if stored.get_dtype().startswith(("F", "BF")) and not _STATISTICS.search(key):
                        name = _present_name(key)
                        self.shapes[name], self._where[name] = tuple(stored.get_shape()), (opened, key)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}. Fetch it anew.") from error
        if not self.shapes:
            raise ValueError(f"{source!r} has no floating-point tensor; quantized weights have no distance.")

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now."""
        opened, key = self._where[name]
        found: Tensor = opened.get_tensor(key)
        return found


def _present_name(key: str) -> str:
    """A stored name as transformers converts it while loading, without what wrappers put in."""
    name = canonical_name(key)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _weight_files(source: str, revision: str | None) -> list[Path]:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{source!r} is no safetensors file, and pickles are never opened. {_CURE}")
        return [path]
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"there is no folder or file {source!r}: check the path.")
    single = _file(source, SAFE_WEIGHTS_NAME, revision)
    if single is not None:
        return [single]
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(index)!r} cannot be read: {error!r}. Fetch it anew.") from error
        pickles = [name for name in names if not name.endswith(".safetensors")]
        if pickles:
            raise ValueError(f"the index of {source!r} names {pickles[0]!r}, a pickle, which is never opened. {_CURE}")
        shards = {name: _file(source, name, revision) for name in names}
        missing = [name for name, shard in shards.items() if shard is None]
        if missing:
            raise ValueError(f"{source!r} lacks {', '.join(missing)}, which its index names. Fetch it anew.")
        return [shard for shard in shards.values() if shard is not None]
    raise _no_weights(source)


def _no_weights(source: str) -> ValueError:
    if not os.path.isdir(source):
        return ValueError(
            f"{source!r} is no folder or file here, and the Hub, or without a connection its cache, has no "
            f"{SAFE_WEIGHTS_NAME} of it (pickles are never loaded). Check the name, or the connection."
        )
    if (Path(source) / _ADAPTER).is_file():
        return ValueError(
            f"{source!r} holds adapters, no weights of a model. Merge them (merge_and_unload) and save the result; "
            "the drift of a run with LoRA is in its l2sp_report.json."
        )
    binary = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (Path(source) / name).is_file()]
    if binary:
        return ValueError(f"{source!r} has its weights in {binary[0]} alone, a pickle, which is never opened. {_CURE}")
    return ValueError(f"{source!r} has no {SAFE_WEIGHTS_NAME}: name the folder or Hub id of a model that was saved.")


def _file(source: str, name: str, revision: str | None) -> Path | None:
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:  # no such repository, no connection, no valid name
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source!r} is no folder or file here, and the Hub does not give it: {told[0]} Check the name, or the "
            "connection."
        ) from error
    return Path(found) if found else None


@dataclass
class CheckpointDrift:
    """Distances between two checkpoints, and what could not be compared.

    Attributes:
        report: Distances in total, per layer and part; what MODEL alone has counts as new.
        tensors: Distances of single tensors, by their names in MODEL.
        only_in_model: Names of tensors that ANCHOR lacks, such as a new head.
        only_in_anchor: Names of tensors that MODEL lacks.
        other_shape: Names of tensors of other shapes.
        rows: Rows compared, of embeddings with another number of them.
    """

    report: DriftReport
    tensors: dict[str, TensorDrift]
    only_in_model: list[str]
    only_in_anchor: list[str]
    other_shape: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        lists = {key: getattr(self, key) for key in ("only_in_model", "only_in_anchor", "other_shape", "rows")}
        return {**{k: v for k, v in self.report.to_dict().items() if v not in ({}, [])}, **lists}


def checkpoint_drift(model: Checkpoint, anchor: Checkpoint, only: Container[str] | None = None) -> CheckpointDrift:
    """Compares two checkpoints tensor by tensor, in float64.

    Names fit if they are equal, or equal up to the name of the base model in front of one side's (`bert.`).

    Args:
        model: The fine-tuned one, whose names the result has.
        anchor: The one that it began as.
        only: Names in MODEL to compare; None: all.

    Raises:
        ValueError: They have no tensor in common.
    """
    names = _matched_names(model, anchor)
    tensors: dict[str, TensorDrift] = {}
    other_shape: list[str] = []
    rows: dict[str, int] = {}
    for name in model.shapes:
        if name not in names or (only is not None and name not in only):
            continue
        theta, origin = model.tensor(name), anchor.tensor(names[name])
        if theta.shape != origin.shape:
            if theta.shape[1:] != origin.shape[1:] or not theta.dim() or not _ROWS.search(name):
                other_shape.append(name)
                continue
            rows[name] = min(len(theta), len(origin))
            theta, origin = theta[: rows[name]], origin[: rows[name]]
        tensors[name] = tensor_drift(theta, origin)
    if not tensors:
        some, others = (", ".join(list(c.shapes)[:3]) for c in (model, anchor))
        raise ValueError(
            f"{model.source!r} and {anchor.source!r} have no tensor of one name and shape in common ({some}; "
            f"{others}): compare a fine-tuned model with the one that it was made from."
        )
    new = [name for name in model.shapes if name not in names]
    total = drift_of(tensors.values())
    counts = {"anchored": total.parameters, "new": sum(math.prod(model.shapes[name]) for name in new)}
    identity = {"source": anchor.source, "revision": anchor.revision, "fingerprint": None}
    report = DriftReport(total, by_layer(tensors), counts, identity, parts=by_part(tensors))
    taken = set(names.values())
    left = [name for name in anchor.shapes if name not in taken]
    return CheckpointDrift(report, tensors, new, left, other_shape, rows)


def tensor_drift(theta: Tensor, origin: Tensor) -> TensorDrift:
    """‖θ − θ0‖² and ‖θ0‖² of one tensor, in float64 and without a copy of its size."""
    flat, start_flat = theta.reshape(-1), origin.reshape(-1)
    squared = norm = 0.0
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to(torch.float64)
        zero = start_flat[start : start + CHUNK].to(torch.float64)
        norm += float(torch.dot(zero, zero))
        part.sub_(zero)
        squared += float(torch.dot(part, part))
    return TensorDrift(squared, norm, flat.numel())


def _matched_names(model: Checkpoint, anchor: Checkpoint) -> dict[str, str]:
    """Names in MODEL → names in ANCHOR, by the prefix with which most of them fit."""
    best: dict[str, str] = {}
    for prefix in ["", *_prefixes(model), *_prefixes(anchor)]:
        found = {}
        for name in model.shapes:
            spellings = (name, name.removeprefix(prefix), f"{prefix}{name}")
            other = next((spelling for spelling in spellings if spelling in anchor.shapes), None)
            if other is not None:
                found[name] = other
        if _fitting(found, model, anchor) > _fitting(best, model, anchor):
            best = found
    return best


def _fitting(names: dict[str, str], model: Checkpoint, anchor: Checkpoint) -> int:
    return sum(model.shapes[name] == anchor.shapes[other] for name, other in names.items())


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """The first one and two parts of the names: one of them may be what the base model is called."""
    return sorted({".".join(name.split(".")[:depth]) + "." for name in checkpoint.shapes for depth in (1, 2)})

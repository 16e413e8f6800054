"""Where a model's weights come from: which of them are pretrained, which were made anew, and from what source."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .naming import named_float_parameters, unwrap

logger = logging.get_logger(__name__)


@dataclass
class Provenance:
    """What is known about the origin of a model's parameters.

    Attributes:
        loaded: Whether (part of) the model was loaded by `from_pretrained`.
        new: Names of parameters without a pretrained value: heads reported missing or mismatched.
        rows: For enlarged embeddings: how many leading rows have a pretrained value.
        source: Hub id or absolute local path of the weights, where known.
        revision: Commit of a Hub source, where known.
    """

    loaded: bool = False
    new: frozenset[str] = frozenset()
    rows: dict[str, int] = field(default_factory=dict)
    source: str | None = None
    revision: str | None = None


def examine(model: nn.Module) -> Provenance:
    """Tells pretrained from new parameters of a model as it was handed to the trainer.

    `from_pretrained` marks each parameter that it loads with `_is_hf_initialized` (private to transformers; a test
    pins it). The mark does not survive `copy.deepcopy`; then the names and shapes in the source's safetensors header
    decide, provided that the model really holds the source's values. A model that was not loaded by
    `from_pretrained` has no new parameters: its initial state is its anchor.
    """
    bare = unwrap(model)
    parameters = dict(named_float_parameters(bare))
    source, revision = source_of(bare)
    marked = {n for n, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
    files = SourceFiles.find(source, revision) if source else None
    if marked:
        new = frozenset(parameters) - marked
    elif files is not None and files.holds_values_of(bare, parameters):
        new = frozenset(n for n, p in parameters.items() if not _fits(files.shape(bare, n), p))
    else:
        return Provenance()
    rows = {}
    for name, parameter in parameters.items():
        if name in new or not is_vocabulary(bare, parameter):
            continue
        shape = files.shape(bare, name) if files is not None else None
        if shape is not None and 0 < shape[0] < parameter.shape[0]:
            rows[name] = shape[0]
    return Provenance(True, new, rows, source, revision)


def source_of(bare: nn.Module) -> tuple[str | None, str | None]:
    """Hub id or absolute local path from which a model was loaded, and the commit of a Hub id."""
    if not isinstance(bare, PreTrainedModel):
        return None, None
    name = getattr(bare, "name_or_path", None) or getattr(bare.config, "_name_or_path", None)
    if not name:
        return None, None
    if os.path.isdir(name):
        return os.path.abspath(name), None
    return str(name), getattr(bare.config, "_commit_hash", None)


def is_vocabulary(bare: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether `resize_token_embeddings` changes this parameter's number of rows."""
    if not isinstance(bare, PreTrainedModel):
        return False
    try:
        modules = (bare.get_input_embeddings(), bare.get_output_embeddings())
    except NotImplementedError:
        return False
    return any(parameter is p for module in modules if module is not None for p in module.parameters())


def _fits(shape: tuple[int, ...] | None, parameter: nn.Parameter) -> bool:
    """Whether a stored tensor gave (at least the leading rows of) the parameter its value."""
    return shape is not None and shape[1:] == tuple(parameter.shape)[1:]


class SourceFiles:
    """Names, shapes and single tensors of a safetensors checkpoint, read without loading it."""

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._where.update(dict.fromkeys(file.keys(), path))

    @classmethod
    def find(cls, source: str, revision: str | None) -> SourceFiles | None:
        """The safetensors files of a local folder or of a Hub model that is in the cache; None without them."""
        try:
            folder = Path(source)
            if folder.is_dir():
                single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
            else:
                found = [
                    cached_file(
                        source,
                        name,
                        revision=revision,
                        local_files_only=True,
                        _raise_exceptions_for_gated_repo=False,
                        _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False,
                    )
                    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
                ]
                single, index = (Path(name) if name else Path() for name in found)
            if single.is_file():
                return cls([single])
            if index.is_file():
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return cls([index.parent / name for name in sorted(set(shards))])
        except Exception as error:  # a source that cannot be read is no source; the caller has its fallback
            logger.info(f"L2-SP could not read the weights' header of {source!r}: {error}")
        return None

    def shape(self, bare: nn.Module, name: str) -> tuple[int, ...] | None:
        """Shape under which a parameter is stored, or None."""
        key = self._key(bare, name)
        if key is None:
            return None
        with safe_open(self._where[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def holds_values_of(self, bare: nn.Module, parameters: dict[str, nn.Parameter], samples: int = 3) -> bool:
        """Whether the first few matching matrices of the model equal the stored ones, up to the model's dtype."""
        compared = 0
        for name, parameter in parameters.items():
            key = self._key(bare, name)
            if key is None or parameter.dim() < 2 or compared >= samples:
                continue
            with safe_open(self._where[key], framework="pt") as file:
                stored = file.get_tensor(key)
            if not _fits(tuple(stored.shape), parameter):
                continue
            rows = min(stored.shape[0], parameter.shape[0])
            here = parameter.detach()[:rows]
            if not torch.equal(stored[:rows].to(here), here):
                return False
            compared += 1
        return compared > 0

    def _key(self, bare: nn.Module, name: str) -> str | None:
        prefix = getattr(bare, "base_model_prefix", "")
        for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if key in self._where:
                return key
        return None

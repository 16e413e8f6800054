"""Where a model's weights come from: which of them are pretrained, which were made anew, and from what source."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)
from transformers.utils.hub import cached_file

from .adapted import base_parameters
from .adapter_checks import has_adapters
from .backends import full_shape, whole_tensor
from .binaries import load_binary
from .naming import named_float_parameters, unwrap
from .sentence import is_sentence_model, module_values, pretrained_parts

logger = logging.get_logger(__name__)

_FORMATS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))


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
    pins it). The mark does not survive `copy.deepcopy`, and transformers 4 loses it while loading; then names, shapes
    and values in the source's files decide. A model that was not loaded by `from_pretrained` has no new
    parameters: its initial state is its anchor. Where a module of one's own contains a loaded model, what is outside
    of that is new; in a model of sentence-transformers, what its folder does not hold.
    """
    bare = unwrap(model)
    new: set[int] = set()
    rows: dict[int, int] = {}
    known: set[int] = set()
    parts = [part for _, part in pretrained_parts(bare)]
    for part in parts:
        found = _examine_part(part)
        if found is not None:
            known |= {id(p) for p in part.parameters()}
            new |= found[0]
            rows |= found[1]
    if not known:
        return Provenance()
    parameters = dict(named_float_parameters(bare))
    # What PEFT wraps around a model has no weights of its own.
    source, revision = source_of(parts[0] if has_adapters(bare) and len(parts) == 1 else bare)
    if source is not None and is_sentence_model(bare):
        outside = {n: p for n, p in parameters.items() if id(p) not in known}
        for name, value in module_values(source, revision, outside).items():
            here = whole_tensor(outside[name])
            if value.shape == here.shape and torch.equal(value.to(here), here):
                known.add(id(outside[name]))
    return Provenance(
        True,
        frozenset(n for n, p in parameters.items() if id(p) in new or id(p) not in known),
        {n: rows[id(p)] for n, p in parameters.items() if id(p) in rows},
        source,
        revision,
    )


def _examine_part(part: PreTrainedModel) -> tuple[set[int], dict[int, int]] | None:
    """Ids of the new parameters, and pretrained rows by id of enlarged ones; None if it was not loaded at all."""
    parameters = base_parameters(part)
    source, revision = source_of(part)
    files = SourceFiles.find(source, revision) if source else None
    vocabulary = {n for n, p in parameters.items() if is_vocabulary(part, p)}
    if any(getattr(p, "_is_hf_initialized", False) for p in parameters.values()):
        new = {n for n, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)}
        if files is not None:
            # resize_token_embeddings makes an untied output layer anew, without the mark.
            new -= {n for n in new & vocabulary if files.begins(part, n, parameters[n])}
    elif files is not None and files.holds_values_of(part, parameters):
        new = {n for n, p in parameters.items() if not files.gave(part, n, p, enlarged=n in vocabulary)}
    else:
        if source and files is None:
            logger.warning(
                f"L2-SP cannot read the weights of {source!r}, so it cannot tell whether {type(part).__name__} has "
                "new parameters: all of it is anchored where it is. Take a new head out with l2sp_exclude."
            )
        return None
    rows: dict[int, int] = {}
    if files is None:
        return {id(parameters[n]) for n in new}, rows
    for name in vocabulary - new:
        kept = files.leading_rows(part, name, parameters[name])
        if 0 < kept < full_shape(parameters[name])[0]:
            rows[id(parameters[name])] = kept
    return {id(parameters[n]) for n in new}, rows


def source_of(bare: nn.Module) -> tuple[str | None, str | None]:
    """Hub id or absolute local path from which a model was loaded, and the commit of a Hub id."""
    if is_sentence_model(bare):
        # Its folder is that of the transformers model in it.
        _, bare = next(pretrained_parts(bare))
    if not isinstance(bare, PreTrainedModel):
        return None, None
    name = getattr(bare, "name_or_path", None) or getattr(bare.config, "_name_or_path", None)
    if not name:
        return None, None
    if os.path.isdir(name):
        return os.path.abspath(name), None
    # transformers 5.24 no longer notes it.
    return str(name), getattr(bare.config, "_commit_hash", None) or _cached_commit(str(name), bare)


def _cached_commit(source: str, bare: PreTrainedModel) -> str | None:
    """The commit in the cache whose weights the model has, as it was loaded; that of the main branch comes first."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    main = folder / "refs" / "main"
    first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    for snapshot in sorted(folder.glob("snapshots/*"), key=lambda path: (path.name != first, path.name)):
        files = SourceFiles.find(str(snapshot), None)
        if files is not None and files.holds_values_of(bare, base_parameters(bare)):
            return snapshot.name
    return None


def is_vocabulary(bare: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether `resize_token_embeddings` changes this parameter's number of rows."""
    if not isinstance(bare, PreTrainedModel):
        return False
    try:
        modules = (bare.get_input_embeddings(), bare.get_output_embeddings())
    except NotImplementedError:
        return False
    return any(parameter is p for module in modules if module is not None for p in module.parameters())


class _Binary:
    """A checkpoint in PyTorch's old format, mapped and without running code from it, as if it were safetensors."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_binary(path, mapped=True)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, key: str) -> _BinarySlice:
        return _BinarySlice(self._tensors[key])

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]


class _BinarySlice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


class SourceFiles:
    """Names, shapes and single tensors of a checkpoint, read without loading all of it."""

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[Path, Any] = {}
        self._where = {key: path for path in files for key in self._open(path).keys()}  # noqa: SIM118

    @classmethod
    def find(cls, source: str, revision: str | None) -> SourceFiles | None:
        """The weights' files of a local folder or of a Hub model that is in the cache; None without them."""
        try:
            for single_name, index_name in _FORMATS:
                single = cls._file(source, single_name, revision)
                if single is not None:
                    return cls([single])
                index = cls._file(source, index_name, revision)
                if index is not None:
                    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                    return cls([index.parent / name for name in sorted(set(shards))])
        except Exception as error:  # a source that cannot be read is no source; the caller has its fallback
            logger.info(f"L2-SP could not read the weights' header of {source!r}: {error}")
        return None

    @staticmethod
    def _file(source: str, name: str, revision: str | None) -> Path | None:
        if os.path.isdir(source):
            path = Path(source) / name
            return path if path.is_file() else None
        found = cached_file(
            source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    def gave(self, part: PreTrainedModel, name: str, parameter: nn.Parameter, enlarged: bool) -> bool:
        """Whether a parameter got its value from here: by name and shape, and for a head by value as well.

        Args:
            part: The model.
            name: The parameter's name.
            parameter: The parameter.
            enlarged: Whether another number of rows is no objection.
        """
        stored = self._slice(part, name)
        if stored is None:
            return False
        shape, wanted = tuple(stored.get_shape()), full_shape(parameter)
        if shape[1:] != wanted[1:] or (shape != wanted and not enlarged):
            return False
        prefix = part.base_model_prefix
        if not hasattr(part, prefix) or name.startswith(f"{prefix}."):
            return True
        # Else the head was replaced by another one. Of an output layer with other rows the first one tells.
        rows = 1 if enlarged else shape[0]
        here = whole_tensor(parameter)[:rows]
        return torch.equal(stored[:rows].to(here), here)

    def begins(self, part: PreTrainedModel, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is, up to its number of rows, the one from here: its first row is the same."""
        if not self.gave(part, name, parameter, enlarged=True):
            return False
        stored = self._slice(part, name)
        first = whole_tensor(parameter)[:1]
        return torch.equal(stored[:1].to(first), first)

    def leading_rows(self, part: PreTrainedModel, name: str, parameter: nn.Parameter) -> int:
        """How many leading rows of an embedding come from here; all of it where the file does not know it."""
        stored = self._slice(part, name)
        present = full_shape(parameter)[0]
        rows = present if stored is None else min(stored.get_shape()[0], present)
        if stored is None or rows == present:
            return present
        here = whole_tensor(parameter)[:rows]
        same = (stored[:rows].to(here) == here).flatten(1).all(1) if here.dim() > 1 else stored[:rows].to(here) == here
        # Up to the last row that is still the same: those after it were dropped and made again between. Nothing in
        # common: all of it has moved since it was loaded.
        equal = same.nonzero()
        return int(equal[-1]) + 1 if len(equal) else rows

    def holds_values_of(self, part: PreTrainedModel, parameters: Mapping[str, nn.Parameter], samples: int = 3) -> bool:
        """Whether the first few matrices of the model are the stored ones, up to the model's dtype."""
        compared = 0
        for name, parameter in parameters.items():
            stored = self._slice(part, name)
            shape = full_shape(parameter)
            if stored is None or len(shape) < 2 or tuple(stored.get_shape()) != shape:
                continue
            here = whole_tensor(parameter)
            if torch.equal(stored[:].to(here), here):
                return True
            compared += 1
            if compared == samples:
                break
        return False

    def mapped(self, part: PreTrainedModel, name: str) -> tuple[torch.Tensor, Path] | None:
        """The stored tensor, mapped and not read yet, and its file; None if there is none."""
        key = self._key(part, name)
        return None if key is None else (self._open(self._where[key]).get_tensor(key), self._where[key])

    def _slice(self, part: PreTrainedModel, name: str) -> Any:
        key = self._key(part, name)
        return None if key is None else self._open(self._where[key]).get_slice(key)

    def _key(self, part: PreTrainedModel, name: str) -> str | None:
        """The name under which a parameter is stored; None if it is not."""
        prefix = part.base_model_prefix
        for short in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            # Names of old checkpoints, which transformers converts while loading.
            for key in (
                short,
                short.replace("LayerNorm.weight", "LayerNorm.gamma"),
                short.replace("LayerNorm.bias", "LayerNorm.beta"),
            ):
                if key in self._where:
                    return key
        return None

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            binary = path.suffix == ".bin"
            self._files[path] = _Binary(path) if binary else safe_open(path, framework="pt")
        return self._files[path]

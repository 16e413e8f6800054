"""Models of sentence-transformers: modules in a row, one of them a transformers model, saved in one folder.

The package itself is never imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from .binaries import load_binary

logger = logging.get_logger(__name__)


def is_sentence_model(module: nn.Module) -> bool:
    """Whether it is a SentenceTransformer, SparseEncoder or the like, with a transformers model in it."""
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    return isinstance(module, nn.Sequential) and "sentence_transformers" in packages and any(pretrained_parts(module))


def pretrained_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost transformers models in a module, each after what precedes the names of its parameters."""
    if isinstance(module, PreTrainedModel):
        yield prefix, module
    else:
        for name, child in module.named_children():
            yield from pretrained_parts(child, f"{prefix}{name}.")


def module_values(source: str, revision: str | None, names: Iterable[str], cached: bool = True) -> dict[str, Tensor]:
    """Values of the modules that are saved beside the transformers model, such as a dense layer.

    Args:
        source: Local folder or Hub id.
        revision: Hub revision.
        names: Parameters of the whole model (`2.linear.weight`).
        cached: Whether to look for a Hub id in the cache only.

    Returns:
        Name → value, for the names that the source knows.
    """
    try:
        listed = _file(source, "modules.json", revision, cached)
        modules = json.loads(listed.read_text(encoding="utf-8")) if listed is not None else []
        folders = {module["name"]: module["path"] for module in modules if module["path"]}
        wanted = {name: name.partition(".") for name in names}
        stored = {
            module: _tensors(source, folders[module], revision, cached)
            for module in {parts[0] for parts in wanted.values()} & folders.keys()
        }
        return {
            name: stored[module][key] for name, (module, _, key) in wanted.items() if key in stored.get(module, {})
        }
    except Exception as error:  # a source that cannot be read gives no values, and what has none is new
        logger.warning(f"L2-SP cannot read the modules of {source!r} beside its transformers model: {error}")
        return {}


def _tensors(source: str, folder: str, revision: str | None, cached: bool) -> dict[str, Tensor]:
    safe = _file(source, f"{folder}/{SAFE_WEIGHTS_NAME}", revision, cached)
    if safe is not None:
        return load_file(safe)
    binary = _file(source, f"{folder}/{WEIGHTS_NAME}", revision, cached)
    return {} if binary is None else load_binary(binary)


def _file(source: str, name: str, revision: str | None, cached: bool) -> Path | None:
    found = cached_file(
        source,
        name,
        revision=revision,
        local_files_only=cached,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None

"""Loading θ0 from a Hub id or a local folder, with checks of names and shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .backends import Backend, loading_whole
from .binaries import is_refused_pickle
from .naming import canonical_name, named_float_parameters, unwrap
from .plan import Plan, PlanEntry, build_plan
from .provenance import Provenance, SourceFiles, examine, is_vocabulary, source_of
from .sentence import is_sentence_model, module_values, pretrained_parts


class SourceWeights(NamedTuple):
    """Values by canonical name (only those that the model can take), and what they say about its origin."""

    values: dict[str, Tensor]
    provenance: Provenance


def load_source(
    id_or_path: str,
    model: nn.Module,
    revision: str | None = None,
    exclude: Sequence[str] | None = None,
    handed: Provenance | None = None,
) -> SourceWeights:
    """Loads the values of a model's parameters from another checkpoint of its architecture.

    Args:
        id_or_path: Hub id or local folder; for a model that is neither a `PreTrainedModel` nor one of
            sentence-transformers a folder with `model.safetensors`, or such a file.
        model: The model that will be trained.
        revision: Hub revision.
        exclude: Regular expressions of parameters for which no value is needed.
        handed: What is known of the model's own origin; None: found out from the model.

    Raises:
        ValueError: The source cannot be loaded, is of another architecture, has other shapes, or lacks part of the
            base model.
    """
    bare = unwrap(model)
    _check_is_no_pickle(id_or_path)
    if isinstance(bare, PreTrainedModel):
        found, commit = _load_pretrained(id_or_path, bare, revision)
    elif is_sentence_model(bare):
        found, commit = _load_sentence_model(id_or_path, bare, revision)
    else:
        found, commit = _load_safetensors(id_or_path), None
    handed = examine(bare) if handed is None else handed
    plan = build_plan(bare, Provenance(True, handed.new), exclude)
    values: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    missing, mismatched = [], []
    for name, entry in plan.entries.items():
        value = found.get(name)
        if value is None:
            if _is_required(bare, entry):
                missing.append(name)
            continue
        value, kept_rows = _matched(bare, entry, value)
        if value is None:
            if _is_required(bare, entry):
                mismatched.append(f"{name} is {tuple(found[name].shape)}, needs {entry.shape}")
            continue
        values[name] = value
        if kept_rows is not None:
            rows[name] = kept_rows
    if mismatched:
        raise ValueError(
            f"l2sp_anchor={id_or_path!r} does not fit the model: {'; '.join(mismatched[:5])} ({len(mismatched)} in "
            "all). Name the checkpoint that the model was made from, or take these out with l2sp_exclude."
        )
    if missing:
        raise ValueError(
            f"l2sp_anchor={id_or_path!r} has no value for {', '.join(missing[:5])} ({len(missing)} of "
            f"{len(plan.entries)} parameters). Name the checkpoint that the model was made from, or take these out "
            "with l2sp_exclude."
        )
    source = os.path.abspath(id_or_path) if os.path.exists(id_or_path) else id_or_path
    new = frozenset(plan.entries) - frozenset(values)
    return SourceWeights(values, Provenance(True, new, rows, source, commit))


def _check_is_no_pickle(path: str) -> None:
    if os.path.isfile(path) and not path.endswith(".safetensors"):
        raise ValueError(
            f"l2sp_anchor={path!r} is a file, but no safetensors file, and pickles are never opened. Name a folder "
            "that save_pretrained has written, or for a module of your own a file of safetensors.torch.save_file."
        )


def _is_required(bare: nn.Module, entry: PlanEntry) -> bool:
    """Whether a source without this parameter cannot be the model's θ0: all but heads, which are task-specific."""
    if not entry.can_be_anchored:
        return False
    if not isinstance(bare, PreTrainedModel) and not is_sentence_model(bare):
        return True
    for at, part in pretrained_parts(bare):
        prefix = part.base_model_prefix
        has_base = bool(prefix) and hasattr(part, prefix)
        if entry.name.startswith(f"{at}{prefix}." if has_base else at):
            return True
    return False


def _matched(bare: nn.Module, entry: PlanEntry, value: Tensor) -> tuple[Tensor | None, int | None]:
    """The value cut to the parameter's shape, and how many rows it covers where it is shorter."""
    shape = tuple(value.shape)
    if shape == entry.shape:
        return value, None
    if shape[1:] != entry.shape[1:] or not _is_vocabulary(bare, entry.parameter):
        return None, None
    if shape[0] > entry.shape[0]:
        return value[: entry.shape[0]], None
    return value, shape[0]


def _is_vocabulary(bare: nn.Module, parameter: nn.Parameter) -> bool:
    return any(is_vocabulary(part, parameter) for _, part in pretrained_parts(bare))


def _load_pretrained(
    id_or_path: str, bare: PreTrainedModel, revision: str | None
) -> tuple[Mapping[str, Tensor], str | None]:
    try:
        raw, _ = PretrainedConfig.get_config_dict(id_or_path, revision=revision)
        # The model's own class, which also takes its part out of the configuration of a larger model.
        config_class: Any = type(bare.config)
        config = config_class.from_pretrained(id_or_path, revision=revision)
    except Exception as error:  # OSError, ValueError, HTTP errors, broken JSON: the cause is told
        raise _unloadable(id_or_path, revision, error) from error
    kinds = [c.get("model_type") for c in (raw, *raw.values()) if isinstance(c, dict) and c.get("model_type")]
    if kinds and bare.config.model_type not in kinds:
        raise ValueError(
            f"l2sp_anchor={id_or_path!r} is a {kinds[0]!r} model, the model to train a {bare.config.model_type!r}. θ0 "
            "needs the same architecture."
        )
    dtypes = {p.dtype for p in bare.parameters() if p.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    try:
        # The missing head is initialised at random and thrown away; it must not move the training's random numbers.
        with _quiet(), loading_whole(), torch.random.fork_rng(devices=_cuda_devices()):
            pretrained_class: Any = type(bare)
            loaded, info = pretrained_class.from_pretrained(
                id_or_path, revision=revision, config=config, dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise _unloadable(id_or_path, revision, error) from error
    absent = {canonical_name(name) for name in info["missing_keys"]}
    absent |= {canonical_name(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"]}
    values = {name: p.detach() for name, p in named_float_parameters(loaded) if name not in absent}
    return values, source_of(loaded)[1]


def _load_sentence_model(
    id_or_path: str, bare: nn.Module, revision: str | None
) -> tuple[Mapping[str, Tensor], str | None]:
    """Also from a folder with the transformers model alone, from which such a model can be made."""
    found: dict[str, Tensor] = {}
    commit = None
    for prefix, part in pretrained_parts(bare):
        values, commit = _load_pretrained(id_or_path, part, revision)
        found.update({f"{prefix}{name}": value for name, value in values.items()})
    others = [name for name, _ in named_float_parameters(bare) if name not in found]
    return {**module_values(id_or_path, revision, others, cached=False), **found}, commit


def _load_safetensors(path: str) -> Mapping[str, Tensor]:
    file = os.path.join(path, SAFE_WEIGHTS_NAME) if os.path.isdir(path) else path
    try:
        return {canonical_name(name): value for name, value in load_file(file).items()}
    except Exception as error:  # safetensors raises its own error type
        raise _unloadable(path, None, error) from error


def _unloadable(id_or_path: str, revision: str | None, error: Exception) -> ValueError:
    at = f" at revision {revision!r}" if revision else ""
    if is_refused_pickle(error):
        return ValueError(
            f"θ0 cannot be loaded from {id_or_path!r}{at}: its weights are a pickle with more than tensors in it, "
            "which may be code, so it is not opened. If you trust it, load it with the program that wrote it, save it "
            "as safetensors (save_pretrained) and set l2sp_anchor to that folder."
        )
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(
        f"θ0 cannot be loaded from {id_or_path!r}{at}: {first_line} Set l2sp_anchor to a local folder with the "
        "pretrained model, or to a Hub id that is reachable or in the cache."
    )


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading report, whose missing head is of no concern here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def mapped_source(
    model: nn.Module, provenance: Provenance, plan: Plan, backend: Backend
) -> Callable[[str], tuple[Tensor, Path] | None] | None:
    """`name -> this rank's part of the tensor, mapped from the file that θ0 comes from, and the file`."""
    bare: Any = unwrap(model)
    source, revision = provenance.source, provenance.revision
    if source is None:
        source, revision = source_of(bare)
    files = SourceFiles.find(source, revision) if source and isinstance(bare, PreTrainedModel) else None
    if files is None:
        return None

    def mapped(name: str) -> tuple[Tensor, Path] | None:
        found = files.mapped(bare, name)
        entry = plan.entries[name]
        if found is None or found[0].dim() != len(entry.shape) or found[0].shape[1:] != entry.shape[1:]:
            return None
        stored, path = found
        leading = stored[: entry.pulled_shape[0]] if entry.shape else stored
        return backend.region(entry.parameter).cut(leading), path

    return mapped

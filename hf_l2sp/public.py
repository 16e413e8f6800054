"""What of a model's folder may leave this machine: which files, and those without its paths, secrets and texts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, ModelCard, constants, get_token

CARD_NAME = "README.md"
# At the top of the folder: what `Trainer` does not push either.
_LEFT_OUT_FOLDERS = ("_*", "checkpoint-*")
_LEFT_OUT = (
    ".*",
    "training_args.bin",  # a pickle of all arguments: hub_token, folders, names of runs
    "*tfevents*",  # the same arguments, and the name of the host in that of the file
    "*.log",
    "l2sp_fisher.safetensors",  # gradients on the training data
    *("run.json", "*.html"),  # of a recipe: its command line, with the names of its data
    *("*.csv", "*.tsv", "*.jsonl", "*.parquet", "*.arrow", "*.xlsx"),  # data: texts, predictions
)
# Vocabularies have words that look like anything; nobody writes paths there.
_VOCABULARY = ("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_READABLE = (".json", ".md", ".yaml", ".yml", ".txt", ".py", ".jinja")
# Keys that name a place; another string is taken for one only if it is an absolute path of something that is there.
_SOURCES = ("source", "_name_or_path", "name_or_path", "base_model_name_or_path")
_PLACES = (*_SOURCES, "best_model_checkpoint", "weights", "l2sp_anchor", "l2sp_weights")
# Where cards of sentence-transformers show rows of the training data, and arguments such as l2sp_anchor.
_SAMPLES = re.compile(r"^\* Samples:\n(?:[ \t]*[|<].*\n)+", flags=re.MULTILINE)
_ARGUMENT = re.compile(r"^(- `\w+`: )((?:[/~]|[A-Za-z]:\\).*)$", flags=re.MULTILINE)
_SENTENCES = re.compile(r"^(\w+) = \[\n(?:(?!\]$).*\n)*\]$", flags=re.MULTILINE)


def public_files(
    folder: str | os.PathLike[str], path_in_repo: str = "", secrets: Iterable[str | None] = ()
) -> list[CommitOperationAdd]:
    """The files of a folder that may be uploaded, as additions to a commit; the folder stays as it is.

    Left out: checkpoints, hidden files, names with a leading underscore, `training_args.bin`, TensorBoard's events,
    logs, files of data, a Fisher information and a recipe's command. In the others that are text, paths of this
    machine give way to the Hub id that the model card names, or to their last part; the home folder, the cache and
    the token to dots. Cards of sentence-transformers lose their samples of the training data.

    Args:
        folder: Folder of a model or checkpoint.
        path_in_repo: Folder in the repository.
        secrets: What must not be uploaded either, such as a token.
    """
    root = Path(folder)
    base_model = _base_model(root)
    hidden = _hidden(root, secrets)
    operations = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not _is_left_out(name):
            content = _cleaned(path, base_model, hidden)
            where = (Path(path_in_repo) / name).as_posix()
            operations.append(CommitOperationAdd(where, str(path) if content is None else content))
    return operations


def is_local(place: str) -> bool:
    """Whether a model's source is a path of this machine, be it gone, and not a Hub id."""
    return _is_absolute(place) or place.startswith(("~", "./", "../")) or os.path.exists(place)


def clean_card(card: ModelCard) -> None:
    """Takes paths of base models out of a card's metadata and text."""
    data: Any = card.data
    named = data.get("base_model")
    local = [model for model in ([named] if isinstance(named, str) else named or []) if is_local(str(model))]
    if not local:
        return
    left = [] if isinstance(named, str) else [model for model in named if model not in local]
    data.base_model = left or None
    # PEFT's tags name it too: base_model:adapter:PATH.
    data.tags = [tag for tag in data.get("tags") or [] if not any(model in tag for model in local)] or None
    text = card.text
    for model in local:
        text = text.replace(f"[{model}](https://huggingface.co/{model})", "a pretrained model")
        text = text.replace(model, _last_part(model))
    card.text = text


def _is_absolute(place: str) -> bool:
    return os.path.isabs(place) or PureWindowsPath(place).is_absolute()


def _is_left_out(name: Path) -> bool:
    if any(fnmatch(name.parts[0], pattern) for pattern in _LEFT_OUT_FOLDERS):
        return True
    return any(fnmatch(part, pattern) for part in name.parts for pattern in _LEFT_OUT)


def _base_model(root: Path) -> str | None:
    """The Hub id that the card names."""
    card = root / CARD_NAME
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model") if card.is_file() else None
    return named if isinstance(named, str) and not is_local(named) else None


def _hidden(root: Path, secrets: Iterable[str | None]) -> list[str]:
    """Strings that must not be uploaded, the longest first."""
    places = {str(root.absolute()), str(root.resolve()), str(Path.home()), constants.HF_HOME}
    words = {get_token(), *secrets} | {place for place in places if Path(place).parent != Path(place)}
    return sorted((word for word in words if word), key=len, reverse=True)


def _cleaned(path: Path, base_model: str | None, hidden: list[str]) -> bytes | None:
    """What is uploaded in place of a file; None for the file itself."""
    if path.suffix not in _READABLE or any(fnmatch(path.name, pattern) for pattern in _VOCABULARY):
        return None
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if path.suffix == ".json":
        text = _cleaned_json(text, base_model)
    elif path.name == CARD_NAME:
        text = _cleaned_card(text)
    for word in hidden:
        text = re.sub(rf"{re.escape(word)}(?![\w-])", "...", text)
    content = text.encode("utf-8")
    return None if content == raw else content


def _cleaned_json(text: str, base_model: str | None) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    cleaned = _without_places(value, None, base_model)
    return text if cleaned == value else json.dumps(cleaned, indent=2) + "\n"


def _without_places(value: Any, key: str | None, base_model: str | None) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(item, name, base_model) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item, key, base_model) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if not (is_local(value) if key in _PLACES else _is_absolute(value) and os.path.exists(value)):
        return value
    return base_model if key in _SOURCES else _last_part(value)


def _last_part(place: str) -> str:
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _cleaned_card(text: str) -> str:
    card = ModelCard(text, ignore_metadata_errors=True)
    before = str(card)
    clean_card(card)
    if card.data.get("library_name") == "sentence-transformers":
        card.data["widget"] = None
        card.text = _SENTENCES.sub(r"\1 = [...]", _SAMPLES.sub("", card.text))
        card.text = _ARGUMENT.sub(lambda found: found[1] + _last_part(found[2]), card.text)
    return text if str(card) == before else str(card)

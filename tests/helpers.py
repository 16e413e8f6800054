"""What several test files do to models and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertConfig, PreTrainedModel


def saved(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    return str(folder)


def changed(config: BertConfig, **values: Any) -> BertConfig:
    return BertConfig(**{**config.to_diff_dict(), **values})

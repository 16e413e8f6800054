"""What several test files do to models and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel


def saved(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    return str(folder)


def changed(config: BertConfig, **values: Any) -> BertConfig:
    return BertConfig(**{**config.to_diff_dict(), **values})


def load_classifier(folder: str, **options: Any) -> BertForSequenceClassification:
    """The pretrained encoder with a new head, the same each time."""
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
    model.accepts_loss_kwargs = False
    return model


def quick(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments of a training that writes and says nothing but its logs, one a step."""
    return {
        "output_dir": str(folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **changes,
    }

"""Examples of which the Fisher information is taken: rows of batches, each as a batch of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NO_LABEL = -100

Row = dict[str, Any]


def rows_of(batch: Any, device: torch.device) -> Iterator[Row]:
    """Each row of a batch as a batch of one.

    Raises:
        ValueError: The batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"estimate_fisher: a batch is a {type(batch).__name__}; give mappings of the model's inputs.")
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    tensors = [v for v in (inputs.get("labels"), *inputs.values()) if isinstance(v, Tensor) and v.dim()]
    count = len(tensors[0]) if tensors else 0
    for index in range(count):
        yield {
            name: v[index : index + 1] if isinstance(v, Tensor) and v.dim() and len(v) == count else v
            for name, v in inputs.items()
        }


def has_label(row: Row) -> bool:
    """Whether the row has a loss: not all of its labels are -100."""
    labels = row.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return True
    return bool((labels != NO_LABEL).any())


def trimmed(row: Row, model: Any) -> Row:
    """The row without the padding at both ends: some models number positions from there."""
    mask = row.get("attention_mask")
    # Labels of an encoder-decoder have positions of their own.
    if not isinstance(mask, Tensor) or mask.dim() != 2 or _is_encoder_decoder(model):
        return row
    kept = mask[0] != 0
    labels = row.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        kept = kept | (labels[0] != NO_LABEL)
    places = kept.nonzero()
    if not len(places):
        return row
    span = slice(int(places[0]), int(places[-1]) + 1)
    return {
        name: v[:, span] if isinstance(v, Tensor) and v.dim() > 1 and v.shape[:2] == mask.shape else v
        for name, v in row.items()
    }


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def with_drawn_labels(row: Row, model: nn.Module, draw: torch.Generator) -> Row:
    """The row with labels drawn from the model's probabilities, where it has some."""
    labels, logits = row.get("labels"), None
    if not _is_encoder_decoder(model):  # whose labels are its inputs as well
        with torch.no_grad():
            logits = getattr(model(**{name: v for name, v in row.items() if name != "labels"}), "logits", None)
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or not isinstance(logits, Tensor)
        or logits.shape[:-1] != labels.shape
        or logits.shape[-1] < 2
    ):
        raise ValueError(
            f"labels='sampled' is for models that classify sequences or tokens by one class; "
            f"{type(model).__name__} or its labels are not. Use labels='data'."
        )
    probabilities = logits.reshape(-1, logits.shape[-1]).float().softmax(-1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=draw).view(labels.shape).to(labels)
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        drawn = torch.cat([labels[:, :1], drawn[:, :-1]], dim=1)  # what is said at one token is the label of the next
    return {**row, "labels": torch.where(labels == NO_LABEL, labels, drawn)}

"""What a model makes of labelled examples: its last hidden states, beside what is to be predicted from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fisher_rows import NO_LABEL
from .naming import unwrap, without_adapters


class Represented(NamedTuple):
    """Examples to regress on.

    Attributes:
        features: Last hidden states, the mean over the tokens. Shape: (n, d).
        targets: One-hot classes, or the numbers themselves. Shape: (n, k).
    """

    features: Tensor
    targets: Tensor


def represented(model: nn.Module, batch: Any, labels: Tensor) -> Represented | None:
    """Runs a batch through a model without its labels.

    Args:
        model: The model, wrapped or not; a wrapper's `forward` is called.
        batch: What a collator makes, on the model's device.
        labels: Of the batch: a class, a number, or several numbers per example.

    Returns:
        None where the model is not one of transformers, or the labels are not what its head predicts of an example.
    """
    inner = without_adapters(unwrap(model))
    if not isinstance(inner, PreTrainedModel) or not isinstance(batch, Mapping) or inner.main_input_name not in batch:
        return None
    numbers = labels.is_floating_point() or labels.dtype == torch.bool
    classes = getattr(inner.config, "num_labels", None) or 0
    if labels.dim() != 1 and not (numbers and labels.dim() == 2):
        return None
    if not numbers and not bool(((labels == NO_LABEL) | (labels >= 0) & (labels < classes)).all()):
        return None
    known = inspect.signature(inner.forward).parameters
    inputs = {name: value for name, value in batch.items() if name in known and value is not labels}
    output = model(**inputs, output_hidden_states=True, return_dict=True)
    layers = output.get("hidden_states") or output.get("encoder_hidden_states")
    if not layers or layers[-1].dim() != 3 or len(layers[-1]) != len(labels):
        return None
    last = layers[-1].float()
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != last.shape[:2]:
        mask = torch.ones(last.shape[:2])
    mask = mask.to(last)[..., None]
    features = (last * mask).sum(1) / mask.sum(1).clamp(min=1)  # no product that autocast would round
    labels = labels.to(last.device)  # a model may be spread over several
    if numbers:
        return Represented(features, labels.view(len(labels), -1))
    kept = labels != NO_LABEL
    return Represented(features[kept], nn.functional.one_hot(labels[kept].long(), classes))

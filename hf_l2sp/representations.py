"""What a model makes of labelled examples: its hidden states, beside what is to be predicted from them."""

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
        layers: Hidden states, the mean over the tokens, from the embeddings to the last layer. Shape of each: (n, d).
        targets: One-hot classes, or the numbers themselves. Shape: (n, k).
    """

    layers: list[Tensor]
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
    states = output.get("hidden_states") or output.get("encoder_hidden_states")
    if not states or states[-1].dim() != 3 or len(states[-1]) != len(labels):
        return None
    layers = [_token_mean(state, batch.get("attention_mask")) for state in states if state.dim() == 3]
    labels = labels.to(layers[-1].device)  # a model may be spread over several
    if numbers:
        return Represented(layers, labels.view(len(labels), -1))
    kept = labels != NO_LABEL
    classes_of = nn.functional.one_hot(labels[kept].long(), classes)
    return Represented([layer[kept.to(layer.device)] for layer in layers], classes_of)


def _token_mean(states: Tensor, mask: Any) -> Tensor:
    """Over the tokens that are attended to, or all of them where a layer has pooled them and the mask does not fit.

    In float32, with no product that autocast would round.
    """
    states = states.float()
    known = isinstance(mask, Tensor) and mask.shape == states.shape[:2]
    weights: Tensor = (mask if known else torch.ones(states.shape[:2])).to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

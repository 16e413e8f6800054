"""Between the pretrained and the fine-tuned weights: θ0 + α(θ − θ0)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from .anchor import Anchor

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def interpolate(model: _Model, anchor: Anchor, alpha: float) -> _Model:
    """Moves the anchored parameters to θ0 + α(θ − θ0), in place; new and excluded ones stay.

    Args:
        model: The fine-tuned model that the anchor was taken from.
        anchor: θ0.
        alpha: 1 leaves the model as it is, 0 gives θ0, values between trade one for the other.

    Returns:
        The model.

    Raises:
        ValueError: `alpha` is not finite, the anchor belongs to another model, or DeepSpeed holds the weights.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (arXiv 2109.01903).
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} must be a finite number, usually between 0 and 1.")
    if anchor.backend.steps_in_backward:
        raise ValueError(
            "A model cannot be interpolated while DeepSpeed holds it: its fp32 weights are elsewhere. Load the saved "
            "model and Anchor.from_pretrained in one process."
        )
    for entry in anchor.low_rank_for(model):
        if entry.starts:
            raise ValueError(
                f"The adapters of {entry.name} began with part of the base weight (PiSSA and its like), so no factor "
                "of theirs leads back to θ0. Merge them first, and interpolate the merged model."
            )
    _, terms = anchor.stored_terms(model)
    for term in terms if alpha != 1.0 else ():  # θ0 + (θ − θ0) would differ from θ by rounding
        assert term.anchor is not None
        theta = anchor.backend.local(term.parameter)
        if term.rows is not None:
            theta = theta[: term.rows]
        origin = term.anchor.to(device=theta.device, dtype=torch.promote_types(theta.dtype, torch.float32))
        # 0·NaN is NaN: the way back must be open to a model that has diverged.
        theta.copy_(torch.lerp(origin, theta.to(origin.dtype), alpha) if alpha else origin)
    for entry in anchor.low_rank_for(model) if alpha != 1.0 else ():
        for product in entry.adapted.active().values():
            anchor.backend.local(product.up).mul_(alpha)  # s·(αB)A = α·s·BA
    return model

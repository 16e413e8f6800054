"""⟨∇L, θ − θ0⟩: how a loss changes along the way from θ0, from the gradients that are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapted import LowRankEntry
from .backends import Backend
from .penalty import Term, walk


@torch.no_grad()
def slope_pass(terms: Sequence[Term]) -> Tensor:
    """⟨g, θ − θ0⟩ of every term, g being its gradient, without w.

    Works in chunks, as `penalty_pass` does, without a temporary of a parameter's size.

    Returns:
        Shape: [terms]. float64 (float32 where the device has no float64).
    """
    device = terms[0].parameter.device if terms else torch.device("cpu")
    found = torch.zeros(len(terms), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for chunk in walk([term._replace(weight=1.0) for term in terms], gradient=True):
        grad = chunk.grad.reshape(-1).to(chunk.difference.dtype)
        found[chunk.term] += torch.dot(chunk.difference.reshape(-1), grad).to(found)
    return found


def slope(terms: Sequence[Term], low_rank: Sequence[LowRankEntry], backend: Backend) -> Tensor:
    """⟨g, θ − θ0⟩ over all that is pulled; over all ranks where the model is sharded.

    For adapters that began at 0 it is ⟨g_B, B⟩, which equals ⟨g_W, s·BA⟩.

    Args:
        terms: The summands, with the model's parameters, whose gradients count.
        low_rank: Weights with adapters.
        backend: Where parameters and gradients live.

    Returns:
        Shape: [].
    """
    ups = [product.up for entry in low_rank for product in entry.adapted.active().values()]
    terms = [*terms, *(Term(up, None) for up in ups)]
    if not backend.sharded:
        return slope_pass([term for term in terms if term.parameter.grad is not None]).sum()
    # Every rank walks through the same parameters: putting a gradient into its place may need all of them.
    found = slope_pass(
        [t._replace(parameter=backend.local(t.parameter), grad=backend.gradient(t.parameter)) for t in terms]
    )
    copies = torch.tensor([backend.copies(t.parameter) for t in terms], dtype=found.dtype, device=found.device)
    return backend.add_up(found / copies).sum()

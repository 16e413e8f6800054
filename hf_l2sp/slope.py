"""⟨∇L, θ − θ0⟩: how a loss changes along the way from θ0, from the gradients that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapted import LowRankEntry, apply_low_rank
from .backends import Backend
from .penalty import PenaltySums, Tally, Term, penalty_pass, walk


class Slope(NamedTuple):
    """What one walk over θ, θ0 and the gradients finds.

    Attributes:
        along: ⟨g, θ − θ0⟩, g being the gradients, without w. Shape: [].
        squared: Σ w‖θ − θ0‖². Shape: [].
    """

    along: Tensor
    squared: Tensor


@torch.no_grad()
def slope_pass(terms: Sequence[Term]) -> tuple[Tensor, PenaltySums]:
    """⟨g, θ − θ0⟩ of every term, g being its gradient, without w; and the sums, as `penalty_pass` finds them.

    Works in chunks, as `penalty_pass` does, without a temporary of a parameter's size.

    Returns:
        Shape of the slopes: [terms]. float64 (float32 where the device has no float64).
    """
    device = terms[0].parameter.device if terms else torch.device("cpu")
    found = torch.zeros(len(terms), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    tally = Tally(terms)
    for chunk in walk(terms, gradient=True):
        tally.add(chunk)
        grad = chunk.grad.reshape(-1).to(chunk.difference.dtype)
        found[chunk.term] += torch.dot(chunk.difference.reshape(-1), grad).to(found)
    return found, tally.sums()


def slope(terms: Sequence[Term], low_rank: Sequence[LowRankEntry], backend: Backend) -> Slope:
    """Both over all that is pulled; over all ranks where the model is sharded.

    For adapters that began at 0 the slope is ⟨g_B, B⟩, which equals ⟨g_W, s·BA⟩.

    Args:
        terms: The summands, with the model's parameters, whose gradients count.
        low_rank: Weights with adapters.
        backend: Where parameters and gradients live.
    """
    ups = [Term(product.up, None) for entry in low_rank for product in entry.adapted.active().values()]
    find = _sharded if backend.sharded else _whole
    along, squared = find(terms, backend)
    if ups:
        along = along + find(ups, backend).along.to(along)
        squared = squared + apply_low_rank(low_rank, backend, 0.0, gradient=False).total.to(squared)
    return Slope(along, squared)


def _whole(terms: Sequence[Term], backend: Backend) -> Slope:
    along, sums = slope_pass([term for term in terms if term.parameter.grad is not None])
    rest = penalty_pass([term for term in terms if term.parameter.grad is None], 0.0, gradient=False)
    return Slope(along.sum(), sums.total + rest.total.to(sums.total))


def _sharded(terms: Sequence[Term], backend: Backend) -> Slope:
    # Every rank walks through the same parameters: putting a gradient into its place may need all of them.
    along, sums = slope_pass(
        [t._replace(parameter=backend.local(t.parameter), grad=backend.gradient(t.parameter)) for t in terms]
    )
    copies = [backend.copies(term.parameter) for term in terms]
    shares = along / torch.tensor(copies, dtype=along.dtype, device=along.device)
    return Slope(backend.add_up(shares).sum(), backend.total(sums, copies).total)

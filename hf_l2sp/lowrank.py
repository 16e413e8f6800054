"""The distance ‖Σ s·BA − Σ s0·B0A0‖² of a weight that low-rank factors change, without making any product BA.

With the factors side by side, Σ s·BA = UV with U: [out, R] and V: [R, in]. Then ‖UV‖² = ⟨UᵀU, VVᵀ⟩, and its gradients
are 2U(VVᵀ) and 2(UᵀU)V: R × R products instead of an out × in one. Pure tensor functions; they know nothing of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Product(NamedTuple):
    """The matrix scale · up @ down; in the words of LoRA, up is B and down is A.

    All dimensions of a factor but the first count as one: a convolution has B: [out, r, 1, 1] and A: [r, in, h, w]. A
    vector is a matrix with one column: `up` is what is added to a bias where `down` is a one, [1].

    Attributes:
        up: B. Shape: [out, r].
        down: A. Shape: [r, in].
        scale: s.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0


class LowRank(NamedTuple):
    """One summand ‖Σ products − Σ starts − Σ gone‖²: the distance of one adapted weight from its θ0.

    Attributes:
        products: What is added to the base weight now.
        starts: For each product what it was in θ0, or None where θ0 has nothing of it; empty: None for all.
        gone: Products in θ0 that have no counterpart now.
        rows: Leading rows of the weight [out, in] that are measured; None: all.
        columns: Leading columns that are measured; None: all.
    """

    products: tuple[Product, ...]
    starts: tuple[Product | None, ...] = ()
    gone: tuple[Product, ...] = ()
    rows: int | None = None
    columns: int | None = None


class LowRankPass(NamedTuple):
    """What `lowrank_pass` found.

    Attributes:
        squared: The distance, before any λ. Shape: [].
        gradients: For each product those of B and A, in their shapes and in at least float32, of frozen ones, too.
    """

    squared: Tensor
    gradients: tuple[tuple[Tensor, Tensor], ...]


@torch.no_grad()
def lowrank_pass(term: LowRank, coefficient: float | Tensor = 1.0) -> LowRankPass:
    """The distance and `coefficient` times its gradients, which are returned and not added anywhere.

    Everything is computed in float64 (float32 where the device has none): the factors are small, and neither TF32 nor
    autocast touches float64. Temporary memory is O(r · (out + in)).

    Args:
        term: The summand; its tensors are whole, not shards.
        coefficient: λw, and the loss scale if there is one. Shape: [], if a tensor.

    Returns:
        The distance and the gradients.
    """
    stack = _stack(term)
    return LowRankPass(stack.squared(), stack.gradients(coefficient))


def lowrank_squared(term: LowRank) -> Tensor:
    """The distance, differentiable (also twice) by every B and A in `term.products`.

    Args:
        term: The summand; its tensors are whole, not shards.

    Returns:
        ‖Σ s·BA − Σ s0·B0A0‖². Shape: []. float64 (float32 where the device has none).
    """
    squared: Callable[..., Tensor] = _Squared.apply
    return squared(term, *_factors(term))


def _factors(term: LowRank) -> list[Tensor]:
    return [factor for product in term.products for factor in (product.up, product.down)]


class _Stack(NamedTuple):
    """U and V, their Gram matrices, and where in U and V the parts of each product are."""

    term: LowRank
    up: Tensor
    down: Tensor
    up_gram: Tensor
    down_gram: Tensor
    places: list[list[slice]]

    def squared(self) -> Tensor:
        return (self.up_gram * self.down_gram).sum()

    def gradients(self, coefficient: float | Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(self.up.device)
        found = []
        for product, places in zip(self.term.products, self.places, strict=True):
            # B is in the first part of its product alone, A in all of them.
            by_up = self.up @ (self.down_gram[:, places[0]] * (2.0 * product.scale * coefficient))
            rows = self.up_gram[places[0]]
            for place in places[1:]:
                rows = rows + self.up_gram[place]
            by_down = (rows * (2.0 * coefficient)) @ self.down
            found.append((_like(product.up, by_up), _like(product.down, by_down)))
        return tuple(found)


def _stack(term: LowRank) -> _Stack:
    """Puts the parts of Σ s·BA − Σ s0·B0A0 side by side.

    A product with a start has two parts, [s·dB, s0·B0] and [A; dA] with dB = B − B0 and dA = A − A0 (where s ≠ s0 the
    first is s·dB + (s − s0)·B0). Near the start this keeps all digits; [s·B, −s0·B0] and [A; A0] would cancel.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    places: list[list[slice]] = []
    width = 0
    for product, start in zip(term.products, term.starts or [None] * len(term.products), strict=True):
        up, down = _wide(product.up), _wide(product.down)
        rank = up.shape[1]
        if start is None:
            ups.append(up * product.scale)
            downs.append(down)
        else:
            up0, down0 = _wide(start.up, up.device), _wide(start.down, up.device)
            moved = (up - up0) * product.scale
            if product.scale != start.scale:
                moved = moved + up0 * (product.scale - start.scale)
            ups += [moved, up0 * start.scale]
            downs += [down, down - down0]
        parts = 1 if start is None else 2
        places.append([slice(width + i * rank, width + (i + 1) * rank) for i in range(parts)])
        width += parts * rank
    for product in term.gone:
        device = ups[0].device if ups else None
        ups.append(_wide(product.up, device) * -product.scale)
        downs.append(_wide(product.down, device))
    if not ups:
        ups, downs = [torch.zeros(1, 1, dtype=torch.float64)], [torch.zeros(1, 1, dtype=torch.float64)]
    up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
    down = downs[0] if len(downs) == 1 else torch.cat(downs, 0)
    up, down = up[: term.rows], down[:, : term.columns]
    return _Stack(term, up, down, up.T @ up, down @ down.T, places)


def _wide(factor: Tensor, device: torch.device | None = None) -> Tensor:
    """The factor as a matrix in the dtype of the computation."""
    device = factor.device if device is None else device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return factor.reshape(factor.shape[0], -1).to(device=device, dtype=dtype)


def _like(factor: Tensor, gradient: Tensor) -> Tensor:
    gradient = gradient.to(torch.promote_types(factor.dtype, torch.float32))
    rows, columns = factor.shape[0], factor.numel() // factor.shape[0]
    if gradient.shape != (rows, columns):  # what is not measured feels nothing
        gradient = nn.functional.pad(gradient, (0, columns - gradient.shape[1], 0, rows - gradient.shape[0]))
    return gradient.view(factor.shape)


class _Squared(torch.autograd.Function):
    """The distance, whose graph keeps the factors as they are instead of float64 copies of all of them."""

    @staticmethod
    def forward(ctx: Any, term: LowRank, *factors: Tensor) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(*factors)
        return _stack(term).squared()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors
        products = tuple(
            Product(up, down, product.scale)
            for product, up, down in zip(ctx.term.products, factors[::2], factors[1::2], strict=True)
        )
        gradients = _stack(ctx.term._replace(products=products)).gradients(grad_output)
        flat = [gradient for pair in gradients for gradient in pair]
        return None, *(gradient.to(factor.dtype) for gradient, factor in zip(flat, factors, strict=True))

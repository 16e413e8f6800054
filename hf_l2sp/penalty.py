"""The penalty Σ w‖θ − θ0‖²: one chunked pass for value and gradient, and a differentiable form.

Pure tensor functions; they know nothing of trainers, checkpoints or devices' backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .streaming import Stager

if TYPE_CHECKING:
    from .anchor import Anchor

# Elements per chunk: the buffer of 1 MiB in float32 stays in a core's cache, the overhead per chunk is small, and
# dot products of this length in float32 keep the relative error of the value below 1e-6
# (recipes/benchmarks/speed.py).
CHUNK = 1 << 18
# On an accelerator each chunk costs a few kernel launches: 16 MiB, not measured yet.
DEVICE_CHUNK = 1 << 22


class Term(NamedTuple):
    """One summand w‖θ − θ0‖².

    Attributes:
        parameter: θ; its `.grad` receives the gradient.
        anchor: θ0, or None for a pull to zero.
        weight: w, a number or a tensor of θ0's shape.
        rows: Leading rows of θ that are pulled; None: all.
        grad: The gradient to add to, of θ's shape; None: `parameter.grad`.
    """

    parameter: Tensor
    anchor: Tensor | None
    weight: float | Tensor = 1.0
    rows: int | None = None
    grad: Tensor | None = None


class PenaltySums(NamedTuple):
    """What one pass found, before any λ.

    Attributes:
        weighted: w‖θ − θ0‖² of every term. Shape: [terms].
        squared: ‖θ − θ0‖² of every term, without w. Shape: [terms].
    """

    weighted: Tensor
    squared: Tensor

    @property
    def total(self) -> Tensor:
        """Σ w‖θ − θ0‖². Shape: []."""
        return self.weighted.sum()


@torch.no_grad()
def penalty_pass(
    terms: Sequence[Term], coefficient: float, gradient: bool = True, grad_scale: Tensor | None = None
) -> PenaltySums:
    """Adds coefficient · 2w(θ − θ0) to the gradients and returns the sums, reading every number once.

    Works through one buffer of `CHUNK` elements (`DEVICE_CHUNK` on an accelerator): no autograd graph, no temporary of
    a parameter's size. The difference is taken first, in float32 (float64 for float64 parameters): 2λθ − 2λθ0 would
    cancel near θ0.

    Args:
        terms: The summands.
        coefficient: λ.
        gradient: Whether to touch gradients at all; False only measures. They are not touched either where
            `coefficient` is 0, since 0·inf is NaN.
        grad_scale: The factor by which the loss was scaled before backward (GradScaler). Shape: [], on device, so
            that the host need not wait for it.

    Returns:
        The sums, float64 on the first term's device (float32 where the device has no float64).
    """
    gradient = gradient and coefficient != 0.0
    tally = Tally(terms)
    for chunk in walk(terms, gradient):
        tally.add(chunk)
        if gradient:
            if grad_scale is not None:
                chunk.pull.mul_(grad_scale.to(chunk.pull.device))
            chunk.grad.add_(chunk.pull, alpha=2.0 * coefficient * chunk.scalar)
    return tally.sums()


class Chunk(NamedTuple):
    """A piece of one term, on its way through the buffer.

    Attributes:
        term: Which term.
        theta: The live θ.
        grad: The live gradient; θ itself where none is wanted.
        difference: θ − θ0, in the buffer, which the next chunk reuses.
        pull: w(θ − θ0), up to `scalar`; may be `difference` itself.
        scalar: w where it is a number; 1 where it is a tensor.
    """

    term: int
    theta: Tensor
    grad: Tensor
    difference: Tensor
    pull: Tensor
    scalar: float


def walk(terms: Sequence[Term], gradient: bool = False) -> Iterator[Chunk]:
    """All terms, chunk by chunk, through one buffer.

    Args:
        terms: The summands.
        gradient: Whether gradients are wanted.
    """
    pieces = [_Piece(index, *piece) for index, term in enumerate(terms) for piece in _pieces(term, gradient)]
    stagers = _stagers(pieces)
    buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for index, theta, anchor, weight, grad in pieces:
        dtype = torch.promote_types(theta.dtype, torch.float32)
        scratch = buffers.setdefault((theta.device, dtype), [])
        if theta.device in stagers and _is_elsewhere(anchor, theta):
            anchor = stagers[theta.device].take()
        difference = _difference(theta, anchor, _buffer(scratch, 0, theta, dtype))
        if weight is None:
            yield Chunk(index, theta, grad, difference, difference, float(terms[index].weight))
        else:
            pull = torch.mul(difference, weight, out=_buffer(scratch, 1, theta, dtype))
            yield Chunk(index, theta, grad, difference, pull, 1.0)


class Tally:
    """Adds up w‖θ − θ0‖² and ‖θ − θ0‖² of chunks, without waiting for the device."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._plain: list[Tensor] = []
        self._weighted: list[Tensor] = []
        self._owner: list[int] = []

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk, before anything is done to it."""
        flat = chunk.difference.view(-1)
        plain = torch.dot(flat, flat)
        weighted = plain if chunk.pull is chunk.difference else torch.dot(flat, chunk.pull.view(-1))
        self._plain.append(plain)
        self._weighted.append(weighted if chunk.scalar == 1.0 else weighted * chunk.scalar)
        self._owner.append(chunk.term)

    def sums(self) -> PenaltySums:
        """The sums, float64 on the first term's device (float32 where the device has no float64)."""
        device = self._terms[0].parameter.device if self._terms else torch.device("cpu")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(2, len(self._terms), dtype=dtype, device=device)
        if self._plain:
            index = torch.tensor(self._owner, device=device)
            for row, parts in zip(sums, (self._weighted, self._plain), strict=True):
                row.index_add_(0, index, torch.stack([part.to(device, dtype) for part in parts]))
        return PenaltySums(sums[0], sums[1])


class _Piece(NamedTuple):
    """At most a chunk of one term; without a gradient to add to, `grad` is θ."""

    term: int
    theta: Tensor
    anchor: Tensor | None
    weight: Tensor | None
    grad: Tensor


def _pieces(term: Term, gradient: bool) -> Iterator[list[Any]]:
    theta = term.parameter.detach()
    grad = _gradient(term) if gradient else theta
    if term.rows is not None:
        theta, grad = theta[: term.rows], grad[: term.rows]
    size = CHUNK if theta.device.type == "cpu" else DEVICE_CHUNK
    return _chunks(size, theta, term.anchor, term.weight if isinstance(term.weight, Tensor) else None, grad)


def _is_elsewhere(anchor: Tensor | None, theta: Tensor) -> bool:
    return anchor is not None and anchor.device != theta.device


def _stagers(pieces: Sequence[_Piece]) -> dict[torch.device, Stager]:
    """By device, what brings the pieces of θ0 that are on the host."""
    waiting: dict[torch.device, list[Tensor]] = {}
    for piece in pieces:
        if _is_elsewhere(piece.anchor, piece.theta):
            assert piece.anchor is not None
            waiting.setdefault(piece.theta.device, []).append(piece.anchor)
    # Streams are those of accelerators like CUDA.
    return {d: Stager(p, d) for d, p in waiting.items() if hasattr(torch.get_device_module(d), "Stream")}


def _gradient(term: Term) -> Tensor:
    if term.grad is not None:
        return term.grad
    parameter = term.parameter
    if parameter.grad is None:
        # As autograd would: a parameter that the task does not reach still feels the penalty.
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout != torch.strided:
        # The pull is dense; sparse + dense is dense under autograd, too.
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _buffer(scratch: list[Tensor], slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    size = CHUNK if like.device.type == "cpu" else DEVICE_CHUNK
    while len(scratch) <= slot:
        scratch.append(torch.empty(size, dtype=dtype, device=like.device))
    return scratch[slot][: like.numel()].view(like.shape)


def _difference(theta: Tensor, anchor: Tensor | None, out: Tensor) -> Tensor:
    if anchor is None:
        return out.copy_(theta)
    if theta.dtype == out.dtype and anchor.dtype == out.dtype and anchor.device == theta.device:
        return torch.sub(theta, anchor, out=out)
    # bfloat16 or offloaded θ0 comes into the buffer first; a − b = −(b − a) exactly.
    return out.copy_(anchor, non_blocking=True).sub_(theta).neg_()


def _chunks(size: int, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """Aligned pieces of at most `size` elements of tensors of one shape; None stays None."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if first.numel() == 0:
        return
    if all(t.is_contiguous() for t in present):
        flat = [None if t is None else t.view(-1) for t in tensors]
        for start in range(0, first.numel(), size):
            yield [None if t is None else t[start : start + size] for t in flat]
    elif first.numel() <= size:
        yield list(tensors)
    elif first.numel() > size * first.shape[0]:  # a single row is too long
        for row in range(first.shape[0]):
            yield from _chunks(size, *(None if t is None else t[row] for t in tensors))
    else:
        step = size * first.shape[0] // first.numel()
        for start in range(0, first.shape[0], step):
            yield [None if t is None else t[start : start + step] for t in tensors]


class _SquaredDistance(torch.autograd.Function):
    """Σ w(θ − θ0)² of one parameter, whose graph keeps θ and θ0 instead of temporaries."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, anchor: Tensor | None, weight: float | Tensor, rows: int | None) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.rest = (anchor, weight, rows)
        sums = penalty_pass([Term(theta, anchor, weight, rows)], 1.0, gradient=False)
        return sums.total.to(torch.promote_types(theta.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (theta,) = ctx.saved_tensors
        anchor, weight, rows = ctx.rest
        dtype = torch.promote_types(theta.dtype, torch.float32)
        pulled = (theta if rows is None else theta[:rows]).to(dtype)
        difference = pulled if anchor is None else pulled - anchor.to(device=theta.device, dtype=dtype)
        gradient = (2.0 * grad_output.to(device=theta.device, dtype=dtype)) * (difference * weight)
        if rows is not None:
            rest = gradient.new_zeros((theta.shape[0] - rows, *theta.shape[1:]))
            gradient = torch.cat([gradient, rest])
        return gradient.to(theta.dtype), None, None, None


def l2sp_penalty(
    model: nn.Module,
    anchor: Anchor,
    weights: Mapping[str, float | Tensor] | None = None,
    beta: float = 0.0,
) -> Tensor:
    """The differentiable penalty Σ w‖θ − θ0‖² + β‖θ_new‖², for training loops of your own.

    There is no λ and no ½ in it: add `l2sp_lambda * l2sp_penalty(model, anchor)` to the loss once per optimizer
    step. Parameters that are frozen now are left out.

    Args:
        model: The model that the anchor was taken from, wrapped or not.
        anchor: θ0.
        weights: w, as regular expression → number or parameter name → tensor; None: those of the anchor's plan.
        beta: Weight of the squared norm of trainable parameters without a pretrained value.

    Returns:
        The penalty, summed in float64 per parameter. Shape: []. float32, or float64 with float64 parameters.

    Raises:
        ValueError: The anchor belongs to another model, weights do not match, or nothing is anchored.

    Source: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks", 2018 (arXiv 1802.01483), eq. 3.
    """
    from .adapted import low_rank_penalty

    terms, new, low_rank = anchor.terms_for(model, weights)
    squared: Callable[..., Tensor] = _SquaredDistance.apply
    total: Tensor | None = None
    for scale, group in ((1.0, terms), (beta, new if beta else [])):
        for term in group:
            theta = anchor.backend.differentiable(term.parameter)
            value = squared(theta, term.anchor, term.weight, term.rows)
            share = scale / anchor.backend.copies(term.parameter)
            value = value * share if share != 1.0 else value
            total = value if total is None else total + value.to(total.device)
    for entry, weight in low_rank:
        value = low_rank_penalty(entry, weight, anchor.backend)
        total = value if total is None else total + value.to(total.device)
    if total is None:
        raise ValueError("l2sp_penalty found no trainable parameter with an anchor; unfreeze some, or leave it out.")
    return anchor.backend.across_ranks(total)

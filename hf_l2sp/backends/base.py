"""What every launch asks of a backend, and the answers of one process, DDP and DataParallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..penalty import PenaltySums, Term, penalty_pass
from .whole import full_shape

Found = TypeVar("Found")


class Region(NamedTuple):
    """What a rank holds of a parameter: a block of it, or a range of its flattened elements; both None: all of it."""

    block: tuple[slice, ...] | None = None
    flat: slice | None = None

    def cut(self, full: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape, or of its leading rows."""
        if self.block is not None:
            return full[self.block]
        return full if self.flat is None else full.reshape(-1)[self.flat]

    def leading(self, rows: int, shape: Sequence[int]) -> int:
        """How many of the first rows (of the flattened elements, in a range) belong to the first rows of it all."""
        if self.block is not None:
            start, stop, _ = self.block[0].indices(shape[0])
            return max(0, min(rows, stop) - start)
        if self.flat is None:
            return rows
        start, stop, _ = self.flat.indices(math.prod(shape))
        return max(0, min(rows * math.prod(shape[1:]), stop) - start)


WHOLE = Region()
NOTHING = Region(flat=slice(0, 0))


class Backend:
    """Every rank holds every parameter and gradient: one process, DDP, DataParallel."""

    # As users call it.
    kind = "DDP"
    # Whether ranks hold different parts, so that sums have to be added up.
    sharded = False
    # Whether the parts exist only once `accelerator.prepare` has run.
    late = False
    # Whether the optimizer steps within `accelerator.backward`.
    steps_in_backward = False

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that talks to the user."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def prepared(self, model: nn.Module) -> bool:
        """Whether the bare model has its parts by now."""
        return True

    def attach(self, model: nn.Module) -> None:
        """Learns where the parts of a prepared model are."""

    def local(self, parameter: Tensor) -> Tensor:
        """θ as far as this rank holds it, in the precision that the optimizer updates; shares its memory."""
        return parameter.detach()

    def region(self, parameter: Tensor) -> Region:
        """Which part of the parameter this rank holds."""
        return WHOLE

    def copies(self, parameter: Tensor) -> int:
        """How many ranks hold the same part."""
        return 1

    def differentiable(self, parameter: Tensor) -> Tensor:
        """θ as far as this rank holds it, with a graph that leads to the parameter."""
        return parameter

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return full_shape(parameter)

    def gather(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """All of each parameter, detached, on every rank; meant for small ones."""
        if not self.sharded:
            return [parameter.detach() for parameter in parameters]
        found: list[Tensor] = []
        parts: dict[int, Tensor] = {}
        for index, parameter in enumerate(parameters):
            # What is no parameter (a buffer of PEFT) is never sharded.
            found.append(self.local(parameter) if isinstance(parameter, nn.Parameter) else parameter)
            region = self.region(parameter) if isinstance(parameter, nn.Parameter) else WHOLE
            if region is not WHOLE:
                # In float64, a value of which three ranks give a third each comes back as it was.
                part = torch.zeros(self.shape(parameter), dtype=torch.float64, device=self.accelerator.device)
                region.cut(part).copy_(found[index].double() / self.copies(parameter))
                parts[index] = part
        if parts:
            summed = self.add_up(torch.cat([part.view(-1) for part in parts.values()]))
            pieces = summed.split([part.numel() for part in parts.values()])
            for (index, part), piece in zip(parts.items(), pieces, strict=True):
                found[index] = piece.view(part.shape).to(found[index].dtype)
        return found

    def add_to_gradients(self, pulls: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds this rank's part of whole gradients to those that the optimizer will read.

        Args:
            pulls: Parameter and gradient. Shape: both that of the whole parameter.
        """
        changed = []
        for parameter, pull in pulls:
            grad = self.gradient(parameter)
            grad.add_(self.region(parameter).cut(pull).to(grad).view(grad.shape))
            changed.append((parameter, Term(self.local(parameter), None, grad=grad)))
        self.put_back(changed)

    def grad_scale(self) -> Tensor | None:
        """The factor by which the loss was scaled before backward; stays on the device."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        scaled: Tensor = scaler.scale(torch.ones((), device=self.accelerator.device))
        return scaled

    def apply(self, terms: Sequence[Term], coefficient: float, gradient: bool = True) -> PenaltySums:
        """`penalty_pass` over terms whose parameters are the model's; the sums are those over all ranks.

        Args:
            terms: The summands; anchors, weights and rows are already those of this rank.
            coefficient: λ.
            gradient: Whether to add to the gradients.
        """
        scale = self.grad_scale() if gradient else None
        if not self.sharded:
            return penalty_pass(terms, coefficient, gradient=gradient, grad_scale=scale)
        gradient = gradient and coefficient != 0.0
        parts = [
            term._replace(
                parameter=self.local(term.parameter), grad=self.gradient(term.parameter) if gradient else None
            )
            for term in terms
        ]
        sums = penalty_pass(parts, coefficient, gradient=gradient, grad_scale=scale)
        if gradient:
            self.put_back([(term.parameter, part) for term, part in zip(terms, parts, strict=True)])
        return self.total(sums, [self.copies(term.parameter) for term in terms])

    def gradient(self, parameter: Tensor) -> Tensor:
        """This rank's part of the gradient that the optimizer will read; zeros are put in where there is none."""
        if parameter.grad is None:
            # As autograd would: a parameter that the task does not reach still feels the penalty.
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def put_back(self, parts: Sequence[tuple[Tensor, Term]]) -> None:
        """Tells the engine of gradients that have changed, where it does not look at them itself."""

    def total(self, sums: PenaltySums, copies: Sequence[int]) -> PenaltySums:
        """Sums over all ranks, with what several of them hold counted once."""
        if not self.sharded or not dist.is_initialized():
            return sums
        both = torch.stack([sums.weighted, sums.squared])
        both = self.add_up(both / torch.tensor(copies, dtype=both.dtype, device=both.device))
        return PenaltySums(both[0], both[1])

    def add_up(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if not self.sharded or not dist.is_initialized():
            return values
        moved = values.to(self.accelerator.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def across_ranks(self, total: Tensor) -> Tensor:
        """Sum over all ranks of each rank's own sum; the gradient stays with that."""
        return total + (self.add_up(total.detach()) - total.detach()) if self.sharded else total

    def agree(self, find: Callable[[], Found]) -> Found:
        """What `find` returns or raises, the same on all ranks even where only the first one holds weights."""
        return find()

    def writing(self) -> dict[str, Any]:
        """How the ranks share files of θ0: part and rank of this one, whether it writes, how to wait for the rest."""
        if self.processes == 1:
            return {}
        part = (dist.get_rank(), dist.get_world_size()) if self.sharded else (0, 1)
        writes = self.sharded or self.accelerator.is_local_main_process
        return {
            "part": part,
            "rank": dist.get_rank(),
            "writes": writes,
            "wait": self.accelerator.wait_for_everyone,
        }

    def before_step(self, callback: Callable[[], None]) -> None:
        """Calls back before each optimizer step that the engine takes within backward."""


def not_differentiable(kind: str) -> ValueError:
    return ValueError(
        f"Under {kind} the penalty has no autograd graph outside a training step: the parameters' parts are not what "
        "the model computes with. Let train() run the steps, or use FSDP2 or DDP."
    )

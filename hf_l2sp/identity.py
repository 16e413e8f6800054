"""The identity of a tensor of θ0: shape and float64 sums, the same however they were added up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .penalty import CHUNK

# Sums are compared on grids: far coarser than the float64 rounding that depends on the order of summation (threads,
# shards), and fine enough to see one changed weight among millions. Σ x is measured against ‖x‖, about as large as
# the sum of a matrix with mean 0.
_SUM_BITS, _SQUARES_BITS = 27, 32


class EntrySums(NamedTuple):
    """Identity of one tensor of θ0: shape, Σ x and Σ x², summed in float64."""

    shape: tuple[int, ...]
    total: float
    squared: float

    @property
    def identity(self) -> tuple[tuple[int, ...], int, int]:
        """Shape and both sums in units of their grids: equal for equal tensors, however they were summed up."""
        norm = math.sqrt(self.squared)
        return self.shape, _on_grid(self.total, norm, _SUM_BITS), _on_grid(self.squared, self.squared, _SQUARES_BITS)

    def agrees_with(self, other: EntrySums) -> bool:
        """Whether both are sums of one tensor; unlike on the grid, no rounding can fall between two steps."""
        return (
            self.shape == other.shape
            and abs(self.total - other.total) <= math.sqrt(self.squared) * 2.0**-_SUM_BITS
            and abs(self.squared - other.squared) <= self.squared * 2.0**-_SQUARES_BITS
        )


def _on_grid(value: float, size: float, bits: int) -> int:
    if size == 0.0 or not math.isfinite(size):
        return 0
    # The odd factor keeps round sizes (a norm's weights that are all 1) off the steps of the exponent.
    return round(math.ldexp(value, bits - math.frexp(1.2345 * size)[1]))


def tensor_sums(tensor: Tensor) -> Tensor:
    """Σ x and Σ x², in float64 where the device has it. Shape: [2]."""
    flat = tensor.detach().reshape(-1)
    dtype = torch.float32 if flat.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=dtype, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to(dtype)
        sums[0] += part.sum()
        sums[1] += torch.dot(part, part)
    return sums

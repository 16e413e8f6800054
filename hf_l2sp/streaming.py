"""Brings an offloaded θ0 to the device one piece ahead of the computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Stager:
    """Copies pieces of θ0 from the host to a device on a stream of its own, two buffers in turn.

    While the device computes with one piece, the next one is on its way. Copies from pinned memory overlap with the
    computation; from other memory (a mapped file) they are right as well, and wait.

    Args:
        pieces: The pieces in the order in which they will be taken.
        device: Where they go.
    """

    def __init__(self, pieces: Sequence[Tensor], device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._pieces = pieces
        size = max(piece.numel() for piece in pieces)
        dtypes = {piece.dtype for piece in pieces}
        self._buffers = [{d: torch.empty(size, dtype=d, device=device) for d in dtypes} for _ in range(2)]
        self._stream = self._module.Stream(device=device)
        self._copied = [self._module.Event() for _ in range(2)]
        self._used = [self._module.Event() for _ in range(2)]
        self._staged: list[Tensor | None] = [None, None]
        # The buffers' memory may still be in use by what was queued before.
        self._stream.wait_stream(self._module.current_stream(device))
        self._device = device
        self._next = 0
        self._fetch(0)

    def _fetch(self, index: int) -> None:
        if index >= len(self._pieces):
            return
        slot, piece = index % 2, self._pieces[index]
        if index >= 2:
            self._stream.wait_event(self._used[slot])
        buffer = self._buffers[slot][piece.dtype][: piece.numel()].view(piece.shape)
        with self._module.stream(self._stream):
            buffer.copy_(piece, non_blocking=True)
            self._copied[slot].record(self._stream)
        self._staged[slot] = buffer

    def take(self) -> Tensor:
        """The next piece, on the device; good until `take` is called again."""
        index, slot = self._next, self._next % 2
        current = self._module.current_stream(self._device)
        if index:  # what was queued since then used the piece before
            self._used[1 - slot].record(current)
        self._fetch(index + 1)
        current.wait_event(self._copied[slot])
        staged = self._staged[slot]
        assert staged is not None
        self._next += 1
        return staged

"""The pieces of an offloaded θ0 arrive in order, each buffer only after its last user."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hf_l2sp import penalty, streaming
from hf_l2sp.penalty import Term, penalty_pass


class Device:
    """Runs everything at once, and notes how far its streams had to wait for each other."""

    def __init__(self):
        self.compute = Stream(self, "compute")
        self.streams = [self.compute]
        self.active = self.compute

    def module(self):
        def make(device=None):
            self.streams.append(Stream(self, "copy"))
            return self.streams[-1]

        return SimpleNamespace(
            Stream=make, Event=lambda: Event(self), current_stream=lambda device=None: self.active, stream=self.within
        )

    @contextmanager
    def within(self, stream):
        self.active, before = stream, self.active
        try:
            yield
        finally:
            self.active = before


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self, stream):
        self.at = (stream, stream.clock)


class Stream:
    """Its clock counts what was queued; `seen` is how far it is ordered behind the other stream."""

    def __init__(self, device, name):
        self.device, self.name, self.clock, self.seen = device, name, 0, 0

    def queue(self):
        self.clock += 1
        return self.clock

    def wait_event(self, event):
        if event.at is not None and event.at[0] is not self:
            self.seen = max(self.seen, event.at[1])

    def wait_stream(self, other):
        self.seen = max(self.seen, other.clock)


@pytest.fixture
def device(monkeypatch):
    found = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda where: found.module())
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_piece_arrives_after_its_copy_and_before_the_buffer_is_used_again(device, count, monkeypatch):
    copied = {}  # buffer -> (time of the copy, time of its last use)
    fetch = streaming.Stager._fetch

    def watched(self, index):
        if index < len(self._pieces) and index >= 2:
            before = self._stream.seen
            fetch(self, index)
            assert self._stream.seen >= used[index - 2] > before  # waits for whoever computed with this buffer
        else:
            fetch(self, index)
        if index < len(self._pieces):
            copied[index] = self._stream.queue()
            self._copied[index % 2].record(self._stream)

    monkeypatch.setattr(streaming.Stager, "_fetch", watched)
    used = {}
    pieces = [
        torch.full((5 + i,), float(i), dtype=torch.bfloat16 if i % 3 == 2 else torch.float32) for i in range(count)
    ]
    stager = streaming.Stager(pieces, torch.device("cpu"))
    for index, piece in enumerate(pieces):
        staged = stager.take()
        assert torch.equal(staged, piece) and staged.data_ptr() != piece.data_ptr() and staged.dtype == piece.dtype
        assert device.compute.seen >= copied[index]
        if index + 1 < count:
            assert index + 1 in copied  # the next one is on its way already
        used[index] = device.compute.queue()
    assert len(copied) == count


def test_the_pass_is_the_same_with_and_without(device, monkeypatch):
    monkeypatch.setattr(penalty, "CHUNK", 16)
    generator = torch.Generator().manual_seed(1)

    def terms():
        generator.manual_seed(1)
        made = []
        for shape, dtype in (((7, 9), torch.float32), ((40,), torch.bfloat16), ((3,), torch.float32)):
            parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
            made.append(Term(parameter, torch.randn(shape, generator=generator).to(dtype), 1.5))
        return made

    plain, staged = terms(), terms()
    expected = penalty_pass(plain, 0.3)
    pieces = []

    def all_wait(found):
        pieces.extend(piece.anchor for piece in found)
        return {torch.device("cpu"): streaming.Stager([p.anchor for p in found], torch.device("cpu"))}

    monkeypatch.setattr(penalty, "_stagers", all_wait)
    monkeypatch.setattr(penalty, "_is_elsewhere", lambda anchor, theta: True)
    got = penalty_pass(staged, 0.3)
    assert len(pieces) == 4 + 3 + 1
    assert torch.equal(got.weighted, expected.weighted) and torch.equal(got.squared, expected.squared)
    assert all(torch.equal(a.parameter.grad, b.parameter.grad) for a, b in zip(plain, staged, strict=True))

"""A long training keeps neither memory nor tensors nor objects, and the benchmark that says so would see it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from _bench import read_results  # noqa: E402
from soak import COUNTS, EVERY, MODES, STEPS, WARM_UP, growth, in_a_process, measure, slope  # noqa: E402

from hf_l2sp import Anchor  # noqa: E402

# Resident memory wanders by 1.3 MiB from sample to sample, with plain Trainer as with L2-SP, as allocators give pages
# back or not. 4 MiB in 1,500 steps would be exceeded by a copy of θ0 (0.4 MiB) kept at each of the 15 saves, or by
# 2.8 kB kept at each step.
MEMORY_MIB = 4.0


def check_flat(plain: dict[str, Any], l2sp: dict[str, Any], warm_up: int, objects: int) -> None:
    """What L2-SP leaves is what plain Trainer leaves: an entry of the log history every ten steps."""
    samples = l2sp["samples"]
    assert growth(samples, "resident_mib", warm_up) < MEMORY_MIB
    levels = {mode: [s["tensors"] for s in run["samples"]] for mode, run in (("plain", plain), ("l2sp", l2sp))}
    assert max(levels["l2sp"]) - min(levels["l2sp"]) <= max(levels["plain"]) - min(levels["plain"])
    assert growth(samples, "objects", warm_up) <= growth(plain["samples"], "objects", warm_up) + objects
    for count in ("logs", "evaluations", "checkpoints"):
        assert l2sp[count] == plain[count] > 0, count


@pytest.mark.slow
def test_two_thousand_steps_keep_nothing() -> None:
    plain, l2sp = (in_a_process(mode) for mode in MODES)
    for run in (plain, l2sp):
        assert [sample["step"] for sample in run["samples"]] == list(range(EVERY, STEPS + 1, EVERY))
        assert run["checkpoints"] == 2  # of the 20 that were written
    check_flat(plain, l2sp, WARM_UP, objects=20)


def short(mode: str) -> dict[str, Any]:
    return measure(mode, steps=60, every=10)


def test_sixty_steps_keep_no_tensor_and_no_object() -> None:
    short("l2sp")  # what is made once per process
    check_flat(short("plain"), short("l2sp"), warm_up=20, objects=5)


def test_a_leak_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    apply = Anchor.apply

    def leaking(self: Anchor, *args: Any, **kwargs: Any) -> Any:
        kept.append((torch.ones(2), {"a": kept}))
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Anchor, "apply", leaking)
    samples = short("l2sp")["samples"]
    assert growth(samples, "tensors", 20) == 40
    assert growth(samples, "objects", 20) >= 120


def test_slope_and_growth() -> None:
    samples = [{"step": step, "tensors": 7 + max(0, step - 100) * 3} for step in range(0, 1001, 50)]
    assert slope(samples, "tensors", 100) == pytest.approx(3000)
    assert growth(samples, "tensors", 100) == 2700
    assert slope(samples[:3], "tensors", 0) == 0


def test_the_recorded_run_is_flat() -> None:
    result = read_results("soak.json")
    assert (result["steps"], result["warm_up"]) == (STEPS, WARM_UP)
    check_flat(result["plain"], result["l2sp"], WARM_UP, objects=20)
    for mode in MODES:
        samples = result[mode]["samples"]
        assert len(samples) == STEPS // EVERY
        assert result[mode]["slope_per_1000_steps"] == {name: slope(samples, name, WARM_UP) for name in COUNTS}

"""λ over time, against values computed by hand."""

from __future__ import annotations

import json
import math

import pytest

from hf_l2sp.strength import schedule_state, strength_at


@pytest.mark.parametrize("step", [0, 1, 99, 100, 1000])
@pytest.mark.parametrize("total", [0, 100])
def test_constant(step, total):
    assert strength_at("constant", 0.3, step, total) == 0.3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
        ("cosine", [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0, 0.0]),
    ],
)
def test_falling_schedules(schedule, expected):
    values = [strength_at(schedule, 0.4, step, 8) for step in (0, 2, 4, 6, 8, 11)]
    assert values == pytest.approx(expected, abs=1e-15)
    assert values[0] == 0.4  # to the bit: the first step is the base
    assert values[-1] >= 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falls_at_every_step_and_never_below_zero(schedule):
    values = [strength_at(schedule, 1.0, step, 50) for step in range(60)]
    assert all(a > b for a, b in zip(values[:50], values[1:51], strict=True))
    assert min(values) == 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_unknown_length_keeps_the_base(schedule):
    assert strength_at(schedule, 0.4, 5, 0) == 0.4
    assert strength_at(schedule, 0.4, 5, -1) == 0.4


def test_unknown_schedule():
    with pytest.raises(
        ValueError, match="l2sp_schedule='step' is unknown; choose 'constant', 'linear', 'cosine' or 'auto'"
    ):
        strength_at("step", 0.4, 5, 10)


def test_unknown_schedule_of_unknown_length():
    with pytest.raises(ValueError, match="l2sp_schedule='step' is unknown"):
        strength_at("step", 0.4, 0, 0)


def test_state_is_json_and_complete():
    state = json.loads(json.dumps(schedule_state("linear", 0.4, 2, 8)))
    assert state == {"schedule": "linear", "base": 0.4, "step": 2, "total_steps": 8, "current": pytest.approx(0.3)}

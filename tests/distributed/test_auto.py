"""λ found on two processes is the one found on one, whatever is sharded."""

from __future__ import annotations

import pytest

from hf_l2sp.auto import HELD, SMALLEST, UNKNOWN

from .test_backends import needs_equal_task, relative_error, tolerance

pytestmark = pytest.mark.distributed


def test_what_is_told_is_that_of_one_process(launch, single):
    first, second = (outcome["told"] for outcome in launch.outcomes)
    unexplained, by_heart = single.outcomes[0]["told"]
    assert first == second and unexplained != UNKNOWN and 0.0 < by_heart < 1.0
    assert first == pytest.approx([unexplained, by_heart], rel=tolerance(launch, 1e-5, 1e-2))


def test_early_pull_is_that_of_one_process(launch, single):
    """The fourth power of what is measured, with four times its rounding: the root is compared."""
    first, second = (outcome["early"] for outcome in launch.outcomes)
    expected = single.outcomes[0]["early"]
    assert first == second and len(first) == len(expected) == 6 and expected[0] > 1e-3
    assert first == pytest.approx([first[0] * max(0.0, 1 - step / (HELD * 6)) for step in range(6)], abs=SMALLEST)
    assert first[0] ** 0.25 == pytest.approx(expected[0] ** 0.25, rel=tolerance(launch, 1e-5, 5e-2))


def test_strength_is_that_of_one_process(launch, single):
    first, second = (outcome["auto"] for outcome in launch.outcomes)
    assert first == second and len(first) == 18
    expected = single.outcomes[0]["auto"]
    assert expected[0] == SMALLEST and len(set(expected)) > 3 and max(expected) > 1e-3
    needs_equal_task(launch)
    assert first == pytest.approx(expected, rel=tolerance(launch, 1e-3, 5e-2), abs=tolerance(launch, 1e-6, 1e-2))
    assert relative_error(launch.weights("auto"), single.weights("auto")) < tolerance(launch, 1e-4, 5e-2)

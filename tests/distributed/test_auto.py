"""λ found on two processes is the one found on one, whatever is sharded, and measuring changes nothing."""

from __future__ import annotations

import pytest
import torch

from hf_l2sp.auto import START

from .test_backends import needs_equal_task, relative_error, tolerance

pytestmark = pytest.mark.distributed


def test_strength_is_that_of_one_process(launch, single):
    first, second = (outcome["auto"] for outcome in launch.outcomes)
    assert first == second and len(first) == 18
    expected = single.outcomes[0]["auto"]
    assert expected[0] == pytest.approx(START) and len(set(expected)) > 3
    needs_equal_task(launch)
    assert first == pytest.approx(expected, rel=tolerance(launch, 1e-3, 5e-2), abs=1e-9)
    assert relative_error(launch.weights("auto"), single.weights("auto")) < tolerance(launch, 1e-4, 5e-2)


def test_measuring_leaves_nothing_behind(launch):
    """With a rule that says what it was told, the weights are those of a constant λ, bit for bit."""
    measured, expected = launch.weights("measured"), launch.weights("not_measured")
    assert all(torch.equal(value, expected[name]) for name, value in measured.items())

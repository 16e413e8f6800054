"""λ found on two processes is the one found on one, whatever is sharded; DeepSpeed is refused."""

from __future__ import annotations

import pytest

from hf_l2sp.auto import SMALLEST

from .test_backends import needs_equal_task, relative_error

pytestmark = pytest.mark.distributed


def test_deepspeed_is_refused_on_every_rank(launch):
    if not launch.by_deepspeed:
        pytest.skip("gradients can be measured here")
    for outcome in launch.outcomes:
        assert "l2sp_schedule='auto' does not work with DeepSpeed" in outcome["auto"]


def test_strength_is_that_of_one_process(launch, single):
    if launch.by_deepspeed:
        pytest.skip("refused")
    first, second = (outcome["auto"] for outcome in launch.outcomes)
    assert first == second and len(first) == 12
    expected = single.outcomes[0]["auto"]
    assert expected[0] == SMALLEST and len(set(expected)) > 3
    needs_equal_task(launch)
    assert first == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert relative_error(launch.weights("auto"), single.weights("auto")) < 1e-4

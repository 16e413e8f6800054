"""The decoupled pull on two processes is that on one, whatever is sharded; where the engine steps it is refused."""

from __future__ import annotations

import pytest

from .test_backends import needs_equal_task, relative_error

pytestmark = pytest.mark.distributed


def test_deepspeed_is_refused_on_every_rank(launch):
    if not launch.by_deepspeed:
        pytest.skip("the optimizer can be hooked here")
    for outcome in launch.outcomes:
        assert "l2sp_mode='decoupled' does not work with DeepSpeed" in outcome["decoupled"]


def test_trajectory_is_that_of_one_process(launch, single):
    if launch.by_deepspeed:
        pytest.skip("refused")
    needs_equal_task(launch)
    assert relative_error(launch.weights("decoupled"), single.weights("decoupled")) < 1e-5


def test_logged_penalty_is_that_of_one_process_on_every_rank(launch, single):
    if launch.by_deepspeed:
        pytest.skip("refused")
    first, second = (outcome["decoupled"] for outcome in launch.outcomes)
    assert len(first) == 6 and first[-1]["l2sp_distance"] > 0.01
    for a, b in zip(first, second, strict=True):
        assert a["l2sp_penalty"] == b["l2sp_penalty"] and a["l2sp_distance"] == b["l2sp_distance"]
        assert a["loss"] == a["task_loss"]
    needs_equal_task(launch)
    for got, expected in zip(first, single.outcomes[0]["decoupled"], strict=True):
        for key in ("l2sp_penalty", "l2sp_distance", "loss", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6)


def test_the_pull_was_felt(single):
    """Without it the last distance is larger by far: the runs differ from those of the penalty in the loss."""
    assert relative_error(single.weights("decoupled"), single.weights("plain")) > 1e-3


def test_resumed_as_far_as_plain_is(launch):
    if not launch.has("decoupled_resumed"):
        pytest.skip("refused, or plain Trainer cannot resume under this launch either")
    plain = relative_error(launch.weights("plain_resumed"), launch.weights("plain"))
    resumed = relative_error(launch.weights("decoupled_resumed"), launch.weights("decoupled"))
    assert resumed == 0.0 if plain == 0.0 else resumed < 10 * plain

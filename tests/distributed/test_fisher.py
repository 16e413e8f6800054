"""w and α of two processes are those of one; where the model is sharded both are refused."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from .test_backends import relative_error

pytestmark = pytest.mark.distributed


def needs_whole_models(launch) -> None:
    if launch.backend != "ddp":
        pytest.skip("no process has all of the model")


def test_weights_are_those_of_one_process(launch, single):
    needs_whole_models(launch)
    files = [load_file(at.folder / "weighed" / "l2sp_fisher.safetensors") for at in (launch, single)]
    assert relative_error(*files) < 1e-5
    assert relative_error(launch.weights("weighed"), single.weights("weighed")) < 1e-5
    first, second = (outcome["weighed"] for outcome in launch.outcomes)
    assert [log["l2sp_penalty"] for log in first] == [log["l2sp_penalty"] for log in second]


def test_choice_of_alpha_is_that_of_one_process(launch, single):
    needs_whole_models(launch)
    first, second = (outcome["chosen"] for outcome in launch.outcomes)
    expected = single.outcomes[0]["chosen"]
    assert first == second and first["alpha"] == expected["alpha"]
    # Trainer fills the last batch of an evaluation up, so that the losses of two processes are others.
    assert first["scores"] == pytest.approx(expected["scores"], rel=0.05)
    assert relative_error(launch.weights("chosen"), single.weights("chosen")) < 1e-5


def test_sharded_models_are_refused_on_every_rank(launch):
    if launch.backend == "ddp":
        pytest.skip("every process has all of the model")
    for outcome in launch.outcomes:
        assert "l2sp_fisher_samples=9 does not work with" in outcome["weighed"]
        assert "select_interpolation does not work with" in outcome["chosen"]

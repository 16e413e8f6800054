"""Two processes under torchrun's launcher: one of them or everything is killed, and what is resumed is the same."""

from __future__ import annotations

import json
import os
import signal

import pytest

from hf_l2sp.checkpoints import why_incomplete

from ..exactness.killing import Worker, assert_same, marked

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def whole(worker, tiny_bert_dir, tmp_path_factory):
    """The uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = worker.run(out, tiny_bert_dir, processes=2)
    assert done["status"] == 0 and "error" not in done, done["log"][-3000:]
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(os.listdir(out / "checkpoint-4"))
    return out


def ended_by_launcher(done) -> bool:
    """It has failed, and so has the other process, by itself for want of its peer or ended by the launcher."""
    failed = os.waitstatus_to_exitcode(done["status"]) == 1 and "ChildFailedError" in done["log"]
    return failed and not done["survivors"]


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(worker, whole, tiny_bert_dir, tmp_path):
    out = tmp_path / "cut"
    last = out / "checkpoint-4"
    assert ended_by_launcher(worker.run(out, tiny_bert_dir, processes=2, step=3, rank=1))
    # Rank 1 dies before it has saved its random numbers; rank 0 is done with its part and waits for it.
    kill = {"save": 4, "event": 1, "rank": 1, "wait_for": "trainer_state.json"}
    torn = worker.run(out, tiny_bert_dir, processes=2, resume=True, **kill)
    assert ended_by_launcher(torn)
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 4
    assert "rng_state_0.pth" in os.listdir(last) and "rng_state_1.pth" not in os.listdir(last)
    assert not marked(last) and "ended before it was done" in why_incomplete(last)
    # Everything at once, the launcher too.
    killed = worker.run(out, tiny_bert_dir, processes=2, step=5, resume=True)
    assert os.waitstatus_to_exitcode(killed["status"]) == -signal.SIGKILL
    assert killed["log"].count(f"{last} is not complete") == 1, "said by one rank"
    assert marked(last)
    done = worker.run(out, tiny_bert_dir, processes=2, resume=True)
    assert done["status"] == 0 and done["resumed_from"] == str(last), done["log"][-3000:]
    assert_same(whole, out)


def test_what_one_rank_sees_all_refuse(worker, whole, tiny_bert_dir, tmp_path):
    """Neither rank may start to train, or wait for the other for ever."""
    done = worker.run(whole, tiny_bert_dir, processes=2, resume=str(tmp_path))
    assert done["status"] == 0 and done["error"].startswith(f"The checkpoint {tmp_path} is not complete")

"""Killed anywhere, out of disk anywhere: what is resumed ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import os
import random
import signal

import pytest

from .killing import Worker, assert_same, contents, marked

NOT_COMPLETE = "{} is not complete ("
# The weights take 99 KB, the optimizer's state 207 KB.
IN_WEIGHTS, IN_OPTIMIZER = 60_000, 150_000


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def whole(worker, tiny_bert_dir, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = worker.run(out, tiny_bert_dir)
    assert done["status"] == 0 and "error" not in done, done["log"][-2000:]
    return out


def finish(worker, out, model, **job):
    done = worker.run(out, model, resume=True, **job)
    assert done["status"] == 0 and "error" not in done, (done.get("error"), done["log"][-2000:])
    return done


def test_killed_at_every_moment_of_a_save(worker, whole, tiny_bert_dir, tmp_path):
    """One folder, killed again and again while it writes checkpoint 4, each time one event later."""
    out, last, again = tmp_path / "cut", tmp_path / "cut" / "checkpoint-4", {}
    torn = 0
    for event in range(60):
        done = worker.run(out, tiny_bert_dir, save=4, event=event, **again)
        if done["status"] != signal.SIGKILL:
            break
        assert "resumed_from" not in done
        again = {"resume": True}
        if NOT_COMPLETE.format(last) in done["log"]:
            torn += 1
            assert f"Training goes on from {out / 'checkpoint-2'}, the last complete checkpoint" in done["log"]
        # The mark is set by the last event of all, and no event comes after it.
        assert not (last / "l2sp_state.json").exists() or not marked(last)
    assert done["status"] == 0 and done["resumed_from"] == str(out / "checkpoint-2"), done["log"][-2000:]
    assert event >= 20 and torn >= event - 2
    assert_same(whole, out)


def test_killed_in_the_middle_of_files(worker, whole, tiny_bert_dir, tmp_path):
    out = tmp_path / "cut"
    kills = [
        {"at": 3, "limit": IN_WEIGHTS, "fatal": True},
        {"at": 3, "limit": IN_OPTIMIZER, "fatal": True},
        {"save": 4, "half_state": True},
    ]
    for number, kill in enumerate(kills):
        done = worker.run(out, tiny_bert_dir, resume=number > 0, **kill)
        assert done["status"] == (signal.SIGXFSZ if "limit" in kill else signal.SIGKILL), done["log"][-2000:]
        there = set(os.listdir(out / "checkpoint-4"))
        assert ("optimizer.pt" in there, "trainer_state.json" in there) == (number > 0, number > 1)
        assert not marked(out / "checkpoint-4")
    assert finish(worker, out, tiny_bert_dir)["resumed_from"] == str(out / "checkpoint-2")
    assert_same(whole, out)


def test_killed_at_random_steps(worker, whole, tiny_bert_dir, tmp_path):
    out = tmp_path / "cut"
    for step in sorted(random.Random(20180206).choices(range(1, 7), k=4)):
        begun = out.is_dir() and any(out.glob("checkpoint-*"))
        done = worker.run(out, tiny_bert_dir, step=step, resume=begun)
        assert done["status"] == signal.SIGKILL
    finish(worker, out, tiny_bert_dir)
    assert_same(whole, out)


@pytest.mark.parametrize("limit", [IN_WEIGHTS, IN_OPTIMIZER])
def test_full_disk_during_a_checkpoint(worker, whole, tiny_bert_dir, tmp_path, limit):
    out = tmp_path / "cut"
    full = worker.run(out, tiny_bert_dir, at=3, limit=limit, fatal=False)
    assert full["status"] == 0 and full["kind"] == "OSError" and full["step"] == 4
    cause = r"File too large" if limit == IN_WEIGHTS else "a file cannot be written to its end"
    assert full["error"].startswith(f"{out / 'checkpoint-4'} cannot be written: ") and cause in full["error"]
    assert f"The last complete checkpoint is {out / 'checkpoint-2'}. Free some space" in full["error"]
    assert "train(resume_from_checkpoint=True)" in full["error"]
    good = contents(out / "checkpoint-2")
    # Still full: nothing gets worse.
    again = worker.run(out, tiny_bert_dir, at=3, limit=limit, fatal=False, resume=True)
    assert again["kind"] == "OSError" and again["resumed_from"] == str(out / "checkpoint-2")
    assert contents(out / "checkpoint-2") == good == contents(whole / "checkpoint-2")
    assert finish(worker, out, tiny_bert_dir)["resumed_from"] == str(out / "checkpoint-2")
    assert_same(whole, out)


def test_full_disk_at_the_end(worker, whole, tiny_bert_dir, tmp_path):
    out = tmp_path / "cut"
    done = worker.run(out, tiny_bert_dir, at="end", limit=IN_WEIGHTS, fatal=False)
    assert done["status"] == 0 and "error" not in done
    assert done["save_error"].startswith(f"{out} cannot be written: ") and "File too large" in done["save_error"]
    assert f"The last complete checkpoint is {out / 'checkpoint-6'}" in done["save_error"]
    assert "can be saved again with save_model()" in done["save_error"]
    assert_same(whole, out)  # saved again when there was space


def test_killed_while_the_anchor_is_written(worker, tiny_bert_dir, tmp_path):
    disk = {"moved": True, "arguments": {"l2sp_anchor_offload": "disk"}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert worker.run(whole, tiny_bert_dir, **disk)["status"] == 0
    for _ in range(2):
        killed = worker.run(cut, tiny_bert_dir, at=0, limit=IN_WEIGHTS, fatal=True, **disk)
        assert killed["status"] == signal.SIGXFSZ, killed["log"][-2000:]
        assert not (cut / "_l2sp_anchor.safetensors").exists()
    assert worker.run(cut, tiny_bert_dir, step=3, **disk)["status"] == signal.SIGKILL
    # A resumed run finds θ0 there, and uses it only if it is θ0: here one that was cut off.
    anchor = cut / "_l2sp_anchor.safetensors"
    written = anchor.read_bytes()
    os.truncate(anchor, len(written) // 2)
    finish(worker, cut, tiny_bert_dir, **disk)
    assert anchor.read_bytes() == written
    assert [name for name in os.listdir(cut) if "l2sp_anchor" in name] == [anchor.name]
    assert_same(whole, cut)

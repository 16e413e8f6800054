"""Talks to `kill_worker.py`, and compares what killed and resumed runs left with what an uninterrupted one did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("kill_worker.py")
# Seconds and samples per second; and the arguments hold the name of the output folder.
CHANGING = ("runtime", "per_second")
ARGUMENTS = "training_args.bin"


class Worker:
    """A process that has imported everything and trains in forks of itself."""

    def __init__(self) -> None:
        hidden = ("ACCELERATE_", "FSDP_", "WORLD_SIZE")  # the launch of a test runner around it
        environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=WORKER.parents[2],
        )

    def run(self, out: Path, model: str, **job: Any) -> dict[str, Any]:
        """Runs a job; see `kill_worker.py`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"out": str(out), "model": model, **job}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"status"'):  # libraries may print while they are imported
                return json.loads(line)
        raise RuntimeError("the worker ended")

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def marked(folder: Path) -> bool:
    """Whether a checkpoint says that it is complete."""
    return json.loads((folder / "l2sp_state.json").read_text())["complete"]


def contents(folder: Path) -> dict[str, Any]:
    """What the files of a folder hold, by path, as far as it does not depend on time and place."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            state["log_history"] = [
                {key: value for key, value in entry.items() if not any(word in key for word in CHANGING)}
                for entry in state["log_history"]
            ]
            found[name] = state
        elif path.is_file():
            found[name] = None if path.name == ARGUMENTS else path.read_bytes()
    return found


def assert_same(whole: Path, cut: Path) -> None:
    """Weights, optimizer, scheduler, random numbers and logs are equal bit for bit, and no file is there besides."""
    expected, got = contents(whole), contents(cut)
    # The mean over a process's own steps.
    for state in (expected["trainer_state.json"], got["trainer_state.json"]):
        assert state["log_history"].pop()["train_loss"] > 0
    assert sorted(got) == sorted(expected)
    assert {"checkpoint-6/optimizer.pt", "checkpoint-6/scheduler.pt", "model.safetensors"} < set(got)
    assert len(got["trainer_state.json"]["log_history"]) == 6
    different = [name for name in got if got[name] != expected[name]]
    assert not different, different

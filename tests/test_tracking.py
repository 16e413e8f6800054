"""Trackers get what L2-SP logs: TensorBoard's event file, and trackio's calls and database."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

KEYS = {"loss", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda"}
LAYERS = {f"l2sp_drift/bert.{layer}" for layer in ("embeddings", "encoder.layer.0", "encoder.layer.1", "pooler")}


@pytest.fixture
def logged(classifier, classification_data, tmp_path) -> Callable[..., dict[int, dict[str, float]]]:
    """Function that trains for four steps with a tracker; what the trainer itself has logged, by step."""

    def train(report_to: str, **settings: Any) -> dict[int, dict[str, float]]:
        args = L2SPTrainingArguments(
            output_dir=str(tmp_path / "out"),
            report_to=report_to,
            l2sp_lambda=0.1,
            l2sp_schedule="linear",
            max_steps=4,
            logging_steps=2,
            learning_rate=1e-3,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        trainer = L2SPTrainer(model=classifier, args=args, train_dataset=classification_data)
        trainer.train()
        return {entry["step"]: entry for entry in trainer.state.log_history if "task_loss" in entry}

    return train


def check(tracked: dict[int, dict[str, float]], logged: dict[int, dict[str, float]], names: set[str]) -> None:
    """Every value of the trainer's log under `train/`, to float32; nothing of L2-SP beside the names."""
    assert set(tracked) >= set(logged) == {2, 4}
    for step, entry in logged.items():
        for name in names:
            assert tracked[step][f"train/{name}"] == pytest.approx(entry[name], rel=1e-6), (step, name)
    assert logged[4]["l2sp_distance"] > 0 and logged[2]["l2sp_lambda"] > logged[4]["l2sp_lambda"]
    ours = {name for values in tracked.values() for name in values if "l2sp" in name or "task_loss" in name}
    assert ours == {f"train/{name}" for name in names - {"loss"}}


@pytest.mark.parametrize("by_layer", [False, True])
def test_tensorboard(logged, tmp_path, by_layer):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    entries = logged("tensorboard", l2sp_log_layers=by_layer)
    (file,) = (tmp_path / "out").rglob("*tfevents*")
    events = event_accumulator.EventAccumulator(str(file.parent))
    events.Reload()
    tracked: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            tracked.setdefault(event.step, {})[tag] = event.value
    check(tracked, entries, KEYS | LAYERS if by_layer else KEYS)


# What transformers' TrackioCallback uses; each call is written down.
STAND_IN = """
import json
from types import SimpleNamespace

__version__ = "0"
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))


def _called(what, value=None):
    with open({calls!r}, "a", encoding="utf-8") as file:
        file.write(json.dumps([what, value], default=str) + "\\n")


class _Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)
        _called("config", {{name: value for name, value in values.items() if name.startswith("l2sp")}})


config = _Config()


def init(**arguments):
    _called("init", arguments)


def log(values):
    _called("log", values)


def finish():
    _called("finish")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Iterator[Path]:
    """The file that the calls of the stand-in are written to."""
    path = tmp_path / "calls.jsonl"
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(STAND_IN.format(calls=str(path)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    before = sys.modules.pop("trackio", None)
    yield path
    del sys.modules["trackio"]
    if before is not None:
        sys.modules["trackio"] = before


def test_trackio_as_it_is_called(logged, calls):
    entries = logged("trackio", l2sp_log_layers=True)
    done = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
    assert [what for what, _ in done if what != "config"][0] == "init" and done[-1][0] == "finish"
    (settings,) = (value for what, value in done if what == "config")
    assert settings["l2sp_lambda"] == 0.1 and settings["l2sp_schedule"] == "linear"
    tracked = {value["train/global_step"]: value for what, value in done if what == "log" and "train/loss" in value}
    check(tracked, entries, KEYS | LAYERS)


def test_trackio(logged, tmp_path, monkeypatch):
    """With the package itself; it is no part of any extra, as it does not go with every version of the others."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before the import, which reads it
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    if not Path(tmp_path / "trackio") == Path(sys.modules["trackio.utils"].TRACKIO_DIR):
        pytest.skip("trackio was imported before, and writes elsewhere")
    entries = logged("trackio", run_name="ours", l2sp_log_layers=True)
    (project,) = (path.stem for path in (tmp_path / "trackio").glob("*.db"))
    rows = storage.get_logs(project, "ours")
    check({row["train/global_step"]: row for row in rows if "train/loss" in row}, entries, KEYS | LAYERS)

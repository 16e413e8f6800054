"""The README's loop without `Trainer` runs as it is, and its gradients are those of the objective."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .end_to_end.recipe_harness import notes, save_tiny_model, write_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = Path("recipes", "data", "clinical_notes", "train.jsonl")


@pytest.fixture(scope="module")
def program() -> str:
    (found,) = re.findall(r"^## A loop of your own\n.*?```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    return found


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_runs_as_pasted(program, tmp_path):
    """On the embedded model; on 16 of the 160 notes, which make 2 optimizer steps of the 20."""
    assert len(program.splitlines()) <= 35
    (tmp_path / TRAIN).parent.mkdir(parents=True)
    some = (ROOT / TRAIN).read_text(encoding="utf-8").splitlines()[::10]
    (tmp_path / TRAIN).write_text("\n".join(some) + "\n", encoding="utf-8")
    found = re.search(r"LayerDrift\(parameters=(\d+), .*drift=([\d.e-]+)\)", run(tmp_path, "-c", program))
    assert found is not None and int(found[1]) == 22_713_216
    assert 1e-4 < float(found[2]) < 0.1


def test_gradients_are_those_of_the_objective(program, tmp_path):
    """At every optimizer step, the last one over a short window among them."""
    save_tiny_model(tmp_path / "embedded" / "model")
    (tmp_path / TRAIN).parent.mkdir(parents=True)
    write_jsonl(tmp_path / TRAIN, notes(per_class=12, seed=1))  # 5 micro-batches of 8 in an epoch
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    out = run(tmp_path, "-m", "tests.readme_loop_worker", "program.py", "embedded")
    steps = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [step["micro_batches"] for step in steps] == [2, 2, 1] * 2
    for step in steps[1:]:
        assert step["pull"] > 1e-6
        assert step["difference"] < 0.05 * step["pull"], step

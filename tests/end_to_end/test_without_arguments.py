"""Every recipe as a newcomer starts it: no arguments, no network, the embedded model and data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import pipeline

from .recipe_harness import RECIPES, RESULTS

# Recipe, its pipeline, a text, and a score that chance does not reach. medical_textcls is what `make demo` runs.
PROGRAMS = {
    "sentiment": (
        "text-classification",
        "The zip broke on the first day and nobody answers my mails.",
        "test_f1_macro",
    ),
    "legal_textcls": ("text-classification", "This Agreement is governed by the laws of Norway.", "test_f1_macro"),
    "clinical_ner": ("token-classification", "Started metformin 500 mg for diabetes.", "test_f1"),
    "finance_ner": ("token-classification", "Ardent Foods plc paid $3 million on Monday.", "test_f1"),
    "domain_adapt_mlm": ("fill-mask", "The patient has a [MASK].", "eval_perplexity"),
    "distill": ("text-classification", "Crushing chest pain on exertion, relieved by rest.", "test_f1_macro"),
    "lambda_search": ("text-classification", "Crushing chest pain on exertion, relieved by rest.", "test_f1_macro"),
}
CHANCE = {"sentiment": 1 / 3, "legal_textcls": 1 / 8, "clinical_ner": 0.0, "finance_ner": 0.0, "distill": 1 / 8}
CHANCE["lambda_search"] = 1 / 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_without_arguments(name: str, tmp_path: Path) -> None:
    task, text, score = PROGRAMS[name]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / f"{name}.py")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "outputs" / name
    assert {path.name for path in output.iterdir()} >= RESULTS
    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    assert score in done.stdout and "Traceback" not in done.stderr
    if name == "domain_adapt_mlm":
        assert 1 < results[score] < results["start_perplexity"]
    else:
        assert results[score] > CHANCE[name] + 0.05
    assert pipeline(task, model=str(output))(text)

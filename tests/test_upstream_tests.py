"""The benchmark that runs Hugging Face's Trainer tests, on a tests folder of two files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from upstream_tests import REASONS, differing, run, source, worst  # noqa: E402

LIMITS = argparse.Namespace(timeout=120, test_timeout=60)
MODULE = """
import pytest, torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import Trainer as SameTrainer

class Own(Trainer):
    pass

class Line(torch.nn.Module):
    config, accepts_loss_kwargs = None, False

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return (((self.a * x - labels) ** 2).mean(),)

def trained(folder):
    data = [{"x": 1.0, "labels": 2.0}] * 8
    args = TrainingArguments(folder, max_steps=3, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd",
                             report_to="none", use_cpu=True, save_strategy="no", max_grad_norm=0.0)
    trainer = Own(model=Line(), args=args, train_dataset=data)
    trainer.train()
    return trainer

def test_trains(tmp_path):
    assert trained(tmp_path).state.global_step == 3

def test_exact_weights(tmp_path):
    # One step of 0.5 reaches 2 at once, and the pull to 0 alone leads away from it.
    assert trained(tmp_path).model.a.item() == 2.0

def test_names_are_one():
    assert SameTrainer is Trainer

def test_without_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trainer(model=Line())

def test_fails_anyway():
    raise OSError("no network: /tmp/some/folder is not there")

def test_skipped():
    pytest.skip("no GPU")
"""


@pytest.fixture(scope="module")
def tests(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout") / "tests"
    folder.mkdir()
    (folder / "test_trainer.py").write_text(MODULE, encoding="utf-8")
    (folder / "test_broken.py").write_text("import no_such_module\n", encoding="utf-8")
    return folder


def test_what_only_plain_training_passes_is_found(tests):
    plain, zero, small = (run(tests, tests / "test_trainer.py", strength, LIMITS) for strength in (None, 0.0, 0.1))
    names = {test.rpartition("::")[2]: outcome for test, (outcome, _) in plain.items()}
    passing = ("test_trains", "test_exact_weights", "test_names_are_one", "test_without_arguments")
    assert names == dict.fromkeys(passing, "passed") | {"test_fails_anyway": "failed", "test_skipped": "skipped"}
    assert plain == zero and differing(plain, zero) == []
    (found,) = differing(plain, small)
    assert found["test"].endswith("::test_exact_weights") and found["outcome"] == "failed"
    assert found["why"] == "unknown" and "assert" in found["message"]
    message = plain["tests/test_trainer.py::test_fails_anyway"][1]
    assert message == "OSError: no network: PATH is not there"


def test_file_that_cannot_be_imported_has_failed(tests):
    assert [outcome for outcome, _ in run(tests, tests / "test_broken.py", None, LIMITS).values()] == ["failed"]


def test_worst_outcome_counts():
    lines = [{"test": "a", "outcome": outcome, "message": outcome} for outcome in ("passed", "failed", "skipped")]
    assert worst(lines) == {"a": ("failed", "failed")}


def test_test_that_did_not_run_differs_and_a_reason_is_told():
    (name, reason), *_ = REASONS.items()
    (found,) = differing({f"x.py::{name}": ("passed", ""), "x.py::b": ("failed", "")}, {})
    assert found == {"test": f"x.py::{name}", "outcome": "not run", "message": "", "why": reason}


def test_source_of_the_tests(tmp_path):
    (tmp_path / "src" / "transformers").mkdir(parents=True)
    assert source(tmp_path / "tests") == "unknown"
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n\nText.\n")
    assert source(tmp_path / "tests") == "some-package 1.2"
    (tmp_path / "src" / "transformers" / "__init__.py").write_text('__version__ = "9.8.7"\n')
    assert source(tmp_path / "tests") == "transformers 9.8.7"

"""pytest plugin of upstream_tests.py: L2SPTrainer where the tests import Trainer, and a record of every outcome.

The environment says what to do. UPSTREAM_STRENGTH is λ; empty, and Trainer stays as it is. UPSTREAM_OUTCOMES is the
file that gets one line of JSON per test.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import transformers.trainer
import transformers.trainer_seq2seq
import transformers.training_args
import transformers.training_args_seq2seq

import hf_l2sp

STRENGTH = os.environ["UPSTREAM_STRENGTH"]
MODULES = [
    transformers,
    transformers.trainer,
    transformers.trainer_seq2seq,
    transformers.training_args,
    transformers.training_args_seq2seq,
]

if STRENGTH:
    # Under their own names and in a module that can be imported: training_args.bin is a pickle of the class.
    @dataclass(repr=False)
    class TrainingArguments(hf_l2sp.L2SPTrainingArguments):
        l2sp_lambda: float = float(STRENGTH)

    @dataclass(repr=False)
    class Seq2SeqTrainingArguments(hf_l2sp.L2SPSeq2SeqTrainingArguments):
        l2sp_lambda: float = float(STRENGTH)

    class Trainer(hf_l2sp.L2SPTrainer):
        def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
            super().__init__(model, TrainingArguments("tmp_trainer") if args is None else args, *rest, **kwargs)

    class Seq2SeqTrainer(hf_l2sp.L2SPSeq2SeqTrainer):
        pass

    # Before any test module is imported: some derive classes from these names.
    for replacement in (TrainingArguments, Seq2SeqTrainingArguments, Trainer, Seq2SeqTrainer):
        for module in MODULES:
            if hasattr(module, replacement.__name__):
                setattr(module, replacement.__name__, replacement)

if os.environ.get("UPSTREAM_GAUDI"):
    import _gaudi

    _gaudi.install(sys.modules)


def _record(test: str, outcome: str, report: Any) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr or "")
    line = {"test": test, "outcome": outcome, "message": message.strip().partition("\n")[0]}
    with open(os.environ["UPSTREAM_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _record(report.nodeid, report.outcome, report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _record(report.nodeid, "failed", report)

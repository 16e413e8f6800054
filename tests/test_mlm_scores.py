"""Perplexities of masked words: exact over batches, told at the start, and never of a wrong run; the arguments."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from transformers.trainer_utils import EvalPrediction

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import domain_adapt_mlm  # noqa: E402
from _mlm_data import TextArguments  # noqa: E402
from _mlm_masking import IGNORED  # noqa: E402
from _mlm_scores import PerplexityMixin, courses, draw_courses, perplexity, row_sums  # noqa: E402
from _recipe_args import RecipeTrainingArguments  # noqa: E402
from _recipe_output import _OWN_FILES  # noqa: E402


def test_the_perplexity_weighs_every_masked_token_alike_whatever_the_batches() -> None:
    logits = torch.randn(5, 8, 11)
    labels = torch.full((5, 8), IGNORED)
    for row, count in enumerate((1, 5, 2, 0, 3)):
        labels[row, :count] = torch.randint(0, 11, (count,))
    masked = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[masked], labels[masked]).exp()
    for size in (1, 2, 5):
        sums = []
        for start in range(0, 5, size):
            here = slice(start, start + size)
            everywhere, alone = logits[here], logits[here][masked[here]][None]
            both = [row_sums(form, labels[here]) for form in (everywhere, (alone, None))]
            torch.testing.assert_close(*both)
            sums.append(both[0])
        found = perplexity(EvalPrediction(predictions=torch.cat(sums).numpy(), label_ids=labels.numpy()))
        assert found == {"perplexity": pytest.approx(float(expected), rel=1e-5)}
    means = [
        float(torch.nn.functional.cross_entropy(logits[r][masked[r]], labels[r][masked[r]])) for r in (0, 1, 2, 4)
    ]
    assert abs(math.exp(sum(means) / 4) - float(expected)) > 0.1, "a mean of means is another number"


def test_a_run_that_diverged_has_an_infinite_perplexity() -> None:
    for sums, expected in (([[1e6, 1.0]], math.inf), ([[math.inf, 2.0]], math.inf)):
        assert perplexity(EvalPrediction(numpy.array(sums), numpy.zeros(1)))["perplexity"] == expected
    assert math.isnan(perplexity(EvalPrediction(numpy.array([[math.nan, 2.0]]), numpy.zeros(1)))["perplexity"])


class FakeTrainer:
    """What the mixin needs of a trainer."""

    perplexities = {"domain": 20.0, "general": 8.0}

    def __init__(self) -> None:
        self.state, self.callbacks = SimpleNamespace(log_history=[], global_step=0), []
        self.is_in_train = False

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def train(self, resumed: bool = False) -> Any:
        self.is_in_train = True
        if resumed:
            self.state.log_history, self.state.global_step = list(resumed), 5
        for callback in self.callbacks:
            callback.on_train_begin(None, self.state, None)
        self.evaluate()
        self.is_in_train = False
        return SimpleNamespace(metrics={"train_loss": 1.0})

    def evaluate(self, data: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        output = self.evaluation_loop(data, metric_key_prefix=metric_key_prefix)
        self.log(output.metrics)
        return output.metrics

    def predict(self, data: Any, metric_key_prefix: str = "test") -> Any:
        return self.evaluation_loop(data, metric_key_prefix=metric_key_prefix)

    def evaluation_loop(self, data: Any, metric_key_prefix: str) -> Any:
        metrics = {"perplexity": self.perplexities[data or "domain"], "loss": -1.0, "runtime": 0.1}
        return SimpleNamespace(metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})

    def log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})


class Fake(PerplexityMixin, FakeTrainer): ...


def test_both_texts_are_scored_before_and_during_training() -> None:
    trainer = Fake()
    trainer.general = "general"
    metrics = trainer.train().metrics
    assert metrics == {"train_loss": 1.0, "start_perplexity": 20.0, "start_general_perplexity": 8.0}
    start, start_general, domain, general = trainer.state.log_history
    assert (start, start_general) == (
        {"start_perplexity": 20.0, "step": 0},
        {"start_general_perplexity": 8.0, "step": 0},
    )
    assert domain["eval_loss"] == pytest.approx(math.log(20)) and general["general_perplexity"] == 8.0
    assert "general_perplexity" not in trainer.evaluate(), "afterwards it is a split of its own"
    assert trainer.predict("general", metric_key_prefix="general").metrics["general_loss"] == pytest.approx(
        math.log(8)
    )
    assert trainer.entries == trainer.state.log_history and "general_runtime" in trainer.entries[-1]


def test_a_resumed_run_tells_the_start_of_the_first() -> None:
    trainer = Fake()
    metrics = trainer.train([{"start_perplexity": 44.0, "step": 0}]).metrics
    assert metrics["start_perplexity"] == 44.0
    assert [entry["step"] for entry in trainer.state.log_history if "start_perplexity" in entry] == [0]


def test_the_course_has_one_value_for_a_step_that_of_training(tmp_path: Path) -> None:
    log = [
        {"start_perplexity": 9.0, "step": 0},
        {"start_general_perplexity": 3.0, "step": 0},
        {"loss": 1.0, "step": 2},
        {"eval_perplexity": 7.0, "step": 2},
        {"general_perplexity": 4.0, "step": 2},
        {"eval_perplexity": 6.5, "step": 2},
    ]
    assert courses(log) == {"domain": {0: 9.0, 2: 7.0}, "general": {0: 3.0, 2: 4.0}}
    for logs in ({"L2-SP": log}, {"plain": log, "L2-SP": log}):
        draw_courses(logs, tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert _OWN_FILES.fullmatch("perplexity.png"), "a later run with --overwrite_output_dir may delete it"


# --------------------------------------------------------------------------- arguments


def test_the_docstring_names_every_default_that_differs_with_its_value() -> None:
    own_class = domain_adapt_mlm.AdaptationTrainingArguments
    inherited = {f.name: f.default for f in dataclasses.fields(RecipeTrainingArguments)}
    own = {f.name: f.default for f in dataclasses.fields(own_class)}
    differing = {n: d for n, d in own.items() if n not in inherited or inherited[n] != d}
    told = dict(re.findall(r"^ {8}(\w+) \(`\w+`, defaults to `(.+?)`\)", own_class.__doc__ or "", flags=re.MULTILINE))
    assert {name: eval(value) for name, value in told.items()} == differing  # our own docstring


def test_the_yaml_file_of_the_recipe_is_understood(tmp_path: Path) -> None:
    config = str(RECIPES / "configs" / "domain_adapt_mlm.yaml")
    model, text, settings = domain_adapt_mlm.make_parser().parse(["--config", config, "--compare"])
    assert model.model_name_or_path == "google-bert/bert-base-uncased" and settings["compare"]
    assert isinstance(text, TextArguments) and text.general_file == "data/general.txt" and text.paragraphs is False
    settings.build(RecipeTrainingArguments, output_dir=str(tmp_path))


def test_help_lists_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        domain_adapt_mlm.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--general_file", "--paragraphs", "--head_warmup_steps", "20%", "--compare"))

"""Hyperparameter search: each trial is anchored afresh, a study goes on from its storage, the best is retrained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments, l2sp_hp_space

optuna = pytest.importorskip("optuna", reason="the search is that of the optuna extra")
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Record(TrainerCallback):
    """What each training was like."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def on_train_end(self, args, state, control, **kwargs):
        first = next(log for log in state.log_history if "loss" in log)
        anchor = self.trainer.l2sp_anchor
        self.runs.append(
            {
                "lambda": first["l2sp_lambda"],
                "learning_rate": args.learning_rate,
                "distance": first["l2sp_distance"],
                "anchor": anchor,
                "fingerprint": anchor.fingerprint,
                "entries": len(anchor),
            }
        )


@pytest.fixture
def make(tiny_bert_dir, classification_data, tmp_path):
    def init():
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
        model.accepts_loss_kwargs = False
        return model

    def build(**changes):
        values = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        record = Record()
        trainer = L2SPTrainer(
            model_init=init,
            args=L2SPTrainingArguments(**{**values, **changes}),
            train_dataset=classification_data,
            eval_dataset=classification_data[:6],
            callbacks=[record],
        )
        record.trainer = trainer
        return trainer, record

    return build


def search(trainer, trials, **options):
    options = {"sampler": optuna.samplers.RandomSampler(seed=3), **options}
    return trainer.hyperparameter_search(
        hp_space=l2sp_hp_space, backend="optuna", direction="minimize", n_trials=trials, **options
    )


def test_space_is_logarithmic_within_its_bounds():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    found = [l2sp_hp_space(study.ask()) for _ in range(400)]
    assert all(set(values) == {"l2sp_lambda", "learning_rate"} for values in found)
    strengths = sorted(values["l2sp_lambda"] for values in found)
    assert 1e-4 <= strengths[0] < 3e-4 and 3 < strengths[-1] <= 10
    assert 0.01 < strengths[200] < 0.1  # the middle of 1e-4 … 10 is 0.03
    rates = [values["learning_rate"] for values in found]
    assert 1e-5 <= min(rates) < 2e-5 and 3e-4 < max(rates) <= 5e-4


def test_trial_of_another_backend_is_refused():
    with pytest.raises(TypeError, match="is for optuna and cannot draw from a SimpleNamespace: pass backend='optuna'"):
        l2sp_hp_space(SimpleNamespace())


def test_every_trial_is_anchored_afresh(make):
    trainer, record = make()
    best = search(trainer, 4)
    runs = record.runs
    assert len(runs) == 4 and len({run["lambda"] for run in runs}) == 4 == len({run["learning_rate"] for run in runs})
    assert all(run["distance"] == 0.0 for run in runs)  # each begins at θ0, not where the last one has ended
    assert len({id(run["anchor"]) for run in runs}) == 4 and len({run["fingerprint"] for run in runs}) == 1
    assert {run["entries"] for run in runs} == {39}
    assert set(best.hyperparameters) == {"l2sp_lambda", "learning_rate"}
    assert 0.5 < best.objective < 3.0  # the evaluation's loss and nothing beside it


@pytest.mark.parametrize("start", [1, 0.01])
def test_small_strengths_are_not_cast_to_0(make, start):
    trainer, record = make(l2sp_lambda=start)
    search(trainer, 3)
    assert all(0 < run["lambda"] < 10 for run in record.runs) and any(0 < run["lambda"] < 1 for run in record.runs)


def test_study_goes_on_from_its_storage(make, tmp_path):
    options = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "notes", "load_if_exists": True}
    first, record = make()
    search(first, 2, **options)
    second, more = make()
    best = search(second, 2, sampler=optuna.samplers.RandomSampler(seed=4), **options)
    study = optuna.load_study(study_name="notes", storage=options["storage"])
    assert len(study.trials) == 4 and len(record.runs) == len(more.runs) == 2
    assert best.objective == min(trial.value for trial in study.trials)
    assert best.hyperparameters == study.best_params


def test_trainer_retrains_with_the_best(make):
    trainer, record = make()
    best = search(trainer, 3)
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    last = record.runs[-1]
    assert (last["lambda"], last["learning_rate"]) == (best.hyperparameters["l2sp_lambda"], trainer.args.learning_rate)
    assert trainer.args.learning_rate == best.hyperparameters["learning_rate"] and last["distance"] == 0.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-5)
    trainer.save_model()


@pytest.mark.parametrize("mode", ["decoupled", "fisher"])
def test_other_ways_to_pull_are_searched_as_well(make, mode):
    changes = {"l2sp_mode": "decoupled"} if mode == "decoupled" else {"l2sp_fisher_samples": 6}
    trainer, record = make(**changes)
    search(trainer, 2)
    assert len(record.runs) == 2 and all(run["distance"] == 0.0 for run in record.runs)
    assert trainer.l2sp_anchor is record.runs[-1]["anchor"]
    if mode == "fisher":
        weights = [entry.weight for entry in trainer.l2sp_anchor.active()]
        assert all(isinstance(weight, torch.Tensor) for weight in weights)

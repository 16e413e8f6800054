"""Distillation as a user meets it: its loss, the life of a trainer, the arguments, what is refused."""

from __future__ import annotations

import copy
import math
import textwrap
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments, distill
from hf_l2sp.distill import (
    DistillationArguments,
    DistillationMixin,
    L2SPDistillationTrainer,
    distillation_loss,
)

from .distillation import (
    NAMES,
    RESUMED_FROM,
    Arguments,
    DistillTrainer,
    build,
    gradient_of,
    gradients_of,
    make_model,
    make_setup,
    make_tokenizer,
    reference,
    relative_error,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def setup(tokenizer):
    return partial(make_setup, tokenizer)


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teachers", [1, 3])
def test_loss_of_logits(teachers):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    p = 3 * torch.randn(2, 5, teachers, 4, generator=generator, dtype=torch.float64)
    got = distillation_loss(q, p, 2.5)
    mean = (p / 2.5).softmax(-1).mean(-2)
    expected = 2.5**2 * nn.functional.kl_div((q / 2.5).log_softmax(-1), mean, reduction="none").sum(-1)
    assert got.shape == (2, 5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_loss_at_the_ends():
    logits = torch.tensor([[200.0, -200.0, 0.0]])
    assert float(distillation_loss(logits, logits.unsqueeze(-2), 1.0)) == 0.0
    sure = distillation_loss(torch.zeros(1, 3), logits.unsqueeze(-2), 1.0)  # probabilities that round to 0
    torch.testing.assert_close(sure, torch.tensor([math.log(3.0)]))
    half = distillation_loss(logits.bfloat16(), -logits.bfloat16().unsqueeze(-2), 1.0)
    assert half.dtype == torch.float32 and float(half) == 400.0


# --- a trainer's life ---------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted(setup, tmp_path, tokenizer):
    """Bit for bit, with dropout, short windows and the optimizer's state."""
    _, teachers, data, collator = setup("sequence", 2, rows=10, unlabelled=(1, 6))
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{RESUMED_FROM}")):
        student = make_model("sequence", 1, dropout=0.2).double()
        trainer = build(
            tmp_path if resume is None else tmp_path / "resumed",
            student,
            data,
            cls=L2SPDistillationTrainer,
            tokenizer=tokenizer,
            collator=collator,
            trainer={"teacher": teachers},
            optim="adamw_torch",
            learning_rate=0.01,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=RESUMED_FROM,
            l2sp_lambda=0.1,
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer.state.log_history[:-1], student))
    (logs, whole), (resumed_logs, resumed) = runs
    assert len(logs) == 9 and resumed_logs == logs
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    # The arguments name classes of the library alone.
    args = torch.load(tmp_path / f"checkpoint-{RESUMED_FROM}" / "training_args.bin", weights_only=False)
    assert type(args).__module__ == "hf_l2sp.distill" and args.distill_alpha == 0.5


def test_every_student_of_a_search_is_checked(setup, tmp_path, tokenizer):
    """Through model_init, as hyperparameter search makes them."""
    _, teachers, data, collator = setup("sequence")
    made = []

    def model_init(trial=None):
        made.append(make_model("sequence", 1, names=NAMES if len(made) < 2 else ["low", "mid", "top"]).double())
        return made[-1]

    trainer = build(
        tmp_path,
        None,
        data,
        cls=L2SPDistillationTrainer,
        tokenizer=tokenizer,
        collator=collator,
        trainer={"teacher": teachers, "model_init": model_init},
    )
    trainer.train()
    parts = reference(made[1], teachers, data, 0.5, 2.0)
    assert trainer.model is made[1]
    assert relative_error(gradients_of(trainer)[0], gradient_of(sum(parts), made[1])) < 1e-9
    with pytest.raises(ValueError, match="only the teacher has 'high', only the student 'top'"):
        trainer.train()


def test_hyperparameter_search(setup, tmp_path, tokenizer):
    optuna = pytest.importorskip("optuna", reason="optuna is an extra of hf-l2sp")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _, teachers, data, collator = setup("sequence")
    trainer = build(
        tmp_path,
        None,
        data,
        cls=L2SPDistillationTrainer,
        tokenizer=tokenizer,
        collator=collator,
        trainer={"teacher": teachers, "eval_dataset": data, "model_init": lambda: make_model("sequence", 1).double()},
        learning_rate=0.1,
        eval_strategy="epoch",
    )
    seen = []

    def space(trial):
        return {"distill_alpha": trial.suggest_float("distill_alpha", 0.1, 0.9)}

    def objective(metrics):
        seen.append(trainer.args.distill_alpha)
        return metrics["eval_loss"]

    best = trainer.hyperparameter_search(hp_space=space, compute_objective=objective, n_trials=2, direction="minimize")
    assert len(set(seen)) == 2 and best.hyperparameters["distill_alpha"] in seen


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_example_of_the_docstring(setup, tmp_path, tokenizer, monkeypatch):
    student, (one, another), data, _ = setup("sequence", 2, unlabelled=(1,))
    start = dict(copy.deepcopy(student).named_parameters())
    code = textwrap.dedent(
        "\n".join(line for line in distill.__doc__.splitlines() if line.startswith("    ") or not line)
    )
    assert "cache_teacher_logits(data, [one, another]" in code
    monkeypatch.chdir(tmp_path)
    scope = {"student": student, "one": one, "another": another, "data": data, "tokenizer": tokenizer}
    exec(compile(code, "hf_l2sp.distill", "exec"), scope)
    scope["trainer"].train()
    assert len(scope["cached"]["teacher_logits"][0]) == 2
    assert any(not torch.equal(p, start[name]) for name, p in student.named_parameters())


# --- refusals, arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification'; distillation"),
        ({"problem_type": "regression"}, "single_label_classification"),
        ({"num_labels": 1}, "not a classification model of transformers with two labels or more"),
    ],
)
def test_other_tasks_are_refused(setup, tmp_path, change, message):
    student, teachers, data, collator = setup("sequence", **change)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, student, data, collator=collator, trainer={"teacher": teachers})


def test_labels_are_needed(setup, tmp_path):
    student, teachers, data, collator = setup("sequence")
    trainer = build(tmp_path, student, data.remove_columns("labels"), collator=collator, trainer={"teacher": teachers})
    with pytest.raises(ValueError, match="needs 'labels'; the inputs are .*Give rows without a label the label -100"):
        trainer.train()
    several = data.remove_columns("labels").add_column("labels", [[0.0, 1.0, 0.0]] * 8)
    trainer = build(tmp_path, student, several, collator=collator, trainer={"teacher": teachers})
    with pytest.raises(ValueError, match="one label per item; these labels are torch.float32"):
        trainer.train()


def test_a_teacher_is_needed(setup, tmp_path):
    student, teachers, data, collator = setup("sequence")
    message = "distill_alpha=0.5 needs a teacher: distill_teacher=NAME .*'teacher_logits' .*Or set distill_alpha=0"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, student, data, collator=collator)
    # Data that do not tell their columns are looked at when they come.
    trainer = build(tmp_path, student, list(data), collator=collator)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match="There are two teachers: distill_teacher='somewhere' and the one given"):
        build(tmp_path, student, data, trainer={"teacher": teachers}, distill_teacher="somewhere")
    with pytest.raises(ValueError, match="2 tokenizers were given for 1 teachers"):
        build(tmp_path, student, data, trainer={"teacher": teachers, "teacher_tokenizer": [None, None]})


def test_plain_arguments_have_the_defaults(setup, tmp_path):
    student, teachers, data, collator = setup("sequence")
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, learning_rate=0.0, logging_steps=1
    )
    trainer = DistillTrainer(model=student, args=args, train_dataset=data, data_collator=collator, teacher=teachers[0])
    trainer.train()
    expected = reference(student, teachers, data, 0.5, 2.0)[1]
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", -0.1, "distill_alpha=-0.1 is a weight beside 1 − α; give 0 to 1"),
        ("alpha", 1.1, "distill_alpha=1.1"),
        ("alpha", float("nan"), "distill_alpha=nan"),
        ("alpha", "0.5", "distill_alpha='0.5' is a str, not a number"),
        ("alpha", True, "distill_alpha=True is a bool"),
        ("temperature", 0, "distill_temperature=0.0 divides the logits; give one above 0"),
        ("temperature", float("inf"), "distill_temperature=inf"),
        ("temperature", float("nan"), "distill_temperature=nan"),
        ("teacher", " ", "distill_teacher='' is empty"),
    ],
)
def test_arguments_are_checked(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        Arguments(output_dir=str(tmp_path), **{f"distill_{field}": value})


def test_arguments_from_the_command_line(tmp_path):
    @dataclass
    class Own(DistillationArguments, L2SPTrainingArguments):
        more: int = 1

    line = f"--output_dir {tmp_path} --distill_alpha 1 --distill_teacher there --l2sp_lambda 0.3 --more 2"
    (args,) = HfArgumentParser(Own).parse_args_into_dataclasses(line.split())
    assert (args.distill_alpha, args.distill_teacher, args.l2sp_lambda, args.more) == (1.0, "there", 0.3, 2)
    assert type(Arguments(output_dir=str(tmp_path), distill_alpha=1).distill_alpha) is float
    with pytest.raises(ValueError, match="l2sp_lambda"):  # the other checks are still made
        Own(output_dir=str(tmp_path), l2sp_lambda=-1)


def test_order_of_the_bases():
    with pytest.raises(TypeError, match=r"Wrong has L2SPMixin behind .*class Wrong\(L2SPMixin, DistillationMixin, Tr"):

        class Wrong(DistillationMixin, L2SPTrainer): ...

"""A teacher's logits cached in the data: what they are, and that training on them is training on the teacher."""

from __future__ import annotations

import datasets
import numpy
import pytest
import torch
from torch import nn

from hf_l2sp.distill import cache_teacher_logits
from hf_l2sp.teacher_logits import TeacherLogitsCollator

from .distillation import (
    NAMES,
    build,
    gradient,
    gradient_of,
    make_collator,
    make_data,
    make_model,
    make_tokenizer,
    permuted,
    relative_error,
)

TASKS = ["sequence", "token"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_cached_logits_may_come_from_another_tokenizer(tmp_path, tokenizer):
    student, data = make_model("sequence", 1), make_data("sequence")
    teacher = make_model("sequence", 2, vocab_size=45)
    other = make_tokenizer(tmp_path / "other", words=40)
    theirs = data.map(lambda row: {"input_ids": [token % 45 for token in row["input_ids"]]})
    cached = cache_teacher_logits(theirs, teacher, make_collator("sequence", other), id2label=student.config.id2label)
    data = data.add_column("teacher_logits", cached["teacher_logits"])
    got = gradient(tmp_path, student, data, tokenizer, teacher=teacher, teacher_tokenizer=other)
    # The reference asks the teacher about its own ids.
    rows = list(zip(data, theirs, strict=True))
    task = torch.stack([-log_probabilities(student, row, 1.0)[row["labels"]] for row, _ in rows]).mean()
    kl = []
    for row, own in rows:
        log_p, log_q = log_probabilities(teacher, own, 2.0).detach(), log_probabilities(student, row, 2.0)
        kl.append((log_p.exp() * (log_p - log_q)).sum())
    expected = gradient_of(0.5 * task + 0.5 * 4 * torch.stack(kl).mean(), student)
    assert relative_error(got, expected) < 1e-5


def log_probabilities(model, row, temperature):
    return (model(input_ids=torch.tensor([row["input_ids"]])).logits[0] / temperature).log_softmax(-1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [0, 2])
def test_cached_logits_are_those_of_the_teacher(tmp_path, task, count, side):
    """`count` 0 is a model, else a list of them. Row by row, without padding, in the student's order of labels."""
    tokenizer = make_tokenizer(tmp_path, padding_side=side)
    names = ["high", "low", "mid"]
    models = [permuted(make_model(task, 2 + n), names if n == 0 else NAMES).train() for n in range(count or 1)]
    data = make_data(task).with_format("torch")
    cached = cache_teacher_logits(
        data, models if count else models[0], make_collator(task, tokenizer), 3, id2label=dict(enumerate(NAMES))
    )
    assert cached.remove_columns("teacher_logits").features == data.features
    assert cached.format["type"] == "torch"
    for row in cached:
        own = []
        for model in models:
            ids, mask = row["input_ids"], row["attention_mask"]
            before = 12 - len(ids) if side == "left" else 0  # positions count from the left
            ids, mask = (nn.functional.pad(values, (before, 0))[None] for values in (ids, mask))
            logits = model.eval()(input_ids=ids, attention_mask=mask).logits[0]
            logits = logits[before:] if task == "token" else logits
            theirs = list(model.config.id2label.values())
            own.append(logits[..., [theirs.index(name) for name in NAMES]])
        expected = torch.stack(own, dim=-2) if count else own[0]
        torch.testing.assert_close(row["teacher_logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_cached_is_live(tmp_path, task, ensemble, side):
    """Three epochs of training; the teacher is not called where there is a column."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", padding_side=side)
    collator = make_collator(task, tokenizer)
    models = [make_model(task, 2 + n) for n in range(2 if ensemble else 1)]
    teacher = models if ensemble else models[0]
    data = make_data(task, 12, unlabelled=(1, 5))
    cached = cache_teacher_logits(data, teacher, collator, 4, id2label=dict(enumerate(NAMES)))
    runs = []
    for rows, trainer in ((data, {"teacher": teacher}), (cached, {}), (list(cached), {})):
        student = make_model(task, 1, dropout=0.1)
        built = build(
            tmp_path,
            student,
            rows,
            tokenizer=tokenizer,
            collator=collator,
            trainer=trainer,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            learning_rate=0.1,
        )
        built.train()
        losses = [log["distill_loss"] for log in built.state.log_history if "loss" in log]
        runs.append((dict(student.named_parameters()), losses))
    for weights, losses in runs[1:]:
        assert relative_error(weights, runs[0][0]) < 1e-5
        assert losses == pytest.approx(runs[0][1], rel=1e-4) and len(losses) == 9


def test_caching_is_checked(tmp_path, tokenizer, caplog):
    teacher, data, collator = make_model("token", 2), make_data("token"), make_collator("token", tokenizer)
    with pytest.raises(TypeError, match=r"A DatasetDict was given, .*did you mean dataset\['train'\]"):
        cache_teacher_logits(datasets.DatasetDict(train=data), teacher, collator)
    with pytest.raises(ValueError, match="only the teacher has 'low'"):
        cache_teacher_logits(data, teacher, collator, id2label={0: "a", 1: "mid", 2: "high"})
    assert not caplog.records
    cached = cache_teacher_logits(data, teacher, collator)
    assert "are stored in its own order of labels, ['low', 'mid', 'high']" in caplog.records[0].message
    with pytest.raises(
        ValueError, match=r"has a column 'teacher_logits' already; remove_columns\(\['teacher_logits'\]\)"
    ):
        cache_teacher_logits(cached, teacher, collator)

    def cutting(rows):
        batch = collator(rows)
        return {name: value[:, :3] for name, value in batch.items()}

    with pytest.raises(ValueError, match="The collator made 3 positions of a row with .*truncation=True"):
        cache_teacher_logits(data, teacher, cutting)
    with pytest.raises(ValueError, match="positions in 'teacher_logits' and the batch 3: .* on other tokens"):
        TeacherLogitsCollator(cutting)(list(cached))
    assert len(cache_teacher_logits(data.select([]), teacher, collator)) == 0
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"BertForTokenClassification in torch.float32\) .* not finite for rows 0 to 7"
    ):
        cache_teacher_logits(data, teacher, collator)


def test_logits_of_another_shape_are_refused(tmp_path, tokenizer):
    student, data = make_model("sequence", 1), make_data("sequence")
    data = data.add_column("teacher_logits", [[0.0, 1.0]] * 8)
    with pytest.raises(ValueError, match=r"The column 'teacher_logits' \(2, 1, 2\), the student's logits \(2, 3\)"):
        gradient(tmp_path, student, data, tokenizer)
    teacher = make_model("token", 2)
    with pytest.raises(ValueError, match="The teacher's logits .*do not fit together"):
        gradient(tmp_path, student, data.remove_columns("teacher_logits"), tokenizer, teacher=teacher)


def test_collator_leaves_rows_alone(tokenizer):
    inner = make_collator("sequence", tokenizer)
    collator = TeacherLogitsCollator(inner)
    rows = [{"input_ids": [2, 7, 3], "labels": 1, "teacher_logits": numpy.array([1.0, 2.0, 3.0])} for _ in range(2)]
    batch = collator(rows)
    assert batch["teacher_logits"].tolist() == [[1.0, 2.0, 3.0]] * 2 and "teacher_logits" in rows[0]
    assert collator.tokenizer is tokenizer and not hasattr(TeacherLogitsCollator(lambda rows: rows), "tokenizer")
    assert TeacherLogitsCollator(lambda rows: rows)([(1, 2)]) == [(1, 2)]

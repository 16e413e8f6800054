"""Teachers: what is checked about them, and that they stay what they are."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from transformers import BertModel, DistilBertConfig, DistilBertForSequenceClassification, set_seed

from hf_l2sp.distill import L2SPDistillationTrainer
from hf_l2sp.teachers import Teachers, find_tokenizer

from .distillation import (
    NAMES,
    build,
    gradient,
    gradient_of,
    make_data,
    make_model,
    make_tokenizer,
    permuted,
    reference,
    relative_error,
)

TASKS = ["sequence", "token"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("names", [["high", "low", "mid"], ["mid", "low", "high"]])
def test_labels_are_matched_by_name(tmp_path, tokenizer, task, names):
    student, teacher, data = make_model(task, 1), make_model(task, 2), make_data(task)
    expected = gradient(tmp_path, copy.deepcopy(student), data, tokenizer, task, teacher=teacher)
    got = gradient(tmp_path, student, data, tokenizer, task, teacher=[permuted(teacher, names)])
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (["low", "mid", "top"], NAMES, "only the teacher has 'top', only the student 'high'. Set config.id2label"),
        (
            ["low", "mid"],
            NAMES,
            "has 2 labels and the student 3, .*only the teacher has none, only the student 'high'",
        ),
        (["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, "'LABEL_0', 'LABEL_1', 'LABEL_2', only the student 'low'"),
        ([f"t{n}" for n in range(9)], NAMES, "'t0', 't1', 't2', 't3', 't4' and 4 more"),
        (["a", "b", "a"], ["b", "a", "a"], "matched by name"),
    ],
)
def test_other_labels_are_refused(tmp_path, tokenizer, theirs, ours, message):
    student, teacher = make_model("sequence", 1, ours), make_model("sequence", 2, theirs)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, student, make_data("sequence"), tokenizer=tokenizer, trainer={"teacher": teacher})


# --- vocabulary ---------------------------------------------------------------------------------------------------


def test_other_vocabularies_are_refused(tmp_path, tokenizer):
    student, teacher, data = make_model("sequence", 1), make_model("sequence", 2), make_data("sequence")
    other = make_tokenizer(tmp_path / "other", words=40)

    def built(teacher, **trainer):
        return build(tmp_path, student, data, tokenizer=tokenizer, trainer={"teacher": teacher, **trainer})

    message = r"another vocabulary: 15 of the student's 60 tokens .*\('w40', 'w41', .*and 10 more\)"
    with pytest.raises(ValueError, match=message):
        built(teacher, teacher_tokenizer=other)
    with pytest.raises(ValueError, match="another vocabulary"):
        built([teacher, copy.deepcopy(teacher)], teacher_tokenizer=[tokenizer, other])
    # A teacher that came from a folder is compared with the tokenizer there.
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="another vocabulary"):
        built(type(teacher).from_pretrained(tmp_path / "teacher"))
    # It may know more tokens than the student.
    built(teacher, teacher_tokenizer=make_tokenizer(tmp_path / "more", words=70))
    with pytest.raises(ValueError, match="has a vocabulary of 61 and the student of 60"):
        built(make_model("sequence", 2, vocab_size=61))


def test_unknown_vocabularies_are_told(tmp_path, caplog):
    student, teacher = make_model("sequence", 1), make_model("sequence", 2)
    build(tmp_path, student, make_data("sequence"), trainer={"teacher": teacher})
    (record,) = caplog.records
    assert (
        "have the same size; whether they are the same is not known. Give the trainer processing_cl" in record.message
    )


def test_no_tokenizer_is_made_up(tmp_path, tokenizer):
    """AutoTokenizer makes an empty one of a model's config in some versions."""
    make_model("sequence", 1).save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), local_files_only=True) is None
    assert find_tokenizer("", local_files_only=True) is None
    tokenizer.save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path), local_files_only=True).get_vocab() == tokenizer.get_vocab()


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_teacher_by_path(tmp_path, tokenizer, task):
    teacher, student, data = make_model(task, 2), make_model(task, 1), make_data(task)
    teacher.bfloat16().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    built = build(
        tmp_path, student, data, tokenizer=tokenizer, distill_teacher=str(tmp_path / "teacher"), distill_alpha=1.0
    )
    (loaded,) = built._distill_models
    assert type(loaded) is type(teacher) and loaded.dtype == torch.bfloat16 and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), teacher.parameters(), strict=True))


def test_what_cannot_teach(tmp_path, tokenizer):
    student, data = make_model("sequence", 1), make_data("sequence")

    def built(student=student, **options):
        return build(tmp_path, student, data, tokenizer=tokenizer, **options)

    BertModel(student.config).save_pretrained(tmp_path / "encoder")
    message = "has no weights for 'classifier.bias', 'classifier.weight': it was not trained as BertForSequenceClassif"
    with pytest.raises(ValueError, match=message):
        built(distill_teacher=str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match=r"distill_teacher='.*nowhere' could not be loaded \(.*Give the folder of a"):
        built(distill_teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"shares weights with the student, .*copy.deepcopy\(model\)"):
        built(trainer={"teacher": student})
    sharded = make_model("sequence", 2)
    sharded.classifier.bias.ds_id = 3
    with pytest.raises(ValueError, match="sharded by DeepSpeed ZeRO-3.*cache_teacher_logits"):
        built(trainer={"teacher": sharded})

    class Unknown(type(student)): ...

    with pytest.raises(ValueError, match="cannot be loaded for a Unknown.*teacher=model"):
        built(Unknown(student.config), distill_teacher=str(tmp_path / "encoder"))


# --- apart from the student ---------------------------------------------------------------------------------------


def test_teacher_stays_what_it_is_and_is_saved_nowhere(tmp_path, tokenizer):
    """It has dropout and is given in training mode; what it holds is four times the student."""
    data = make_data("sequence")
    student = make_model("sequence", 1, dropout=0.1)
    teacher = make_model("sequence", 2, dropout=0.5, num_hidden_layers=4).train()
    before = copy.deepcopy(teacher.state_dict())
    built = build(
        tmp_path,
        student,
        data,
        cls=L2SPDistillationTrainer,
        tokenizer=tokenizer,
        trainer={"teacher": teacher},
        learning_rate=0.1,
        l2sp_lambda=0.1,
        save_strategy="epoch",
    )
    torch.manual_seed(3)
    drawn = []
    handle = teacher.register_forward_pre_hook(lambda *_: drawn.append(torch.get_rng_state()))
    after = teacher.register_forward_hook(lambda *_: drawn.append(torch.get_rng_state()))
    built.train()
    handle.remove(), after.remove()
    assert len(drawn) == 2 and torch.equal(*drawn)  # no dropout in it
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert set(built.l2sp_plan.entries) == {name for name, _ in student.named_parameters()}
    optimized = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}
    built.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        files = set(os.listdir(folder))
        assert {"tokenizer.json", "config.json", "model.safetensors"} <= files
        assert abs(os.path.getsize(folder / "model.safetensors") - 4 * student.num_parameters()) < 10_000
        assert type(student).from_pretrained(folder).config.num_hidden_layers == 1
    # A new trainer goes on from the checkpoint.
    resumed = build(
        tmp_path,
        make_model("sequence", 1, dropout=0.1),
        data,
        cls=L2SPDistillationTrainer,
        tokenizer=tokenizer,
        trainer={"teacher": teacher},
        l2sp_lambda=0.1,
        num_train_epochs=2,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2 and "distill_loss" in resumed.state.log_history[-2]


def test_teachers_keep_their_dtype(tmp_path, tokenizer):
    student, data = make_model("sequence", 1), make_data("sequence")
    teacher = make_model("sequence", 2).bfloat16()
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output.logits.dtype))
    got = gradient(tmp_path, student, data, tokenizer, teacher=teacher)
    assert seen == [torch.bfloat16] * 4 and teacher.dtype == torch.bfloat16
    expected = gradient_of(sum(reference(student, [teacher], data, 0.5, 2.0)), student)
    assert relative_error(got, expected) < 5e-3  # of the teacher: padding changes how it rounds
    seen.clear()
    teacher.float()
    built = build(tmp_path, student, data, tokenizer=tokenizer, trainer={"teacher": teacher}, bf16=True)
    built.train()
    assert seen == [torch.float32]  # not in the student's mixed precision


def test_teachers_keep_their_precision():
    """Also where the student is trained under autocast."""
    model, data = make_model("sequence", 2), make_data("sequence", 1)
    teachers = Teachers([model], NAMES)
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**inputs).logits.dtype == torch.bfloat16
        got = teachers.logits(inputs, torch.device("cpu"))
    assert torch.equal(got.squeeze(1), expected) and not got.requires_grad


def test_teachers_get_what_they_take():
    """DistilBERT takes no token_type_ids; a wrapper gets everything but the labels."""
    set_seed(3)
    config = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=16)
    config.id2label = dict(enumerate(NAMES))
    small = DistilBertForSequenceClassification(config)

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *args, **kwargs):
            assert set(kwargs) == {"input_ids", "attention_mask", "token_type_ids"}
            kwargs.pop("token_type_ids")
            return self.model(*args, **kwargs)

    inputs = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    inputs["labels"] = torch.tensor([-100, -100])
    logits = Teachers([small, Wrapper(small)], NAMES).logits(inputs, torch.device("cpu"))
    assert logits.shape == (2, 2, 3) and not logits.requires_grad
    assert torch.equal(logits[:, 0], logits[:, 1])

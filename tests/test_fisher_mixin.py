"""`l2sp_fisher_samples`: w is the Fisher information with mean 1, the same on resume, and nothing else moves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments, estimate_fisher
from hf_l2sp.backends import FSDP2Backend

from .helpers import load_classifier, quick

FISHER = "l2sp_fisher.safetensors"


def make_trainer(model, data, folder, cls=L2SPTrainer, callbacks=(), **changes):
    values = quick(folder, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4)
    if issubclass(cls, L2SPTrainer):
        values |= {"l2sp_lambda": 0.3, "l2sp_fisher_samples": 10}
    kind = L2SPTrainingArguments if issubclass(cls, L2SPTrainer) else TrainingArguments
    model = {"model_init": model} if callable(model) and not isinstance(model, nn.Module) else {"model": model}
    return cls(**model, args=kind(**{**values, **changes}), train_dataset=data, callbacks=list(callbacks))


def weights_of(trainer):
    return {e.name: e.weight for e in trainer.l2sp_anchor.active()}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_weights_are_the_fisher_of_drawn_examples_with_mean_1(tiny_bert_dir, classification_data, tmp_path):
    expected_of = load_classifier(tiny_bert_dir)
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path)
    trainer.train()
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(7))[:10].tolist()
    rows = [{k: v[None] for k, v in classification_data[i].items()} for i in drawn]
    fisher = estimate_fisher(expected_of, rows, progress=False)
    weights = weights_of(trainer)
    assert len(weights) == 39 and "classifier.weight" not in weights
    mean = sum(float(fisher[n].double().sum()) for n in weights) / sum(w.numel() for w in weights.values())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, fisher[name] / mean, rtol=1e-4, atol=1e-5)
    total = sum(float(w.double().sum()) for w in weights.values())
    assert total / sum(w.numel() for w in weights.values()) == pytest.approx(1.0, rel=1e-6)
    stored = load_file(tmp_path / FISHER)
    assert stored.keys() == weights.keys() and all(torch.equal(stored[n], w) for n, w in weights.items())


def test_file_gives_the_same_run_as_weights(tiny_bert_dir, classification_data, tmp_path):
    first, second = load_classifier(tiny_bert_dir), load_classifier(tiny_bert_dir)
    make_trainer(first, classification_data, tmp_path / "a").train()
    file = str(tmp_path / "a" / FISHER)
    make_trainer(second, classification_data, tmp_path / "b", l2sp_fisher_samples=0, l2sp_weights=file).train()
    assert same(first, second)


def test_batches_dropout_and_order_are_those_of_a_run_without(tiny_bert_dir, classification_data, tmp_path):
    """With a λ that does nothing the run is plain `Trainer`'s: no random number was taken from it."""
    ours, plain = load_classifier(tiny_bert_dir), load_classifier(tiny_bert_dir)
    trainer = make_trainer(ours, classification_data, tmp_path / "a", l2sp_lambda=1e-30)
    trainer.train()
    make_trainer(plain, classification_data, tmp_path / "b", Trainer).train()
    assert same(ours, plain) and ours.training


def test_few_examples_are_all_taken(tiny_bert_dir, classification_data, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, l2sp_fisher_samples=1000).train()
    assert "w is the diagonal Fisher information on 24 training examples, mean 1, largest" in caplog.text


def test_columns_and_padding_are_those_of_training(tiny_bert_dir, tmp_path):
    rows = [{"input_ids": list(range(1, 4 + i % 5)), "label": i % 3, "note": "x" * i} for i in range(12)]

    def collate(batch):
        assert set(batch[0]) == {"input_ids", "label"}
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([r["label"] for r in batch]),
        }

    trainer = make_trainer(load_classifier(tiny_bert_dir), datasets.Dataset.from_list(rows), tmp_path, max_steps=1)
    trainer.data_collator = collate
    trainer.train()
    assert all(isinstance(w, torch.Tensor) for w in weights_of(trainer).values())


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_resumed_run_has_the_same_weights_bit_for_bit(tiny_bert_dir, classification_data, tmp_path, mode):
    whole, resumed = load_classifier(tiny_bert_dir), load_classifier(tiny_bert_dir)
    options = {"save_strategy": "steps", "save_steps": 2, "l2sp_mode": mode, "l2sp_lambda": 3.0}
    first = make_trainer(whole, classification_data, tmp_path, **options)
    first.train()
    record = json.loads((tmp_path / "checkpoint-2" / "l2sp_state.json").read_text())["fisher"]
    assert record["samples"] == record["examples"] == 10 and len(record["sha256"]) == 64
    # A hard link: the checkpoint does not take the space once more, and survives the file in the output folder.
    assert os.path.samefile(tmp_path / "checkpoint-2" / FISHER, tmp_path / FISHER)
    (tmp_path / FISHER).unlink()
    second = make_trainer(resumed, classification_data, tmp_path, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole, resumed)
    a, b = weights_of(first), weights_of(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
    again = json.loads((tmp_path / "checkpoint-4" / "l2sp_state.json").read_text())["fisher"]
    assert again == record and (tmp_path / "checkpoint-4" / FISHER).is_file()


def test_checkpoint_gets_a_file_of_its_own_where_there_are_no_links(
    tiny_bert_dir, classification_data, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    trainer = make_trainer(
        load_classifier(tiny_bert_dir), classification_data, tmp_path, save_strategy="steps", save_steps=4
    )
    trainer.train()
    first, copied = tmp_path / FISHER, tmp_path / "checkpoint-4" / FISHER
    assert first.read_bytes() == copied.read_bytes() and not os.path.samefile(first, copied)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".l2sp_fisher")]


def test_unfrozen_parameters_weigh_1_also_after_a_resume(tiny_bert_dir, classification_data, tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.bert.embeddings.requires_grad_(state.global_step >= 1)

    options = {"save_strategy": "steps", "save_steps": 2}
    models = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = load_classifier(tiny_bert_dir)
        model.bert.embeddings.requires_grad_(False)
        trainer = make_trainer(model, classification_data, tmp_path, callbacks=[Unfreeze()], **options)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.l2sp_plan.entries["bert.embeddings.LayerNorm.weight"].weight == 1.0
        models.append(model)
    assert same(*models)


def test_each_model_has_its_own(tiny_bert_dir, classification_data, tmp_path):
    heads = iter((5, 0, 1))  # the constructor asks for one, too

    def init():
        model = load_classifier(tiny_bert_dir)
        torch.manual_seed(next(heads))
        nn.init.normal_(model.classifier.weight)
        return model

    trainer = make_trainer(init, classification_data, tmp_path, max_steps=1)
    trainer.train()
    first = {n: w.clone() for n, w in weights_of(trainer).items()}
    trainer.train()
    assert any(not torch.equal(first[n], w) for n, w in weights_of(trainer).items())


def test_second_training_of_one_model_keeps_it(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path, max_steps=2)
    trainer.train()
    first = weights_of(trainer)
    trainer.train()
    assert all(w is first[n] for n, w in weights_of(trainer).items())


# --- refused --------------------------------------------------------------------------------------------------------


def test_stream_of_examples_is_refused_before_training(tiny_bert_dir, classification_data, tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": 1}] * 8
    data = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(load_classifier(tiny_bert_dir), data, tmp_path)
    with pytest.raises(ValueError, match="l2sp_fisher_samples=10 does not work with a training set without a length"):
        trainer.train()


def test_sharded_models_are_refused(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path)
    trainer._l2sp_prepare_anchor()
    trainer.l2sp_anchor.backend = FSDP2Backend(trainer.accelerator)
    with pytest.raises(ValueError, match="does not work with FSDP2, where .*save_fisher.*l2sp_weights"):
        trainer._l2sp_check_fisher()


def test_lora_is_refused(tiny_bert_dir, classification_data, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_classifier(tiny_bert_dir), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="l2sp_fisher_samples=10 does not work with LoRA"):
        make_trainer(model, classification_data, tmp_path).train()


def test_fisher_that_is_0_all_over_is_refused(tiny_bert_dir, classification_data, tmp_path):
    model = load_classifier(tiny_bert_dir)
    nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="the Fisher information is 0 all over, so it can weigh nothing"):
        make_trainer(model, classification_data, tmp_path).train()


@pytest.fixture
def trained(tiny_bert_dir, classification_data, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path / "with", **options).train()
    make_trainer(
        load_classifier(tiny_bert_dir), classification_data, tmp_path / "without", l2sp_fisher_samples=0, **options
    ).train()
    plain = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path / "plain", Trainer, **plain).train()
    return tmp_path


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        ("without", None, "was trained without l2sp_fisher_samples, and its weights are no longer"),
        ("plain", None, "at step 2 the weights have moved, and no Fisher information is on record"),
        ("with", "delete", f"{FISHER} is missing, so w is lost"),
        ("with", "replace", f"{FISHER} is not the one that the checkpoint was trained with, so w is lost"),
    ],
)
def test_resume_without_the_weights_is_refused(trained, tiny_bert_dir, classification_data, run, change, message):
    file = Path(trained / run / "checkpoint-2" / FISHER)
    if change is not None:
        stored = load_file(file)
        file.unlink()
        if change == "replace":
            save_file({n: w * 2 for n, w in stored.items()}, file)
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, trained / run)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(trained / run / "checkpoint-2"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [(0, "was trained with l2sp_fisher_samples=10; without it w is now another one"), (5, "w stays the one on 10 in")],
)
def test_resume_with_another_number_says_so(trained, tiny_bert_dir, classification_data, caplog, samples, message):
    trainer = make_trainer(
        load_classifier(tiny_bert_dir), classification_data, trained / "with", l2sp_fisher_samples=samples, max_steps=3
    )
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(trained / "with" / "checkpoint-2"))
    assert message in caplog.text


def test_unwritable_file_says_what_to_do(tiny_bert_dir, classification_data, tmp_path):
    trainer = make_trainer(load_classifier(tiny_bert_dir), classification_data, tmp_path)
    (tmp_path / FISHER).mkdir()
    (tmp_path / FISHER / "mine").touch()
    with pytest.raises(OSError, match=rf"{FISHER} cannot be written .*set l2sp_fisher_samples=0"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == [FISHER]

"""The warning about heads that ignore the number of items, and that looking for them leaves no trace."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.heads import warn_if_head_ignores_item_count


def built(model, data, output_dir, accumulation=2, loss=None, **options):
    args = L2SPTrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return L2SPTrainer(model=model, args=args, train_dataset=data, compute_loss_func=loss)


def about_heads(messages):
    return [message for message in messages if "num_items_in_batch" in message]


def batch_of(data):
    return {name: torch.stack([example[name] for example in data[:2]]) for name in data[0]}


def probe(trainer, inputs, parent=None, **kwargs):
    kwargs.setdefault("num_items_in_batch", torch.tensor(4))
    parent = Trainer.compute_loss.__get__(trainer) if parent is None else parent
    warn_if_head_ignores_item_count(trainer, parent, trainer.model, inputs, (), kwargs)


@pytest.fixture
def trainer(classifier, classification_data, output_dir):
    """Not trained; its head ignores the count, whatever it does with it in this version of transformers."""
    return built(classifier.train(), classification_data, output_dir)


# --- in training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_classifier(classifier, classification_data, output_dir, warnings_of_library, accumulation):
    trainer = built(classifier, classification_data, output_dir, accumulation)
    trainer.train()
    # Before 5.0 such heads took no loss arguments, and Trainer divided by the accumulation steps itself.
    inflated = accumulation > 1 and trainer.model_accepts_loss_kwargs
    found = about_heads(warnings_of_library)
    assert len(found) == int(inflated)
    for message in found:
        assert message.startswith(
            "BertForSequenceClassification ignores num_items_in_batch, so the task gradient is 2"
        )
        assert "gradient_accumulation_steps=2 on 1 process(es) (transformers issue 47688)" in message
        assert "weighs 2 times less" in message
        assert "Set `model.accepts_loss_kwargs = False` before the trainer is built." in message


def test_the_cure_cures(classifier, classification_data, output_dir, warnings_of_library):
    classifier.accepts_loss_kwargs = False
    built(classifier, classification_data, output_dir).train()
    assert about_heads(warnings_of_library) == []


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_count(name, language_data, output_dir, warnings_of_library, request):
    trainer = built(request.getfixturevalue(name), language_data, output_dir)
    trainer.train()
    assert trainer._l2sp_head_checked
    assert about_heads(warnings_of_library) == []


def test_nothing_is_looked_for_without_a_penalty(classifier, classification_data, output_dir, warnings_of_library):
    trainer = built(classifier, classification_data, output_dir, l2sp_lambda=0)
    trainer.train()
    assert not hasattr(trainer, "_l2sp_head_checked")
    assert about_heads(warnings_of_library) == []


@pytest.mark.parametrize("divides", [False, True])
def test_loss_function_of_ones_own(classifier, classification_data, output_dir, warnings_of_library, divides):
    def loss(outputs, labels, num_items_in_batch=None):
        losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        return losses.sum() / num_items_in_batch if divides else losses.mean()

    built(classifier, classification_data, output_dir, loss=loss).train()
    found = about_heads(warnings_of_library)
    assert len(found) == int(not divides)
    for message in found:
        assert message.startswith("compute_loss_func ignores num_items_in_batch")
        assert message.endswith("Divide by num_items_in_batch in compute_loss_func.")


def test_looking_does_not_change_the_training(tiny_bert_dir, classification_data, tmp_path):
    from transformers import BertForSequenceClassification, set_seed

    results = []
    for checked in (False, True):
        set_seed(3)
        model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
        trainer = built(model, classification_data, str(tmp_path))
        if checked:
            trainer._l2sp_head_checked = True
        trainer.train()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the probe by itself --------------------------------------------------------------------------------------------


def test_warns_once(trainer, classification_data, warnings_of_library):
    for _ in range(3):
        probe(trainer, batch_of(classification_data))
    assert len(about_heads(warnings_of_library)) == 1


@pytest.mark.parametrize("draws", [False, True])
def test_leaves_random_numbers_modes_gradients_and_inputs_as_they_were(trainer, classification_data, draws):
    inputs = batch_of(classification_data)
    if draws:
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: torch.rand(())
    names = list(inputs)
    states = (torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate())
    probe(trainer, inputs)
    assert trainer._l2sp_head_checked
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == numpy.random.get_state()[1]).all() and states[2] == random.getstate()
    assert all(module.training for module in trainer.model.modules())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert list(inputs) == names


def test_leaves_a_part_in_evaluation_mode_as_it_was(trainer, classification_data):
    trainer.model.bert.embeddings.eval()
    probe(trainer, batch_of(classification_data))
    assert not any(module.training for module in trainer.model.bert.embeddings.modules())
    assert trainer.model.classifier.training


def test_mode_is_restored_after_an_error(trainer):
    with pytest.raises(ValueError):
        probe(trainer, {"labels": torch.tensor([0])})
    assert trainer.model.training


def test_another_trainers_loss_is_not_called(trainer, classification_data, warnings_of_library):
    class Keeping:
        def compute_loss(self, *args, **kwargs):
            raise AssertionError("called")

    probe(trainer, batch_of(classification_data), Keeping().compute_loss)
    assert about_heads(warnings_of_library) == []


@pytest.mark.parametrize("kwargs", [{"num_items_in_batch": None}, {"num_items_in_batch": 4}], ids=str)
def test_count_may_be_absent_or_a_number(trainer, classification_data, warnings_of_library, kwargs):
    probe(trainer, batch_of(classification_data), **kwargs)
    assert len(about_heads(warnings_of_library)) == int(kwargs["num_items_in_batch"] is not None)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_loss_that_tells_nothing(trainer, classification_data, warnings_of_library, value):
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: torch.tensor(value)
    probe(trainer, batch_of(classification_data))
    assert about_heads(warnings_of_library) == []


def test_other_processes_are_silent(trainer, classification_data, warnings_of_library):
    trainer.is_world_process_zero = lambda: False
    probe(trainer, batch_of(classification_data))
    assert about_heads(warnings_of_library) == []


def test_accumulation_and_processes_multiply(trainer, classification_data, warnings_of_library):
    trainer.accelerator = SimpleNamespace(num_processes=3)
    probe(trainer, batch_of(classification_data))
    assert "is 6 times too large" in about_heads(warnings_of_library)[0]

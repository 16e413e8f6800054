"""L2SPSeq2SeqTrainer, on a tiny T5 with tied embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_l2sp import L2SPSeq2SeqTrainer, L2SPSeq2SeqTrainingArguments

from .contract import LAM, Family, TrainerContract, sentences, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny_t5_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny_t5")
    set_seed(4)
    sizes = {"vocab_size": 90, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    T5ForConditionalGeneration(T5Config(**sizes, **tokens)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def family(tiny_t5_dir) -> Family:
    def load(folder: str = tiny_t5_dir, dropout: float = 0.0) -> T5ForConditionalGeneration:
        model = T5ForConditionalGeneration.from_pretrained(folder, dropout_rate=dropout)
        # Its loss is a mean over the micro-batch, which Trainer then has to divide (transformers issue 47688).
        model.accepts_loss_kwargs = False
        return model

    def inputs(model: T5ForConditionalGeneration) -> dict[str, Any]:
        tokenizer = tiny_tokenizer(frame=True)
        rows = [
            {"input_ids": tokenizer(text)["input_ids"], "labels": tokenizer(target)["input_ids"]}
            for text, target in zip(sentences(16, 6), sentences(16, 3, 1), strict=True)
        ]
        return {
            "train_dataset": rows[:12],
            "eval_dataset": rows[12:],
            "processing_class": tokenizer,
            "data_collator": DataCollatorForSeq2Seq(tokenizer, model),
            "compute_metrics": lambda prediction: {"generated": prediction.predictions.tolist()},
        }

    return Family(
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        L2SPSeq2SeqTrainer,
        L2SPSeq2SeqTrainingArguments,
        load,
        tiny_t5_dir,
        inputs,
        card_tags=frozenset({"generated_from_trainer"}),
        # The evaluation generates: `eval_generated` holds the tokens.
        arguments={"predict_with_generate": True, "generation_max_length": 5},
    )


class TestSeq2Seq(TrainerContract):
    def test_evaluation_without_generation(self, family, tmp_path):
        """Another way through the trainer, by `compute_loss`."""

        def inputs(model):
            return {k: v for k, v in family.inputs(model).items() if k != "compute_metrics"}

        self.test_evaluation_is_that_of_the_plain_trainer(replace(family, inputs=inputs, arguments={}), tmp_path)


def test_prediction_generates_as_the_plain_trainer_does(family, tmp_path):
    trainer = family.build("l2sp", tmp_path / "l2sp", l2sp_lambda=5.0, learning_rate=0.5)
    trainer.train()
    plain = family.build("plain", tmp_path / "plain", model=trainer.model)
    ours, theirs = (t.predict(t.eval_dataset, num_beams=2) for t in (trainer, plain))
    assert ours.predictions.shape[0] == 4 and (ours.predictions == theirs.predictions).all()
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]
    assert not any("l2sp" in key for key in ours.metrics)


def test_tied_embeddings_count_once(family, tmp_path):
    trainer = family.build("l2sp", tmp_path, l2sp_lambda=LAM)
    model = trainer.model
    tied = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert all(module.weight is model.shared.weight for module in tied)
    origin = {id(p): p.detach().clone() for p in model.parameters()}
    trainer.train()
    distance = sum(float((p.detach() - origin[id(p)]).double().square().sum()) for p in model.parameters()) ** 0.5
    assert trainer.l2sp_drift_report().total.distance == pytest.approx(distance, rel=1e-6)
    assert distance > 0.01


def test_head_that_ignores_the_item_count_is_told(family, tmp_path, warnings_of_library):
    """The task gradient of T5 is multiplied by the accumulation steps in transformers 5; the penalty is not."""
    model = family.load()
    del model.accepts_loss_kwargs
    trainer = family.build("l2sp", tmp_path, model=model, gradient_accumulation_steps=2, l2sp_lambda=LAM)
    if not trainer.model_accepts_loss_kwargs:
        pytest.skip("this version of transformers divides the loss of T5 itself")
    trainer.train()
    assert any("T5ForConditionalGeneration ignores num_items_in_batch" in message for message in warnings_of_library)
    assert all(torch.isfinite(p).all() for p in model.parameters())

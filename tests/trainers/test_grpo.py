"""TRL's GRPOTrainer with L2-SP: it generates inside the training step and refuses `return_outputs=True`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_l2sp import L2SPArguments, L2SPMixin, l2sp_penalty

from .contract import LAM, Family, TrainerContract, sentences, tiny_tokenizer

pytest.importorskip("trl", reason="trl is an extra")

from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class L2SPGRPOConfig(L2SPArguments, GRPOConfig): ...


class L2SPGRPOTrainer(L2SPMixin, GRPOTrainer): ...


def even_words(completions: list[str], **kwargs: Any) -> list[float]:
    """How many words of a completion have an even number."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in text.split())) for text in completions]


@pytest.fixture
def family(tiny_llama_dir) -> Family:
    def load(folder: str = tiny_llama_dir, dropout: float = 0.0) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, attention_dropout=dropout)

    def inputs(model: LlamaForCausalLM) -> dict[str, Any]:
        data = Dataset.from_dict({"prompt": sentences(16, 4, 1)})
        return {
            "train_dataset": data.select(range(12)),
            "eval_dataset": data.select(range(12, 16)),
            "reward_funcs": even_words,
            "processing_class": tiny_tokenizer(),
        }

    return Family(
        GRPOTrainer,
        GRPOConfig,
        L2SPGRPOTrainer,
        L2SPGRPOConfig,
        load,
        tiny_llama_dir,
        inputs,
        card_tags=frozenset({"trl", "grpo"}),
        # β is the weight of the divergence from the reference model, which GRPOTrainer loads by itself.
        arguments={"num_generations": 4, "max_completion_length": 4, "beta": 0.1},
        own_keys=frozenset({"reward", "kl"}),
    )


class TestGRPO(TrainerContract):
    pass


def test_flags_of_compute_loss_are_forwarded_and_never_forced(family, tmp_path):
    """Outside a step the loss has the penalty in it; outputs are asked for only where the caller asks."""
    trainer = family.build("l2sp", tmp_path, l2sp_lambda=LAM, learning_rate=0.5)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(batch)
        task = trainer.compute_loss(trainer.model, inputs)
    # The same numbers in training mode: no dropout acts in this model.
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=None)
    penalty = LAM * float(l2sp_penalty(trainer.model, trainer.l2sp_anchor).detach())
    assert penalty > 1e-3
    assert float(loss.detach()) == pytest.approx(float(task) + penalty, rel=1e-4)
    for arguments, flags in (((True,), {}), ((), {"return_outputs": True})):
        with pytest.raises(ValueError, match="does not support returning outputs"):
            trainer.compute_loss(trainer.model, inputs, *arguments, **flags)


def test_generations_that_are_used_twice(family, tmp_path):
    """With `num_iterations` 2 every other step trains on the completions of the step before."""
    reused = replace(family, own_keys=frozenset({"kl"}))  # rewards are logged when they are given
    reused.check_gradient(tmp_path, num_iterations=2, max_steps=4)

"""TRL's DPOTrainer with L2-SP: the reference model is neither anchored nor touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_l2sp import L2SPArguments, L2SPMixin

from ..exactness.harness import snapshot
from .contract import Family, TrainerContract, sentences, tiny_tokenizer, training_logs

pytest.importorskip("trl", reason="trl is an extra")

from trl import DPOConfig, DPOTrainer  # noqa: E402


class L2SPDPOConfig(L2SPArguments, DPOConfig): ...


class L2SPDPOTrainer(L2SPMixin, DPOTrainer): ...


def data() -> dict[str, Any]:
    columns = {"prompt": sentences(16, 4, 1), "chosen": sentences(16, 3, 2), "rejected": sentences(16, 3, 3)}
    rows = Dataset.from_dict({k: [t if k == "prompt" else f" {t}" for t in v] for k, v in columns.items()})
    return {
        "train_dataset": rows.select(range(12)),
        "eval_dataset": rows.select(range(12, 16)),
        "processing_class": tiny_tokenizer(),
    }


@pytest.fixture
def family(tiny_llama_dir) -> Family:
    def load(folder: str = tiny_llama_dir, dropout: float = 0.0) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, attention_dropout=dropout)

    return Family(
        DPOTrainer,
        DPOConfig,
        L2SPDPOTrainer,
        L2SPDPOConfig,
        load,
        tiny_llama_dir,
        lambda model: {"ref_model": load(), **data()},
        card_tags=frozenset({"trl", "dpo"}),
        own_keys=frozenset({"rewards/margins", "logps/chosen"}),
    )


class TestDPO(TrainerContract):
    pass


@pytest.fixture
def implicit(family) -> Family:
    """Without a reference model: DPOTrainer loads it by the name of the policy, or computes its values beforehand."""
    return replace(family, inputs=lambda model: data())


@pytest.mark.parametrize(
    "arguments",
    [
        {"precompute_ref_log_probs": True},
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=["precompute", "ipo", "sigmoid+sft", "sync"],
)
def test_gradient_under_options(implicit, tmp_path, arguments):
    implicit.check_gradient(tmp_path, **arguments)


@pytest.mark.parametrize("kind", ["given", "implicit"])
def test_reference_is_neither_touched_nor_anchored(family, implicit, tmp_path, kind):
    trainer = (family if kind == "given" else implicit).build("l2sp", tmp_path, l2sp_lambda=0.3, learning_rate=0.5)
    origin = snapshot(trainer.ref_model)
    reference = {id(p) for p in trainer.ref_model.parameters()}
    trainer.train()
    assert trainer.l2sp_drift_report().total.distance > 0.01
    assert all(torch.equal(p, origin[n]) for n, p in trainer.ref_model.named_parameters())
    assert all(p.grad is None for p in trainer.ref_model.parameters())
    entries = trainer.l2sp_plan.entries
    assert entries.keys() == snapshot(trainer.model).keys()
    assert not reference & {id(entry.parameter) for entry in entries.values()}


def test_anchor_beside_a_precomputed_reference(implicit, tmp_path):
    """Its forward passes go through the model in training, before θ0 is taken."""
    origin = snapshot(implicit.load())
    trainer = implicit.build("l2sp", tmp_path, l2sp_lambda=0.3, precompute_ref_log_probs=True)
    trainer.train()
    assert trainer.l2sp_anchor.keys() == origin.keys()
    assert all(torch.equal(trainer.l2sp_anchor[name], origin[name]) for name in origin)


def test_reference_that_follows_the_policy_leaves_the_anchor(implicit, tmp_path):
    trainer = implicit.build(
        "l2sp", tmp_path, l2sp_lambda=0.3, learning_rate=0.5, sync_ref_model=True, ref_model_sync_steps=1
    )
    origin = snapshot(trainer.model)
    trainer.train()
    assert any(not torch.equal(p, origin[n]) for n, p in trainer.ref_model.named_parameters())
    assert all(torch.equal(trainer.l2sp_anchor[name], origin[name]) for name in origin)
    assert training_logs(trainer)[-1]["l2sp_distance"] > 0

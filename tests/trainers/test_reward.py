"""TRL's RewardTrainer with L2-SP: its head is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import LlamaForSequenceClassification

from hf_l2sp import L2SPArguments, L2SPMixin

from ..exactness.harness import Reference, snapshot
from .contract import LAM, Family, TrainerContract, check_pull, sentences, tiny_tokenizer

pytest.importorskip("trl", reason="trl is an extra")

import trl  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

RECENT = Version(trl.__version__) >= Version("1.0")


class L2SPRewardConfig(L2SPArguments, RewardConfig): ...


class L2SPRewardTrainer(L2SPMixin, RewardTrainer): ...


@pytest.fixture
def family(tiny_llama_dir) -> Family:
    def load(folder: str = tiny_llama_dir, dropout: float = 0.0) -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        return LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, attention_dropout=dropout)

    def inputs(model: LlamaForSequenceClassification) -> dict[str, Any]:
        data = Dataset.from_dict({"chosen": sentences(16, 5, 2), "rejected": sentences(16, 5, 3)})
        return {
            "train_dataset": data.select(range(12)),
            "eval_dataset": data.select(range(12, 16)),
            "processing_class": tiny_tokenizer(),
        }

    return Family(
        RewardTrainer,
        RewardConfig,
        L2SPRewardTrainer,
        L2SPRewardConfig,
        load,
        tiny_llama_dir,
        inputs,
        card_tags=frozenset({"trl", "reward-trainer"}),
        own_keys=frozenset({"accuracy", "margin"} if RECENT else {}),
        new=("score.weight",),
    )


class TestReward(TrainerContract):
    pass


def test_centering_of_rewards(family, tmp_path):
    family.check_gradient(tmp_path, center_rewards_coefficient=0.1)


def test_beta_pulls_the_head_to_zero(family, tmp_path):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    plain = family.record("plain", tmp_path / "plain", **settings)
    penalised = family.record("l2sp", tmp_path / "l2sp", l2sp_lambda=LAM, l2sp_beta=0.7, **settings)
    check_pull(plain, penalised, Reference(snapshot(family.load()), LAM, beta=0.7, new=family.new))
    head = {n: p for n, p in penalised.trainer.model.named_parameters() if n in family.new}
    assert head and all(float(p.abs().max()) > 0 for p in head.values())


@pytest.mark.skipif(not RECENT, reason="trl before 1.0 takes a model only")
def test_model_by_its_name_has_a_new_head(family, tiny_llama_dir, tmp_path):
    config = L2SPRewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    trainer = L2SPRewardTrainer(tiny_llama_dir, args=config, **family.inputs(None))
    trainer.train()
    assert {n for n, e in trainer.l2sp_plan.entries.items() if e.role == "new"} == {"score.weight"}

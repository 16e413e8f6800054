"""TRL's SFTTrainer with L2-SP."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import LlamaForCausalLM

from hf_l2sp import L2SPArguments, L2SPMixin, L2SPTrainingArguments

from ..exactness.harness import relative_error, snapshot
from .contract import L2SP_KEYS, Family, TrainerContract, sentences, tiny_tokenizer, training_logs

pytest.importorskip("trl", reason="trl is an extra")

import trl  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class L2SPSFTConfig(L2SPArguments, SFTConfig): ...


class L2SPSFTTrainer(L2SPMixin, SFTTrainer): ...


@pytest.fixture
def family(tiny_llama_dir) -> Family:
    def load(folder: str = tiny_llama_dir, dropout: float = 0.0) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, attention_dropout=dropout)

    def inputs(model: LlamaForCausalLM) -> dict[str, Any]:
        texts = sentences(16, 6)
        return {
            "train_dataset": Dataset.from_dict({"text": texts[:12]}),
            "eval_dataset": Dataset.from_dict({"text": texts[12:]}),
            "processing_class": tiny_tokenizer(),
        }

    return Family(
        SFTTrainer,
        SFTConfig,
        L2SPSFTTrainer,
        L2SPSFTConfig,
        load,
        tiny_llama_dir,
        inputs,
        card_tags=frozenset({"trl", "sft"}),
        own_keys=frozenset({"mean_token_accuracy", "num_tokens"}),
    )


class TestSFT(TrainerContract):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        {"neftune_noise_alpha": 5.0},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 14},
        {"loss_type": "dft"},
        {"bf16": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_gradient_under_options(family, tmp_path, arguments):
    missing = arguments.keys() - {field.name for field in fields(SFTConfig)}
    if missing:
        pytest.skip(f"this version of trl has no {', '.join(missing)}")
    family.check_gradient(tmp_path, **arguments)


def test_gradient_on_prompts_with_completions_of_any_length(family, tmp_path):
    """The loss is a mean over the tokens of the completions of all micro-batches (in trl 1, to rounding)."""

    def inputs(model):
        texts = sentences(12, 8)
        rows = [{"prompt": t[:8] + " ", "completion": " ".join(t.split()[: 1 + i % 5])} for i, t in enumerate(texts)]
        return {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}

    (whole, _), (accumulated, _) = replace(family, inputs=inputs).check_gradient(tmp_path)
    for a, b in zip(whole.gradients, accumulated.gradients, strict=True):
        assert relative_error(a, b) < (1e-5 if Version(trl.__version__) >= Version("1.0") else 1e-2)


def test_activations_saved_elsewhere(family, tmp_path):
    """What `activation_offloading` does around a training step, on the CPU: hooks over all saved tensors."""

    def prepare(trainer):
        trainer.maybe_activation_offload_context = torch.autograd.graph.save_on_cpu()

    family.check_gradient(tmp_path, prepare)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TRL's activation offloading needs an accelerator")
def test_activation_offloading(family, tmp_path):
    family.check_gradient(tmp_path, activation_offloading=True, use_cpu=False)


@pytest.mark.skipif(
    find_spec("liger_kernel") is None or not torch.cuda.is_available(),
    reason="needs liger-kernel, whose Triton kernels need a GPU",
)
@pytest.mark.filterwarnings("ignore:.*use_liger_kernel:FutureWarning")
def test_liger_kernels(family, tmp_path):
    family.check_gradient(tmp_path, use_liger_kernel=True, use_cpu=False)


def test_auto_find_batch_size_keeps_the_first_anchor(family, tmp_path):
    class OutOfMemoryOnce(L2SPSFTTrainer):
        failed = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1 and not self.failed:
                type(self).failed = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return loss

    origin = snapshot(family.load())
    trainer = replace(family, l2sp=OutOfMemoryOnce).build(
        "l2sp", tmp_path, auto_find_batch_size=True, l2sp_lambda=0.3, learning_rate=0.5
    )
    trainer.train()
    assert OutOfMemoryOnce.failed and trainer._train_batch_size < 4
    # A step was taken before the failure: the anchor is older than that.
    assert all(torch.equal(trainer.l2sp_anchor[name], origin[name]) for name in trainer.l2sp_anchor)
    logs = training_logs(trainer)
    assert len(logs) == 3 and all(log["l2sp_distance"] > 0 for log in logs)


def test_model_by_its_name_is_its_own_anchor(family, tiny_llama_dir, tmp_path):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "disable_tqdm": True}
    inputs = family.inputs(None)
    trainer = L2SPSFTTrainer(tiny_llama_dir, args=L2SPSFTConfig(output_dir=str(tmp_path), **settings), **inputs)
    trainer.train()
    assert trainer.l2sp_anchor.source == tiny_llama_dir
    assert len(trainer.l2sp_anchor) == len(list(trainer.model.parameters()))


def test_rows_of_a_cloned_chat_template_have_no_anchor(family, tiny_llama_dir, tmp_path):
    """SFTTrainer adds another tokenizer's special tokens and resizes the embeddings when it is built."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<end>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}<turn> {{ message['content'] }} <end>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    trainer = family.build("l2sp", tmp_path / "run", chat_template_path=str(tmp_path / "chat"), l2sp_lambda=0.3)
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    trainer.train()
    assert rows > 90
    vocabulary = {n: e for n, e in trainer.l2sp_plan.entries.items() if e.parameter.shape[0] == rows}
    assert vocabulary.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(entry.rows == 90 for entry in vocabulary.values())


def test_plain_config_takes_the_defaults(family, tmp_path):
    trainer = replace(family, l2sp_config=SFTConfig).build("l2sp", tmp_path)
    assert type(trainer.args) is SFTConfig
    trainer.train()
    assert all(log["l2sp_lambda"] == 0.01 and L2SP_KEYS <= log.keys() for log in training_logs(trainer))


def test_arguments_of_another_trainer_are_not_dropped_in_silence(family, tmp_path):
    """SFTTrainer makes an SFTConfig of other TrainingArguments, which cannot take the fields of L2-SP."""
    with pytest.raises(TypeError, match="l2sp_lambda"):
        replace(family, l2sp_config=L2SPTrainingArguments).build("l2sp", tmp_path)

"""The gradient that the optimizer sees is that of mean task loss + λΣw‖θ−θ0‖² + β‖θ_new‖², in every case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from hf_l2sp import L2SPTrainer

from .harness import Reference, Run, expected_gradients, relative_error, run, snapshot

LAM = 0.3
HEAD = ("classifier.weight", "classifier.bias")
WINDOWS = {"1": (1, 12), "4": (4, 12), "4-short": (4, 10)}


class Linear(nn.Module):
    """A model that transformers has never seen and that takes no loss arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@dataclass
class Case:
    make: Callable[[], nn.Module]
    reference: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    language_model: bool = False
    tolerance: float = 1e-5
    trainable: Callable[[nn.Module, int], set[str]] = lambda model, step: {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def mean_loss(outputs, labels, num_items_in_batch=None):
    loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else len(labels))


class Unfreeze(TrainerCallback):
    """Unfreezes the embeddings after the first step, and moves them after the second."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.bert.embeddings.requires_grad_(True)
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in model.bert.embeddings.parameters():
                    parameter.add_(0.02)


def optimizer_over_all(trainer: Trainer) -> None:
    # Trainer's own optimizer would not know the parameters that are frozen when it is made.
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0)


def emulate_scaler(trainer: Trainer) -> None:
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.fixture
def cases(tiny_bert_dir, tmp_path):
    def bert(**kwargs):
        return BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, **kwargs)

    def without_kwargs():
        model = bert()
        model.accepts_loss_kwargs = False
        return model

    folder = tmp_path / "five_labels"
    BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=5).save_pretrained(folder)

    def mismatched():
        return BertForSequenceClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)

    def resized():
        model = bert()
        model.resize_token_embeddings(107)
        return model

    def frozen():
        model = bert()
        model.bert.embeddings.requires_grad_(False)
        return model

    def scratch():
        torch.manual_seed(3)
        config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
        return BertForSequenceClassification(BertConfig(**config, num_labels=3))

    def saved(model, name):
        if not (tmp_path / name).exists():
            model.save_pretrained(tmp_path / name)
        return type(model).from_pretrained(tmp_path / name)

    def gpt2():
        torch.manual_seed(3)
        config = GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return saved(GPT2LMHeadModel(config), "gpt2")

    def llama():
        torch.manual_seed(3)
        config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
        return saved(LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=2)), "llama")

    def other_anchor():
        # The trainer is given other weights than θ0.
        model = bert()
        with torch.no_grad():
            for parameter in model.bert.parameters():
                parameter.mul_(1.1)
        return model

    origin = snapshot(bert())
    generator = torch.Generator().manual_seed(5)
    fisher = {n: torch.rand(t.shape, generator=generator) for n, t in origin.items()}
    save_file(fisher, tmp_path / "fisher.safetensors")
    layer_weight = lambda n: 4.0 if "layer.0" in n else 0.5 if "embeddings" in n else 1.0  # noqa: E731
    excluded = lambda n: 0.0 if "LayerNorm" in n or "bias" in n else 1.0  # noqa: E731
    return {
        "bert": Case(bert),
        "no-loss-kwargs": Case(without_kwargs),
        "label-smoothing": Case(bert, arguments={"label_smoothing_factor": 0.1}),
        "compute-loss-func": Case(bert, run={"trainer_kwargs": {"compute_loss_func": mean_loss}}),
        "causal-lm": Case(llama, {"new": ()}, language_model=True),
        "tied-weights": Case(gpt2, {"new": ()}, language_model=True),
        "bf16-autocast": Case(bert, arguments={"bf16": True}),
        "bf16-weights": Case(lambda: bert(dtype=torch.bfloat16), tolerance=1e-2),
        "float64": Case(lambda: bert(dtype=torch.float64), tolerance=1e-12),
        "grad-scaler": Case(
            bert,
            # The fused AdamW takes the scale off by itself, after the gradients are recorded.
            arguments={"optim": "adamw_torch"},
            run={"prepare": emulate_scaler},
        ),
        "model-init": Case(lambda: bert(), run={"model_init": True}),
        "max-steps": Case(bert, arguments={"max_steps": 3}),
        "torch-compile": Case(bert, arguments={"torch_compile": True, "torch_compile_backend": "eager"}),
        "gradient-checkpointing": Case(bert, arguments={"gradient_checkpointing": True}),
        "mismatched-head": Case(mismatched),
        "deepcopied": Case(lambda: copy.deepcopy(bert())),
        "not-from-pretrained": Case(scratch, {"new": ()}),
        "foreign-module": Case(lambda: (torch.manual_seed(3), Linear())[1], {"new": ()}),
        "resized-embeddings": Case(resized, {"rows": {"bert.embeddings.word_embeddings.weight": 100}}),
        "excluded": Case(bert, {"weight": excluded}, {"l2sp_exclude": ["LayerNorm", r"bias$"]}),
        "pattern-weights": Case(
            bert, {"weight": layer_weight}, {"l2sp_weights": {r"layer\.0": 4.0, "embeddings": 0.5}}
        ),
        "fisher-file": Case(
            bert, {"weight": fisher.__getitem__}, {"l2sp_weights": str(tmp_path / "fisher.safetensors")}
        ),
        "beta": Case(bert, {"beta": 0.7}, {"l2sp_beta": 0.7}),
        "other-anchor": Case(other_anchor, {"origin": origin}, {"l2sp_anchor": tiny_bert_dir}),
        "offload-cpu": Case(bert, arguments={"l2sp_anchor_offload": "cpu"}),
        "offload-disk": Case(bert, arguments={"l2sp_anchor_offload": "disk"}),
        "anchor-bfloat16": Case(
            bert,
            {"origin": {n: t.to(torch.bfloat16) for n, t in origin.items()}},
            {"l2sp_anchor_dtype": "bfloat16"},
        ),
        "linear": Case(bert, {"course": "linear"}, {"l2sp_schedule": "linear"}),
        "cosine": Case(bert, {"course": "cosine"}, {"l2sp_schedule": "cosine"}),
        "unfrozen-later": Case(
            frozen,
            run={"callbacks": (Unfreeze(),), "prepare": optimizer_over_all},
            trainable=lambda model, step: {
                n for n, _ in model.named_parameters() if step > 0 or "embeddings" not in n
            },
        ),
    }


CASES = """bert no-loss-kwargs label-smoothing compute-loss-func causal-lm tied-weights bf16-autocast bf16-weights
float64
grad-scaler model-init max-steps torch-compile gradient-checkpointing mismatched-head deepcopied not-from-pretrained
foreign-module resized-embeddings excluded pattern-weights fisher-file beta other-anchor offload-cpu offload-disk
anchor-bfloat16 linear cosine unfrozen-later""".split()


def test_every_case_is_run(cases):
    assert set(cases) == set(CASES)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_the_objective(cases, name, windows, classification_data, tmp_path):
    case = cases[name]
    plain, penalised, reference = both(case, WINDOWS[windows], classification_data, tmp_path)
    model = penalised.trainer.model
    expected = expected_gradients(plain, reference, lambda step: case.trainable(model, step))
    assert len(expected) == len(penalised.gradients) == {"1": 12, "4": 3, "4-short": 3}[windows] or name == "max-steps"
    for step, (got, want) in enumerate(zip(penalised.gradients, expected, strict=True)):
        assert relative_error(got, want) < case.tolerance, f"step {step}"
        # The pull itself must be there and not be lost in a large task gradient.
        task = plain.gradients[step]
        pull = {n: got[n].double() - task[n].double() if n in task else got[n].double() for n in got}
        wanted_pull = {n: want[n] - task[n].double() if n in task else want[n] for n in want}
        assert relative_error(pull, wanted_pull) < (0.05 if case.tolerance > 1e-5 else 1e-4), f"step {step}"
    check_logs(plain, penalised, reference, case)


def check_logs(plain: Run, penalised: Run, reference: Reference, case: Case) -> None:
    """The logged loss is the objective: the plain run's task loss plus the penalty, counted once."""
    logs = [entry for entry in penalised.trainer.state.log_history if "loss" in entry]
    plain_logs = [entry for entry in plain.trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(plain_logs) == len(plain.weights)
    for step, (log, plain_log) in enumerate(zip(logs, plain_logs, strict=True)):
        trainable = case.trainable(penalised.trainer.model, step)
        penalty = reference.penalty(plain.weights[step], trainable, step, len(logs))
        assert log["l2sp_penalty"] == pytest.approx(penalty, rel=1e-5)
        assert log["task_loss"] == pytest.approx(plain_log["loss"], rel=1e-4, abs=1e-5)
        assert log["loss"] == pytest.approx(log["task_loss"] + log["l2sp_penalty"], rel=1e-6)
        keys = ("loss", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda")
        assert all(type(log[key]) is float for key in keys)


def both(case: Case, window: tuple[int, int], data, tmp_path) -> tuple[Run, Run, Reference]:
    accumulation, micro_batches = window
    rows = data[: 2 * micro_batches]
    if case.language_model:
        rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows]
    arguments = {
        "gradient_accumulation_steps": accumulation,
        "l2sp_lambda": LAM,
        **case.arguments,
    }
    plain = run(Trainer, case.make, rows, tmp_path / "plain", **case.run, **arguments)
    penalised = run(L2SPTrainer, case.make, rows, tmp_path / "l2sp", **case.run, **arguments)
    settings = {"origin": snapshot(case.make()), "lam": LAM, "new": HEAD, **case.reference}
    return plain, penalised, Reference(**settings)

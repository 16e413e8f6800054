"""With LoRA the optimizer sees the gradient of mean task loss + λ‖Σ s·BA‖², by a dense float64 reference."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments, drift_report, interpolate, l2sp_penalty
from hf_l2sp.adapters import base_name

from ..peft_models import adapted, train
from .harness import Run, relative_error, run, snapshot

peft = pytest.importorskip("peft", reason="adapters are those of the peft extra")

LAM, BETA = 0.3, 0.7
WINDOWS = {"1": (1, 12), "4": (4, 12), "4-short": (4, 10)}


@dataclass
class Case:
    config: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] | None = None  # another active adapter
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    "r8": Case(),
    "r64": Case({"r": 64}),
    "two-adapters": Case(second={"r": 4, "lora_alpha": 3}),
    "rslora-patterns": Case({"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"value": 5}}),
    "pissa": Case({"init_lora_weights": "pissa"}),
    "olora": Case({"init_lora_weights": "olora"}),
    "random-start": Case({"init_lora_weights": False}),
    "bias": Case({"bias": "all"}),
    "lora-bias": Case({"lora_bias": True}),
    "weights": Case(weight=2.5, arguments={"l2sp_weights": {"attention": 2.5}}),
    "beta": Case({"modules_to_save": ["classifier"]}, arguments={"l2sp_beta": BETA}),
    "saved-module": Case({"modules_to_save": ["pooler"]}),
    "checkpointing": Case(arguments={"gradient_checkpointing": True}),
}


def make(folder: str, case: Case):
    def build():
        torch.manual_seed(3)
        model = adapted(BertForSequenceClassification.from_pretrained(folder, num_labels=3), **case.config)
        if case.second is not None:
            model.add_adapter("other", peft.LoraConfig(target_modules=["query"], **case.second))
            model.base_model.set_adapter(["default", "other"])
        model.accepts_loss_kwargs = False
        return model

    return build


def dense(model, weights: dict[str, Tensor], start: dict[str, Tensor], case: Case) -> tuple[float, dict[str, Tensor]]:
    """λΣw‖Δ‖² + β‖θ_new‖² over whole products, and its gradients by autograd, from the test's own reading of PEFT."""
    leaves = {n: w.double().requires_grad_() for n, w in weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    used = set()
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        change: Any = 0.0
        shift: Any = 0.0
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            scale = layer.scaling[adapter]
            names = [f"{path}.lora_{factor}.{adapter}.weight" for factor in "BA"]
            change = change + scale * leaves[names[0]] @ leaves[names[1]]
            if case.config.get("init_lora_weights") in ("pissa", "olora"):
                change = change - scale * start[names[0]].double() @ start[names[1]].double()
            used.update(names)
            bias = f"{path}.lora_B.{adapter}.bias"
            if bias in leaves:
                shift = shift + scale * leaves[bias]
                used.add(bias)
        total = total + LAM * case.weight * change.square().sum()
        if isinstance(shift, Tensor):
            total = total + LAM * case.weight * shift.square().sum()
    for name, leaf in leaves.items():
        if name in used:
            continue
        if "classifier" in name:
            total = total + case.arguments.get("l2sp_beta", 0.0) * leaf.square().sum()
        else:
            total = total + LAM * case.weight * (leaf - start[name].double()).square().sum()
    total.backward()
    return float(total.detach()), {
        n: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for n, leaf in leaves.items()
    }


def both(folder, name: str, window: tuple[int, int], data, tmp_path) -> tuple[Run, Run]:
    case = CASES[name]
    accumulation, micro_batches = window
    arguments = {"gradient_accumulation_steps": accumulation, "l2sp_lambda": LAM, **case.arguments}
    rows = data[: 2 * micro_batches]
    return (
        run(Trainer, make(folder, case), rows, tmp_path / "plain", **arguments),
        run(L2SPTrainer, make(folder, case), rows, tmp_path / "l2sp", **arguments),
    )


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_penalty_against_dense_products(name, windows, tiny_bert_dir, classification_data, tmp_path):
    case = CASES[name]
    plain, penalised = both(tiny_bert_dir, name, WINDOWS[windows], classification_data, tmp_path)
    start = snapshot(make(tiny_bert_dir, case)())
    logs = [entry for entry in penalised.trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(plain.gradients) == len(penalised.gradients)
    trainable = {n for n, p in penalised.trainer.model.named_parameters() if p.requires_grad}
    for step, log in enumerate(logs):
        weights = {n: w for n, w in plain.weights[step].items() if n in trainable}
        penalty, pulls = dense(penalised.trainer.model, weights, start, case)
        expected = {n: plain.gradients[step][n].double() + pulls[n] for n in trainable}
        assert relative_error(penalised.gradients[step], expected) < 1e-5
        pull = {n: penalised.gradients[step][n].double() - plain.gradients[step][n].double() for n in trainable}
        assert relative_error(pull, pulls) < 1e-4  # what is left after subtracting float32 gradients
        assert log["l2sp_penalty"] == pytest.approx(penalty, rel=1e-5)


def trained(folder, data, tmp_path, name="run", config=None, resume=None, **arguments) -> L2SPTrainer:
    settings = {
        "output_dir": str(tmp_path / name),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "l2sp_lambda": LAM,
    }
    args = L2SPTrainingArguments(**settings | arguments)
    trainer = L2SPTrainer(model=make(folder, Case(config or {}))(), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def merged(trainer) -> dict[str, Tensor]:
    model = trainer.model.merge_and_unload()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_distance_is_that_of_the_merged_model(tiny_bert_dir, classification_data, tmp_path):
    trainer = trained(tiny_bert_dir, classification_data, tmp_path)
    report = trainer.l2sp_drift_report()
    origin = snapshot(BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3))
    after = merged(trainer)
    changed = [n for n in after if "query.weight" in n or "value.weight" in n]
    distance = sum(float((after[n].double() - origin[n].double()).square().sum()) for n in changed) ** 0.5
    norm = sum(float(origin[n].double().square().sum()) for n in changed) ** 0.5
    assert report.total.distance == pytest.approx(distance, rel=1e-5) and distance > 0.01
    assert report.total.drift == pytest.approx(distance / norm, rel=1e-5)
    assert set(report.layers) == {"bert.encoder.layer.0", "bert.encoder.layer.1"}
    assert report.counts["anchored"] == 4 * 32 * 32


def test_base_weights_are_not_copied(tiny_bert_dir, classification_data, tmp_path):
    trainer = trained(tiny_bert_dir, classification_data, tmp_path, config={"modules_to_save": ["pooler"]})
    anchor = trainer.l2sp_anchor
    assert anchor.nbytes == 0
    assert set(anchor) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # lent by the model
    original = trainer.model.base_model.model.bert.pooler.original_module.dense.weight
    assert anchor["bert.pooler.dense.weight"].data_ptr() == original.data_ptr()
    assert "4 by LoRA" in anchor.plan.summary()


def test_nothing_but_the_pull_remains_with_a_large_lambda(tiny_bert_dir, classification_data, tmp_path):
    free = trained(tiny_bert_dir, classification_data, tmp_path, "free", l2sp_lambda=1e-9, max_steps=12)
    held = trained(tiny_bert_dir, classification_data, tmp_path, "held", l2sp_lambda=100.0, max_steps=12)
    assert held.l2sp_drift_report().total.distance < 0.2 * free.l2sp_drift_report().total.distance


def test_lambda_zero_is_the_plain_trainer_bit_for_bit(tiny_bert_dir, classification_data, tmp_path):
    l2sp = trained(tiny_bert_dir, classification_data, tmp_path, l2sp_lambda=0.0)
    args = {k: v for k, v in l2sp.args.to_dict().items() if not k.startswith("l2sp_")}
    plain = Trainer(
        model=make(tiny_bert_dir, Case())(), args=TrainingArguments(**args), train_dataset=classification_data
    )
    plain.train()
    a, b = snapshot(l2sp.model), snapshot(plain.model)
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_resumed_equals_uninterrupted_and_another_base_is_refused(tiny_bert_dir, classification_data, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tiny_bert_dir, classification_data, tmp_path, "whole", **saving)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = json.loads((checkpoint / "l2sp_state.json").read_text())
    assert "bert.encoder.layer.0.attention.self.query.weight" in state["anchor"]["entries"]
    resumed = trained(tiny_bert_dir, classification_data, tmp_path, "resumed", resume=str(checkpoint), **saving)
    a, b = snapshot(whole.model), snapshot(resumed.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert resumed.l2sp_anchor.fingerprint == whole.l2sp_anchor.fingerprint

    other = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The anchor differs from the one that .* 1 of 4 tensors differ"):
        trained(str(tmp_path / "other"), classification_data, tmp_path, "refused", resume=str(checkpoint), **saving)


def test_penalty_for_loops_of_ones_own(tiny_bert_dir):
    model = make(tiny_bert_dir, Case())()
    anchor = Anchor.from_model(model)
    train(model)
    value = l2sp_penalty(model, anchor)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    expected, pulls = dense(model, weights, weights, Case())
    (LAM * value).backward()
    assert LAM * float(value) == pytest.approx(expected, rel=1e-6)
    assert relative_error({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, pulls) < 1e-5
    twice = l2sp_penalty(model, anchor, weights={r"query\.weight$": 0.0})
    values = {n: w for n, w in weights.items() if ".value." in n}
    assert LAM * float(twice) == pytest.approx(
        dense(model, {**weights, **_zeros(weights, "query")}, values, Case())[0]
    )


def _zeros(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {n: torch.zeros_like(w) for n, w in weights.items() if part in n}


def test_halfway_back_halves_the_change(tiny_bert_dir):
    model = make(tiny_bert_dir, Case())()
    anchor = Anchor.from_model(model)
    train(model)
    before = drift_report(model, anchor).total.distance
    interpolate(model, anchor, 0.5)
    assert drift_report(model, anchor).total.distance == pytest.approx(before / 2, rel=1e-6)


def test_refusals(tiny_bert_dir, classification_data, tmp_path):
    with pytest.raises(ValueError, match="L2-SP has no exact distance for DoRA"):
        trained(tiny_bert_dir, classification_data, tmp_path, config={"use_dora": True})
    with pytest.raises(ValueError, match="cannot be the θ0 of a model with PEFT adapters"):
        trained(tiny_bert_dir, classification_data, tmp_path, l2sp_anchor=tiny_bert_dir)
    pissa = make(tiny_bert_dir, CASES["pissa"])()
    with pytest.raises(ValueError, match="no factor of theirs leads back to θ0"):
        interpolate(pissa, Anchor.from_model(pissa), 0.5)
    model = make(tiny_bert_dir, Case())()
    with pytest.raises(ValueError, match="its distance is known as a whole only"):
        name = base_name("base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight")
        Anchor.from_model(model, weights={name: torch.ones(32, 32)})


def test_weight_decay_leaves_the_factors_alone(tiny_bert_dir, classification_data, tmp_path):
    trainer = trained(
        tiny_bert_dir, classification_data, tmp_path, config={"modules_to_save": ["classifier"]}, weight_decay=0.1
    )
    decayed = {n for g in trainer.optimizer.param_groups if g["weight_decay"] for n in map(id, g["params"])}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in decayed}
    assert names == {"base_model.model.classifier.modules_to_save.default.weight"}  # new: nothing else pulls it

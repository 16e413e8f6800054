"""Two processes do what one does, whatever is sharded and wherever the optimizer steps."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from .conftest import Launch

pytestmark = pytest.mark.distributed

LAM, BETA, RATE = 0.3, 0.7, 1e3
HEAD = ("classifier.weight", "classifier.bias")
NAMES = {
    "ddp": "Backend",
    "fsdp1": "FSDP1Backend",
    "fsdp2": "FSDP2Backend",
    "fsdp2-ram": "FSDP2Backend",
    "sharded-load": "DTensorBackend",
    "tp": "DTensorBackend",
}


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    error = sum(float((got[n].double() - expected[n].double()).square().sum()) for n in got)
    return math.sqrt(error / sum(float(expected[n].double().square().sum()) for n in got))


def examples(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.stack([torch.randint(1, 100, (10,), generator=generator) for _ in range(rows)])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(rows) % 3}


def pretrained(folder) -> BertForSequenceClassification:
    """As the worker makes it."""
    model = BertForSequenceClassification.from_pretrained(folder / "pretrained", num_labels=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def reference_gradient(folder, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Mean task loss over the eight examples plus the pull, in float64 and by autograd alone."""
    model = pretrained(folder).double()
    origin = load_file(folder / "origin" / "model.safetensors")
    batch = examples(8)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(logits, batch["labels"])
    for name, parameter in model.named_parameters():
        if name in HEAD:
            loss = loss + BETA * parameter.square().sum()
        else:
            weight = 1.0 if weights is None else weights[name].double()
            loss = loss + LAM * (weight * (parameter - origin[name.removeprefix("bert.")].double()).square()).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if not name.endswith("key.bias")}


def start_of(folder) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in pretrained(folder).named_parameters()}


def gradient_of(launch: Launch, run: str) -> dict[str, Tensor]:
    """What one step of gradient descent subtracted, by its learning rate."""
    before, after = start_of(launch.folder), launch.weights(run)
    return {n: (before[n].double() - after[n].double()) / RATE for n in after if not n.endswith("key.bias")}


def needs_equal_task(launch: Launch) -> None:
    if launch.backend == "fsdp2-ram":
        pytest.skip("with efficient loading plain Trainer on two processes does not compute on a CPU what one does")


def tolerance(launch: Launch, fp32: float, half: float) -> float:
    return half if in_half(launch) else fp32


def in_half(launch: Launch) -> bool:
    """Whether DeepSpeed keeps the weights in 16 bits (and an fp32 copy of them)."""
    return launch.backend.endswith(("bf16", "fp16"))


@pytest.mark.parametrize("run", ["gradient", "fisher"])
def test_gradient_against_float64(launch, run):
    needs_equal_task(launch)
    weights = load_file(launch.folder / "fisher.safetensors") if run == "fisher" else None
    error = relative_error(gradient_of(launch, run), reference_gradient(launch.folder, weights))
    assert error < tolerance(launch, 1e-5, 1e-2)


def test_trajectory_is_that_of_one_process(launch, single):
    needs_equal_task(launch)
    assert all(outcome["world"] == 2 for outcome in launch.outcomes) and single.outcomes[0]["world"] == 1
    assert relative_error(launch.weights("whole"), single.weights("whole")) < tolerance(launch, 1e-5, 1e-2)


def test_clipping_was_at_work(single):
    norms = [log["grad_norm"] for log in single.outcomes[0]["logs"]]
    assert max(norms) > 0.5 > min(norms)


def test_logged_penalty_is_that_of_one_process(launch, single):
    needs_equal_task(launch)
    for got, expected in zip(launch.outcomes[0]["logs"], single.outcomes[0]["logs"], strict=True):
        for key in ("l2sp_penalty", "l2sp_distance", "l2sp_drift", "loss", "task_loss"):
            assert got[key] == pytest.approx(expected[key], rel=tolerance(launch, 1e-6, 5e-2), abs=1e-6)


def test_every_rank_knows_the_whole_penalty(launch):
    first, second = (outcome["logs"] for outcome in launch.outcomes)
    for a, b in zip(first, second, strict=True):
        assert a["l2sp_penalty"] == b["l2sp_penalty"] and a["l2sp_distance"] == b["l2sp_distance"]


def test_anchor_takes_its_share_of_memory(launch, single):
    whole = single.outcomes[0]["nbytes"]
    parts = [outcome["nbytes"] for outcome in launch.outcomes]
    if launch.backend in ("ddp", "zero0"):  # nothing is sharded
        assert parts == [whole, whole]
        return
    if launch.backend == "tp":
        # Split are the two linear layers of each of two feed-forward blocks, but for the second one's bias.
        assert parts == [whole - 4 * 2 * (2 * 32 * 64 + 64) // 2] * 2
        return
    # Together they hold θ0 once; 16-bit weights are stored as such.
    assert sum(parts) == (whole // 2 if in_half(launch) else whole)
    assert max(parts) < 0.53 * sum(parts)


def test_identity_of_the_anchor_does_not_depend_on_the_launch(launch, single):
    if in_half(launch):
        pytest.skip("θ0 is the model's weights as DeepSpeed rounded them to 16 bits")
    assert {o["fingerprint"] for o in launch.outcomes} == {single.outcomes[0]["fingerprint"]}


def test_backend_and_roles(launch, single):
    outcome = launch.outcomes[0]
    assert outcome["backend"] == NAMES.get(launch.backend, "DeepSpeedBackend")
    assert outcome["roles"] == single.outcomes[0]["roles"]
    if launch.backend == "fsdp2-ram":
        return
    assert outcome["drift"] == pytest.approx(single.outcomes[0]["drift"], rel=tolerance(launch, 1e-5, 5e-2))


def test_resumed_as_far_as_plain_is(launch):
    if not launch.has("plain_resumed"):
        pytest.skip("plain Trainer cannot resume under this launch either")
    plain = relative_error(launch.weights("plain_resumed"), launch.weights("plain"))
    resumed = relative_error(launch.weights("resumed"), launch.weights("whole"))
    assert resumed == 0.0 if plain == 0.0 else resumed < 10 * plain
    outcome = launch.outcomes[0]
    assert outcome["resumed_fingerprint"] == outcome["fingerprint"]
    assert "The anchor differs from the one that" in outcome["other_anchor"]


def test_anchor_on_disk_trains_the_same(launch):
    assert relative_error(launch.weights("disk"), launch.weights("whole")) == 0.0


@pytest.mark.parametrize("start", ["True", "pissa"])
def test_lora_is_that_of_one_process(launch, single, start):
    needs_equal_task(launch)
    if start not in launch.outcomes[0]["lora"]:
        pytest.skip("PEFT neither copies nor decomposes a weight that is sharded already")
    logs = launch.outcomes[0]["lora"][start]
    assert len(logs) == 6 and logs[-1]["l2sp_distance"] > 0.01
    for got, expected in zip(logs, single.outcomes[0]["lora"][start], strict=True):
        for key in ("l2sp_penalty", "l2sp_distance", "loss"):
            assert got[key] == pytest.approx(expected[key], rel=tolerance(launch, 1e-5, 5e-2), abs=1e-6)


def test_lambda_zero_is_the_plain_trainer(launch):
    assert relative_error(launch.weights("zero"), launch.weights("plain")) == 0.0


def test_state_is_written_once_and_whole(launch, single):
    state = (launch.folder / "whole" / "l2sp_state.json").read_text()
    assert state.count('"fingerprint"') == 1
    assert not list((launch.folder / "whole").glob(".l2sp_state*"))


def test_evaluation_without_training_is_the_plain_trainers(launch):
    """The penalty is no part of it; where plain Trainer refuses, so does L2-SP's."""
    for outcome in launch.outcomes:
        plain, found = outcome["evaluated"]
        assert plain == found

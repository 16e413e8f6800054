"""What the recipes see to under several processes, without starting any."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import _recipe_launch  # noqa: E402
from _recipe_args import RecipeError, Settings  # noqa: E402
from _recipe_launch import (  # noqa: E402
    agreed,
    check_connected,
    check_layers,
    choose_device,
    loss_note,
    one_line_errors,
    say,
)

FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", *FSDP, *DEEPSPEED, "FSDP_TRANSFORMER_CLS_TO_WRAP"):
        monkeypatch.delenv(name, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def refuse(*_: Any) -> None:
    raise RecipeError("too short")


# --------------------------------------------------------------------------- who speaks


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say(f"from {rank}")
    assert capsys.readouterr().out == "from 0\n"


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [_recipe_launch.PATIENCE])])
def test_another_process_leaves_the_message_to_the_main_one(
    rank: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    slept: list[float] = []
    printed_before: list[str] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        printed_before.append(capsys.readouterr().err)

    monkeypatch.setattr(_recipe_launch.time, "sleep", sleep)
    monkeypatch.setattr(_recipe_launch.datasets, "disable_progress_bars", lambda: None)
    with pytest.raises(SystemExit, match="1"):
        one_line_errors(refuse)([])
    assert slept == waits and not any(printed_before)
    # Still there, so it was refused alone.
    assert capsys.readouterr().err == "error: too short\n"


# --------------------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("environment", "accelerator", "expected"),
    [
        ({}, False, False),
        ({"WORLD_SIZE": "1"}, False, False),
        ({"WORLD_SIZE": "2"}, False, True),
        ({"WORLD_SIZE": "2"}, True, False),
        ({"WORLD_SIZE": "2", **FSDP}, False, False),
        ({"WORLD_SIZE": "2", **DEEPSPEED}, False, False),
    ],
    ids=str,
)
def test_processes_without_an_accelerator_train_on_the_cpu(
    environment: dict[str, str], accelerator: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator)
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    settings = Settings(use_cpu=False)
    choose_device(settings)
    assert settings["use_cpu"] is expected


def arguments(kind: DistributedType, processes: int) -> Any:
    return SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=kind), world_size=processes)


CPU, GPU, NO, ZERO = (getattr(DistributedType, n) for n in ("MULTI_CPU", "MULTI_GPU", "NO", "DEEPSPEED"))


@pytest.mark.parametrize(
    ("environment", "kind", "processes"),
    [
        ({}, NO, 1),
        ({"WORLD_SIZE": "1"}, GPU, 1),
        ({"WORLD_SIZE": "2"}, CPU, 2),
        ({"WORLD_SIZE": "2"}, GPU, 2),
        ({"WORLD_SIZE": "2", **FSDP}, GPU, 2),
        ({"WORLD_SIZE": "2", **DEEPSPEED}, ZERO, 2),
    ],
    ids=str,
)
def test_connected_processes_pass(
    environment: dict[str, str], kind: DistributedType, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, environment)
    check_connected(arguments(kind, processes))


@pytest.mark.parametrize(
    ("environment", "kind", "processes", "message"),
    [
        ({}, NO, 1, r"2 processes were started, but they are not connected.*Add --use_cpu.*single\.yaml"),
        # What --ddp_backend gloo makes of a launch on the CPU: a group that nobody averages gradients over.
        ({}, NO, 2, r"are not connected: each would train alone"),
        ({}, GPU, 1, r"are not connected"),
        (FSDP, NO, 1, r"asks for FSDP, but its 2 processes run on the CPU.*cpu_ddp\.yaml"),
        (FSDP, CPU, 2, r"asks for FSDP, but"),  # --use_cpu: it would be DDP
        (DEEPSPEED, ZERO, 1, r"asks for DeepSpeed, but"),
        (DEEPSPEED, CPU, 2, r"asks for DeepSpeed, but"),
    ],
    ids=str,
)
def test_processes_that_would_train_alone_are_refused(
    environment: dict[str, str], kind: DistributedType, processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, {"WORLD_SIZE": "2", **environment})
    with pytest.raises(RecipeError, match=message):
        check_connected(arguments(kind, processes))


def test_a_layer_class_that_the_model_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, classifier: Any) -> None:
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer,T5Block")
    check_layers(classifier)  # DDP does not care
    set_environment(monkeypatch, FSDP)
    with pytest.raises(RecipeError, match=r"names 'T5Block', which BertForSeq\w+ does not have.*: 'BertLayer'\.$"):
        check_layers(classifier)
    check_layers(nn.ModuleList([type("T5Block", (nn.Module,), {})(), type("BertLayer", (nn.Module,), {})()]))
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    check_layers(classifier)


# --------------------------------------------------------------------------- one decision for all


class Broadcast:
    """Two processes, one after the other: the first leaves its list to the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Any] | None = None
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(_recipe_launch, "PartialState", lambda: SimpleNamespace(num_processes=2))
        monkeypatch.setattr(_recipe_launch, "broadcast_object_list", self)

    def __call__(self, items: list[Any]) -> None:
        if self.sent is None:
            self.sent = list(items)
        items[:] = self.sent

    def process(self, rank: int) -> None:
        self.monkeypatch.setenv("RANK", str(rank))


def test_the_main_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcast = Broadcast(monkeypatch)
    broadcast.process(0)
    assert agreed(lambda: "checkpoint-3") == "checkpoint-3"
    broadcast.process(1)
    assert agreed(lambda: pytest.fail("asked twice")) == "checkpoint-3"


def test_a_refusal_of_the_main_process_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcast = Broadcast(monkeypatch)
    for rank in (0, 1):
        broadcast.process(rank)
        with pytest.raises(RecipeError, match="^too short$"):
            agreed(refuse if rank == 0 else lambda: pytest.fail("asked twice"))


def test_one_process_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipe_launch, "broadcast_object_list", lambda items: pytest.fail("nobody to tell"))
    assert agreed(lambda: 3) == 3


@pytest.mark.parametrize(
    ("world", "batch", "rows", "splits"),
    [
        (2, 3, {"validation": 12, "test": 18}, None),
        (2, 4, {"train": 7, "validation": 16}, None),
        (1, 5, {"validation": 12}, None),
        (2, 1, {"validation": 13}, None),
        (2, 5, {"validation": 12, "test": 20}, "The validation loss"),
        (3, 4, {"validation": 13, "test": 8}, "The validation and test loss"),
    ],
)
def test_a_loss_that_counts_texts_more_than_once_is_noted(
    world: int, batch: int, rows: dict[str, int], splits: str | None
) -> None:
    note = loss_note(SimpleNamespace(world_size=world, eval_batch_size=batch), rows)
    assert (note is None) == (splits is None)
    if note is not None:
        assert note.startswith(f"{splits} counts some texts more than once") and f"{world} processes x {batch}" in note

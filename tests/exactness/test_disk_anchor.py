"""With θ0 mapped from disk every run is, bit for bit, the one with θ0 in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, TrainerCallback

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.storage import FILE_STEM

from ..helpers import saved
from .harness import snapshot

NAME = f"{FILE_STEM}.safetensors"
LOGGED = ("loss", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "grad_norm")


class UnfreezeEmbeddings(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.bert.embeddings.requires_grad_(True)


@dataclass
class Case:
    prepare: Callable[[BertForSequenceClassification], Any] = lambda model: None
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    other_anchor: bool = False
    unfreezes: bool = False
    files: tuple[str, ...] = ()


def freeze(model) -> None:
    model.bert.embeddings.requires_grad_(False)


def change(model) -> None:
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.mul_(1.01)


def in_own_memory(model) -> None:
    """transformers 4 maps the parameters themselves: writing over their file ruins them, with any trainer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


CASES = {
    "own file": Case(),
    "another anchor": Case(other_anchor=True),
    "another anchor, changed weights": Case(change, other_anchor=True),
    "changed weights": Case(change, files=(NAME,)),
    "resized": Case(lambda model: model.resize_token_embeddings(107)),
    "unfrozen later": Case(freeze, unfreezes=True),
    "unfrozen later, changed weights": Case(
        lambda model: (change(model), freeze(model)), unfreezes=True, files=(f"{FILE_STEM}-1.safetensors", NAME)
    ),
    "bfloat16 storage": Case(arguments={"l2sp_anchor_dtype": "bfloat16"}, files=(NAME,)),
    "bfloat16 model": Case(dtype=torch.bfloat16, files=(NAME,)),
    "float64 model": Case(dtype=torch.float64),
    "accumulation and weights": Case(
        arguments={"gradient_accumulation_steps": 2, "l2sp_weights": {"LayerNorm": 0.0, r"layer\.1": 3.0}}
    ),
}


@pytest.fixture(scope="module")
def folders(bert_config, tmp_path_factory) -> tuple[str, str]:
    """Two pretrained models."""
    made = []
    for seed, name in ((11, "pretrained"), (12, "origin")):
        torch.manual_seed(seed)
        model = BertModel(bert_config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        made.append(saved(tmp_path_factory.mktemp("models") / name, model))
    return made[0], made[1]


def trainer_for(
    case: Case, folders: tuple[str, str], data: Any, output: Path, offload: str, **arguments: Any
) -> L2SPTrainer:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folders[0], num_labels=3, dtype=case.dtype)
    case.prepare(model)
    settings = {
        "output_dir": str(output),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "l2sp_lambda": 0.3,
        "l2sp_anchor": folders[1] if case.other_anchor else None,
        "l2sp_anchor_offload": offload,
    }
    args = L2SPTrainingArguments(**settings | case.arguments | arguments)
    callbacks = [UnfreezeEmbeddings()] if case.unfreezes else []
    trainer = L2SPTrainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
    if case.unfreezes:  # Trainer's own optimizer would not know what is frozen when it is made
        trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return trainer


def logs(trainer: L2SPTrainer) -> list[dict[str, float]]:
    return [{key: log[key] for key in LOGGED} for log in trainer.state.log_history if "loss" in log]


def assert_same(a: L2SPTrainer, b: L2SPTrainer) -> None:
    first, second = snapshot(a.model), snapshot(b.model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert a.l2sp_anchor.fingerprint == b.l2sp_anchor.fingerprint


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_with_the_anchor_in_memory(name, folders, classification_data, tmp_path):
    case = CASES[name]
    memory = trainer_for(case, folders, classification_data, tmp_path / "memory", "none")
    memory.train()
    disk = trainer_for(case, folders, classification_data, tmp_path / "disk", "disk")
    disk.train()
    assert_same(memory, disk)
    assert logs(memory) == logs(disk) and logs(disk)[-1]["l2sp_distance"] > 0.05
    assert disk.l2sp_anchor.nbytes == 0 < memory.l2sp_anchor.nbytes
    assert sorted(path.name for path in (tmp_path / "disk").glob("*l2sp_anchor*")) == sorted(case.files)
    assert disk.l2sp_anchor.whereabouts() == "θ0 mapped from disk: 0.0 MiB"


@pytest.mark.parametrize("name", ["own file", "changed weights", "another anchor"])
def test_resumed_equals_uninterrupted(name, folders, classification_data, tmp_path):
    case, saving = CASES[name], {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(case, folders, classification_data, tmp_path / "whole", "none", **saving)
    whole.train()
    first = trainer_for(case, folders, classification_data, tmp_path / "disk", "disk", **saving)
    first.train()
    files = list((tmp_path / "disk").glob(f"{FILE_STEM}*"))
    before = [path.stat() for path in files]
    assert len(files) == len(case.files)
    resumed = trainer_for(case, folders, classification_data, tmp_path / "disk", "disk", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "disk" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(whole, resumed)
    for path, old in zip(files, before, strict=True):
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
    assert not list((tmp_path / "disk").glob("checkpoint-*/*l2sp_anchor*"))


def test_training_in_the_folder_of_the_pretrained_model(folders, classification_data, tmp_path):
    """save_model overwrites the file from which the model came; θ0 must not be mapped from it."""
    folder = saved(tmp_path / "run", BertModel.from_pretrained(folders[0]))
    case, here = Case(in_own_memory), (folder, folders[1])
    memory = trainer_for(case, folders, classification_data, tmp_path / "memory", "none")
    memory.train()
    memory.train()
    disk = trainer_for(case, here, classification_data, Path(folder), "disk")
    disk.train()
    disk.save_model()
    disk.train()
    assert_same(memory, disk)
    assert (Path(folder) / NAME).exists()


class WriteOver(TrainerCallback):
    """Changes one number of the pretrained model's file after the second step, in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with self.path.open("r+b") as file:
                file.seek(-3, 2)
                file.write(b"\x01")


def test_training_ends_when_the_mapped_file_is_written_in_place(folders, classification_data, tmp_path):
    folder = Path(saved(tmp_path / "pretrained", BertModel.from_pretrained(folders[0])))
    trainer = trainer_for(CASES["own file"], (str(folder), ""), classification_data, tmp_path / "run", "disk")
    trainer.add_callback(WriteOver(folder / "model.safetensors"))
    with pytest.raises(RuntimeError, match=r"model\.safetensors was changed during training; θ0 is mapped from it"):
        trainer.train()
    assert trainer.state.global_step == 2

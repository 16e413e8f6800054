"""Trains students under torchrun and writes down their weights and logs: distill_worker FOLDER."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer

from hf_l2sp.distill import L2SPDistillationTrainer

from .distillation import build, make_collator, make_data, make_model, make_tokenizer

TASKS = ["sequence", "token"]


def train_for_comparison(task: str, folder: Path, accumulation: int) -> Trainer:
    """Steps of 8 rows in micro-batches of 2, in float64."""
    tokenizer = make_tokenizer(folder / f"tokenizer-{os.environ.get('RANK', '0')}")
    data = make_data(task, 16, unlabelled=(0, 1, 2, 5, 8, 9, 10, 12))
    trainer = build(
        folder,
        make_model(task, 1).double(),
        data,
        cls=L2SPDistillationTrainer,
        tokenizer=tokenizer,
        collator=make_collator(task, tokenizer),
        trainer={
            "teacher": [make_model(task, 2).double(), make_model(task, 3).double()],
            "teacher_tokenizer": tokenizer,
        },
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.3,
        l2sp_lambda=0.1,
    )
    trainer.train()
    return trainer


def loss_logs(trainer: Trainer) -> list[dict[str, float]]:
    keys = ("loss", "task_loss", "distill_loss", "l2sp_penalty")
    return [{key: log[key] for key in keys} for log in trainer.state.log_history if "loss" in log]


def write_down(task: str, folder: Path) -> None:
    trainer = train_for_comparison(task, folder, accumulation=2)
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        save_file({name: p.detach().clone() for name, p in named}, folder / "weights.safetensors")
        (folder / "logs.json").write_text(json.dumps(loss_logs(trainer)))


def main() -> None:
    torch.set_num_threads(1)
    for task in TASKS:
        write_down(task, Path(sys.argv[1]) / task)
    # The models that DDP wrapped go before the group that they use: the last one to hold it waits for gloo's threads
    # without giving up the GIL, for which these may wait, and then hangs for ever (PyTorch 2.13).
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

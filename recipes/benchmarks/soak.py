"""Whether memory stays where it is in a long training: 2,000 steps with logs, evaluations and checkpoints.

    python recipes/benchmarks/soak.py [--steps 2000]

A small BERT is trained by plain Trainer and by L2SPTrainer with the log of every layer, each in a process of its own.
Every 50 steps, after a garbage collection, resident memory, the tensors that are alive and the objects that Python
collects are counted. What counts is the slope after a warm-up, beside that of plain Trainer: the log history grows in
both, and allocators have their ways. Writes results/soak.json.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from _bench import environment, write_results
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

STEPS, EVERY, WARM_UP, MIB = 2000, 50, 500, 1 << 20
MODES = ("plain", "l2sp")
CLASSES, LENGTH, BATCH = 3, 16, 8
COUNTS = ("resident_mib", "tensors", "objects")


class Sampler(TrainerCallback):
    """Counts what is there every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            objects = gc.get_objects()
            # By type: isinstance would wake lazy modules and other objects that pretend.
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
            resident = psutil.Process().memory_info().rss / MIB
            sample = {"step": state.global_step, "resident_mib": round(resident, 3), "tensors": tensors}
            self.samples.append({**sample, "objects": len(objects)})


def _data(rows: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 500, (LENGTH,), generator=generator),
            "attention_mask": torch.ones(LENGTH, dtype=torch.long),
            "labels": torch.tensor(row % CLASSES),
        }
        for row in range(rows)
    ]


def measure(mode: str, steps: int = STEPS, every: int = EVERY) -> dict[str, Any]:
    """Trains in this process.

    Args:
        mode: `plain` or `l2sp`.
        steps: Optimizer steps.
        every: Steps between two samples.

    Returns:
        The samples, and what was done besides: evaluations, logs, checkpoints that are left.
    """
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=500,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
        )
        BertModel(config).save_pretrained(f"{folder}/pretrained")
        model = BertForSequenceClassification.from_pretrained(f"{folder}/pretrained", num_labels=CLASSES)
        model.accepts_loss_kwargs = False
        settings: dict[str, Any] = {
            "output_dir": f"{folder}/output",
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // 20),
            "save_steps": max(1, steps // 20),
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        strengths = {"l2sp_lambda": 0.01, "l2sp_log_layers": True}
        trainer_class: type[Trainer] = Trainer if mode == "plain" else L2SPTrainer
        args = TrainingArguments(**settings) if mode == "plain" else L2SPTrainingArguments(**settings, **strengths)
        sampler = Sampler(every)
        data = {"train_dataset": _data(64), "eval_dataset": _data(16)}
        trainer = trainer_class(model=model, args=args, callbacks=[sampler], **data)
        trainer.pop_callback("PrinterCallback")  # of the logs, with the progress bar off
        trainer.train()
        history = trainer.state.log_history
        return {
            "samples": sampler.samples,
            "logs": sum("loss" in entry for entry in history),
            "evaluations": sum("eval_loss" in entry for entry in history),
            "checkpoints": len(list(Path(f"{folder}/output").glob("checkpoint-*"))),
        }


def slope(samples: list[dict[str, Any]], name: str, warm_up: int) -> float:
    """Growth per 1,000 steps, by least squares over the samples from `warm_up` on."""
    points = [(sample["step"], sample[name]) for sample in samples if sample["step"] >= warm_up]
    middle = [sum(values) / len(points) for values in zip(*points, strict=True)]
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    return 1000 * sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread


def growth(samples: list[dict[str, Any]], name: str, warm_up: int) -> float:
    """By how much the last sample is more than the first one from `warm_up` on."""
    after = [sample[name] for sample in samples if sample["step"] >= warm_up]
    return after[-1] - after[0]


def in_a_process(mode: str, steps: int = STEPS) -> dict[str, Any]:
    """`measure` in a process of its own, in which glibc gives freed memory back at once."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", mode, "--steps", str(steps)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.child:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.child, options.steps)))
        return
    runs = {mode: in_a_process(mode, options.steps) for mode in MODES}
    warm_up = min(WARM_UP, options.steps // 4)
    for run in runs.values():
        run["slope_per_1000_steps"] = {name: slope(run["samples"], name, warm_up) for name in COUNTS}
        run["growth_after_warm_up"] = {name: growth(run["samples"], name, warm_up) for name in COUNTS}
    about = {
        "what": f"BERT of 2 layers, 64 wide; {options.steps} steps of {BATCH} x {LENGTH} tokens, 1 thread",
        "steps": options.steps,
        "warm_up": warm_up,
        "environment": {**environment(), "threads": 1},
    }
    path = write_results("soak.json", {**about, **runs})
    for mode, run in runs.items():
        told = ", ".join(f"{name} {value:+.2f}" for name, value in run["slope_per_1000_steps"].items())
        print(f"{mode:<6} per 1,000 steps: {told}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

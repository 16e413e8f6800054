"""What l2sp_schedule="auto" takes: its share of the time of a training, and its memory beside a constant λ.

    python recipes/benchmarks/auto_cost.py [--repeats 3]

MiniLM, 50 steps of 16 × 64 tokens, fp32, AdamW, with 40 training rows and with 1,000. Every run is a process of its
own; the time is that spent on the labels, on running θ0 on some examples, on the losses and λ, against the rest of
the training in the same process, so that other load on the machine falls on both. Memory is the peak of anonymous
memory of /proc/self/status, hence on Linux only, in processes of their own in which what is freed goes back to the
system in small pieces, too: a batch of another size leaves gaps in the heap, which would be counted. Writes
results/auto_cost.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import embedded_model, environment, in_a_process, write_results
from datasets import Dataset
from memory import MIB, Peak
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

STEPS, BATCH, LENGTH, CLASSES = 50, 16, 64, 5
PIECE = 1 << 14


# Training rows.
CASES = {"40 rows": 40, "1000 rows": 1000}


def random_rows(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (count, LENGTH), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * LENGTH] * count, "labels": [row % CLASSES for row in range(count)]}
    )


class TimedTrainer(L2SPTrainer):
    """Keeps the time that was spent on what `auto` does."""

    measuring = 0.0

    def _timed(self, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = work(*args)
        self.measuring += time.perf_counter() - start
        return result

    def _l2sp_look_at_labels(self, *args: Any) -> None:
        self._timed(super()._l2sp_look_at_labels, *args)

    def _l2sp_note_loss(self, loss: Tensor) -> None:
        self._timed(super()._l2sp_note_loss, loss)

    def _l2sp_update_auto(self) -> None:
        self._timed(super()._l2sp_update_auto)


def measure(schedule: str, case: str) -> dict[str, Any]:
    """One training."""
    peak = Peak()
    peak.start()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=CLASSES)
    model.accepts_loss_kwargs = False
    with tempfile.TemporaryDirectory() as folder:
        args = L2SPTrainingArguments(
            output_dir=folder,
            l2sp_schedule=schedule,
            learning_rate=2e-4,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        trainer = TimedTrainer(model=model, args=args, train_dataset=random_rows(CASES[case]))
        start = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - start
    peak.running = False
    peak.join()
    assert trainer.l2sp_anchor is not None
    share = trainer.measuring / (taken - trainer.measuring)
    parameters = trainer.l2sp_anchor.plan.elements("anchored")
    return {"share": share, "peak": peak.bytes, "model": 4 * parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if not Path("/proc/self/status").exists():
        raise SystemExit("This benchmark reads /proc/self/status, which Linux alone has.")
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    found: dict[str, Any] = {}
    for case in CASES:
        timed, peaks = [], {"constant": [], "auto": []}
        for _ in range(options.repeats):
            timed.append(in_a_process(__file__, "--child", "auto", case))
            for schedule, done in peaks.items():
                done.append(in_a_process(__file__, "--child", schedule, case, given_back=PIECE)["peak"])
        added = statistics.median(peaks["auto"]) - statistics.median(peaks["constant"])
        found[case] = {
            "time_percent": 100 * statistics.median(run["share"] for run in timed),
            "memory_mib": added / MIB,
            "memory_percent_of_model": 100 * added / timed[0]["model"],
        }
        print(case, {name: round(value, 2) for name, value in found[case].items()}, flush=True)
    what = f"MiniLM-L6 (22.7M parameters), {STEPS} steps of {BATCH} x {LENGTH}; fp32, median of {options.repeats}"
    path = write_results("auto_cost.json", {"what": what, "cases": found, "environment": environment()})
    print(f"written to {path}")


if __name__ == "__main__":
    main()

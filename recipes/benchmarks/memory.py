"""What θ0 takes, by storage dtype and place: MiniLM, batch 8 × 128 tokens, fp32, AdamW.

    python recipes/benchmarks/memory.py [--repeats 3]

Every run is a process of its own. Its anonymous memory (of /proc/self/status, hence on Linux only) is what cannot be
dropped and read again, unlike pages of a mapped file; its peak is that over the whole run, beginning with loading.
glibc is told to give freed memory back at once, without which peaks differ by 10 MiB from run to run.
A last run trains on the clinical notes as the main job does, and measures what storing θ0 in bfloat16 costs in
exactness. Writes results/memory.json.
"""

import argparse
import json
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _bench import RECIPES, embedded_model, environment, in_a_process, write_results
from speed import BATCH, LENGTH, timed_step
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

DTYPES, OFFLOADS = ("auto", "bfloat16"), ("none", "cpu", "disk")
MODES = {"plain": ("auto", "none"), **{f"{dtype}/{place}": (dtype, place) for dtype in DTYPES for place in OFFLOADS}}
STEPS, TRAINED, MIB = 4, 30, 1 << 20
NOTES = RECIPES / "data" / "clinical_notes" / "train.jsonl"


class Peak(threading.Thread):
    """Watches this process' anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)
            time.sleep(0.002)


def make_trainer(folder: str, data: Any = (), collator: Any = None, **arguments: Any) -> L2SPTrainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=8)
    model.accepts_loss_kwargs = False
    settings = {"learning_rate": 1e-4, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = L2SPTrainingArguments(output_dir=folder, **{**settings, **arguments})
    return L2SPTrainer(model=model, args=args, train_dataset=list(data), data_collator=collator)


def measure(mode: str) -> dict[str, int]:
    """Peaks of a few steps and the size of θ0, in bytes."""
    dtype, place = MODES[mode]
    peak = Peak()
    peak.start()
    batch = {
        "input_ids": torch.randint(1000, 20000, (BATCH, LENGTH)),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.arange(BATCH) % 8,
    }
    with tempfile.TemporaryDirectory() as folder:
        strength = 0.0 if mode == "plain" else 0.01
        trainer = make_trainer(folder, l2sp_lambda=strength, l2sp_anchor_dtype=dtype, l2sp_anchor_offload=place)
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.current_gradient_accumulation_steps = 1
        for _ in range(STEPS):
            timed_step(trainer, batch)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    peak.running = False
    peak.join()
    anchor = trainer.l2sp_anchor
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous": peak.bytes,
        "anchor": anchor.nbytes if anchor else 0,
        "parameters": anchor.plan.elements("anchored") if anchor else 0,
        "written": written,
    }


def measure_rounding() -> dict[str, float]:
    """How far distance and gradient are off with θ0 in bfloat16, after some steps of the main job."""
    rows = [json.loads(line) for line in NOTES.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    data = [
        {**tokenizer(row["text"], truncation=True, max_length=128), "labels": labels.index(row["label"])}
        for row in rows
    ]
    settings = {"learning_rate": 3e-4, "per_device_train_batch_size": 16, "max_steps": TRAINED, "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, data, DataCollatorWithPadding(tokenizer), **settings)
        trainer.train()
    assert trainer.l2sp_anchor is not None
    exact, rounded, error = 0.0, 0.0, 0.0
    for name, origin in trainer.l2sp_anchor.items():
        moved = trainer.model.get_parameter(name).detach().double()
        difference, off = moved - origin.double(), moved - origin.bfloat16().double()
        exact += float(difference.square().sum())
        rounded += float(off.square().sum())
        error += float((off - difference).square().sum())
    return {
        "steps": TRAINED,
        "distance": exact**0.5,
        "squared": rounded / exact - 1.0,
        "gradient": (error / exact) ** 0.5,
    }


def table(runs: dict[str, list[dict[str, int]]]) -> list[dict[str, Any]]:
    def median(mode: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[mode])

    rows = []
    for mode, (dtype, place) in list(MODES.items())[1:]:
        resident = median(mode, "anonymous") - median("plain", "anonymous")
        parameters = runs[mode][0]["parameters"]
        rows.append(
            {
                "dtype": dtype,
                "offload": place,
                "resident_mib": resident / MIB,
                "resident_bytes_per_parameter": resident / parameters,
                "written_mib": median(mode, "written") / MIB,
                "written_bytes_per_parameter": median(mode, "written") / parameters,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=[*MODES, "rounding"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if not Path("/proc/self/status").exists():
        raise SystemExit("This benchmark reads /proc/self/status, which Linux alone has.")
    if options.child:
        print(json.dumps(measure_rounding() if options.child == "rounding" else measure(options.child)))
        return
    runs: dict[str, list[dict[str, int]]] = {mode: [] for mode in MODES}
    for _ in range(options.repeats):
        for mode in MODES:
            runs[mode].append(in_a_process(__file__, "--child", mode))
    peaks = {m: statistics.median(run["peak"] for run in runs[m]) / MIB for m in ("plain", "auto/none")}
    anonymous = [run["anonymous"] / MIB for run in runs["plain"]]
    anchor = runs["auto/none"][0]["anchor"] / MIB
    result = {
        "what": f"MiniLM-L6 (22.7M parameters) fp32, batch {BATCH} x {LENGTH}, median of {options.repeats} processes",
        "plain_peak_mib": peaks["plain"],
        "l2sp_peak_mib": peaks["auto/none"],
        "anchor_mib": anchor,
        "beyond_the_anchor_mib": peaks["auto/none"] - peaks["plain"] - anchor,
        "plain_anonymous_mib": statistics.median(anonymous),
        "plain_anonymous_range_mib": max(anonymous) - min(anonymous),
        "anchored_parameters": runs["auto/none"][0]["parameters"],
        "storage": table(runs),
        "bfloat16": in_a_process(__file__, "--child", "rounding"),
        "environment": environment(),
    }
    path = write_results("memory.json", result)
    print(f"plain  {peaks['plain']:8.1f} MiB\nL2-SP  {peaks['auto/none']:8.1f} MiB")
    print(f"anchor {anchor:8.1f} MiB; beyond it {result['beyond_the_anchor_mib']:.1f} MiB")
    for row in result["storage"]:
        shown = (
            f"{row['resident_bytes_per_parameter']:6.2f} resident, {row['written_bytes_per_parameter']:5.2f} written"
        )
        print(f"{row['dtype']:>8} {row['offload']:<4} bytes per parameter: {shown}")
    print(f"bfloat16 after {TRAINED} steps: {result['bfloat16']}\nwritten to {path}")


if __name__ == "__main__":
    main()

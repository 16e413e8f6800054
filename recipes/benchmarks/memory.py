"""Peak memory of a run with L2-SP over a plain one: MiniLM, batch 8 × 128 tokens, fp32, AdamW.

    python recipes/benchmarks/memory.py [--repeats 3]

Every run is a process of its own, whose peak resident memory the system reports. Writes results/memory.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile

import torch
from _bench import environment, write_results
from speed import BATCH, LENGTH, make_trainer, timed_step
from transformers.utils import logging

from hf_l2sp import Anchor

MODES = {"plain": {}, "l2sp": {"strength": 0.01}}


def child(mode: str) -> None:
    """Takes eight steps and prints peak memory and the anchor's size, in bytes."""
    logging.set_verbosity_error()
    batch = {
        "input_ids": torch.randint(1000, 20000, (BATCH, LENGTH)),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.arange(BATCH) % 8,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, MODES[mode].get("strength", 0.0))
        for _ in range(8):
            timed_step(trainer, batch)
    anchor: Anchor | None = trainer.l2sp_anchor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"peak": peak, "anchor": anchor.nbytes if anchor else 0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    runs: dict[str, list[dict[str, int]]] = {mode: [] for mode in MODES}
    for _ in range(options.repeats):
        for mode in MODES:
            done = subprocess.run(
                [sys.executable, __file__, "--child", mode], check=True, capture_output=True, text=True
            )
            runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
    mib = 1 << 20
    peak = {mode: statistics.median(run["peak"] for run in results) / mib for mode, results in runs.items()}
    anchor = runs["l2sp"][0]["anchor"] / mib
    result = {
        "what": f"MiniLM-L6 (22.7M parameters) fp32, batch {BATCH} x {LENGTH}, median of {options.repeats} processes",
        "plain_peak_mib": peak["plain"],
        "l2sp_peak_mib": peak["l2sp"],
        "anchor_mib": anchor,
        "beyond_the_anchor_mib": peak["l2sp"] - peak["plain"] - anchor,
        "environment": environment(),
    }
    path = write_results("memory.json", result)
    print(f"plain  {peak['plain']:8.1f} MiB\nL2-SP  {peak['l2sp']:8.1f} MiB")
    print(f"anchor {anchor:8.1f} MiB; beyond it {result['beyond_the_anchor_mib']:.1f} MiB\nwritten to {path}")


if __name__ == "__main__":
    main()

"""What the penalty adds to a training step: MiniLM, batch 8 × 128 tokens, fp32, AdamW.

    python recipes/benchmarks/speed.py [--rounds 30]

Steps of a plain trainer (l2sp_lambda 0) and of L2-SP alternate, so that both see the same noise of the machine, and
the medians of the rounds are compared; the pass is timed inside its step as well. Writes results/speed.json.
"""

import argparse
import statistics
import tempfile
import time

import torch
from _bench import embedded_model, environment, write_results
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments

BATCH, LENGTH = 8, 128


def make_trainer(folder: str, strength: float) -> L2SPTrainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=8)
    model.accepts_loss_kwargs = False
    args = L2SPTrainingArguments(
        output_dir=folder, l2sp_lambda=strength, learning_rate=1e-4, report_to="none", disable_tqdm=True
    )
    trainer = L2SPTrainer(model=model, args=args, train_dataset=[])
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def timed_step(trainer: L2SPTrainer, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return time.perf_counter() - start


def record_passes(times: list[float]) -> None:
    """Has every penalty pass of a trainer write down its time, where it happens: right after backward."""

    def timed(*args, **kwargs):
        start = time.perf_counter()
        sums = apply(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return sums

    apply = Anchor.apply
    Anchor.apply = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.arange(BATCH) % 8,
    }
    with tempfile.TemporaryDirectory() as folder:
        plain, penalised = make_trainer(folder, 0.0), make_trainer(folder, 0.01)
        for trainer in (plain, penalised):
            for _ in range(3):
                timed_step(trainer, batch)
        times: dict[str, list[float]] = {"plain": [], "l2sp": [], "pass": []}
        record_passes(times["pass"])
        for number in range(rounds):
            order = [("plain", plain), ("l2sp", penalised)]
            for name, trainer in order if number % 2 == 0 else order[::-1]:
                times[name].append(timed_step(trainer, batch))
    median = {name: statistics.median(values) for name, values in times.items()}
    paired = [b / a - 1.0 for a, b in zip(times["plain"], times["l2sp"], strict=True)]
    result = {
        "what": f"MiniLM-L6 (22.7M parameters) fp32, batch {BATCH} x {LENGTH} tokens, {rounds} interleaved rounds",
        "plain_step_ms": 1e3 * median["plain"],
        "l2sp_step_ms": 1e3 * median["l2sp"],
        "pass_ms": 1e3 * median["pass"],
        "added_by_pass_percent": 100 * median["pass"] / median["plain"],
        "added_by_medians_percent": 100 * (median["l2sp"] / median["plain"] - 1.0),
        "added_by_paired_median_percent": 100 * statistics.median(paired),
        "environment": environment(),
    }
    path = write_results("speed.json", result)
    print(f"plain step            {result['plain_step_ms']:8.1f} ms")
    print(f"L2-SP step            {result['l2sp_step_ms']:8.1f} ms")
    print(
        f"penalty pass in it    {result['pass_ms']:8.1f} ms = {result['added_by_pass_percent']:.2f} % of a plain step"
    )
    print(f"added, paired median  {result['added_by_paired_median_percent']:8.2f} %")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Trains a tiny classifier in a process of its own, so that a test can kill it: worker.py MODEL OUT [--kill STEP]."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification, TrainerCallback

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Unfreeze(TrainerCallback):
    """Embeddings are frozen until step 3; the anchor learns of them then."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.bert.embeddings.requires_grad_(state.global_step >= 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--unfreeze", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(4)
    data = [
        {"input_ids": torch.randint(1, 100, (10,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(24)
    ]
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(options.model, num_labels=3)
    model.accepts_loss_kwargs = False
    callbacks: list[TrainerCallback] = []
    optimizers = (None, None)
    if options.unfreeze:
        optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
        model.bert.embeddings.requires_grad_(False)
        callbacks.append(Unfreeze())
    if options.kill:
        callbacks.append(Kill(options.kill))
    args = L2SPTrainingArguments(
        output_dir=options.out,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        l2sp_lambda=0.3,
        l2sp_schedule="cosine",
    )
    trainer = L2SPTrainer(model=model, args=args, train_dataset=data, callbacks=callbacks, optimizers=optimizers)
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    trainer.save_model()
    Path(options.out, "outcome.json").write_text(
        json.dumps({"fingerprint": trainer.l2sp_anchor.fingerprint, "names": sorted(trainer.l2sp_anchor)})
    )
    trainer.save_state()


if __name__ == "__main__":
    sys.exit(main())

"""One of the processes of `test_two_processes`: a step of mix-up, its gradient against the reference over all rows."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed
from transformers import DataCollatorWithPadding

from .distillation import Gradients, gradient_of, gradients_of, make_data, make_model, make_tokenizer, relative_error
from .test_mixup import L2SPMixupArguments, MixupL2SPTrainer, reference


def main(folder: Path) -> None:
    args = L2SPMixupArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        optim="sgd",
        learning_rate=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        save_strategy="no",
        report_to="none",
        mixup_alpha=0.5,
        l2sp_lambda=0.1,
    )
    model = make_model("sequence", seed=1).double()
    trainer = MixupL2SPTrainer(
        model=model,
        args=args,
        train_dataset=make_data("sequence", 8, unlabelled=(1,)),
        data_collator=DataCollatorWithPadding(make_tokenizer(folder / str(args.process_index))),
        callbacks=[Gradients([])],
    )
    trainer.train()
    (got,) = gradients_of(trainer)
    seen: list = [None] * args.world_size
    torch.distributed.all_gather_object(seen, trainer.seen)
    expected = gradient_of(reference(model, [one for part in seen for one in part]), model)
    assert args.world_size == 2
    assert relative_error({name.removeprefix("module."): g for name, g in got.items()}, expected) < 1e-10


if __name__ == "__main__":
    main(Path(sys.argv[1]))

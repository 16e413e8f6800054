"""Heads that inflate the task gradient under gradient accumulation, seen by what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .naming import unwrap
from .traceless import evaluated

logger = logging.get_logger(__name__)


def warn_if_head_ignores_item_count(
    trainer: Any, parent: Callable[..., Any], model: nn.Module, inputs: Any, args: Any, kwargs: Any
) -> None:
    """Warns once where the task loss is a mean per micro-batch that nobody divides by the accumulation steps.

    Trainer leaves the division to models whose forward takes loss arguments. BERT-like heads in transformers 5.x take
    them and ignore `num_items_in_batch` (transformers issue 47688, open): the task gradient is then multiplied by the
    accumulation steps (and by the processes), and the penalty, which is not, weighs that much less. Whether a head
    does so is seen by asking it for one loss twice, with two counts.
    """
    if getattr(trainer, "_l2sp_head_checked", False):
        return
    count = kwargs.get("num_items_in_batch")
    # Of DataParallel, too: Trainer multiplies the mean over its devices by their number.
    processes = trainer.accelerator.num_processes * max(1, trainer.args.n_gpu)
    windows = trainer.args.gradient_accumulation_steps * processes
    if count is None or windows <= 1:
        return
    trainer._l2sp_head_checked = True
    # Another trainer's compute_loss may keep books of its own (TRL's metrics); it is not called for a probe.
    if getattr(parent, "__func__", None) is not Trainer.compute_loss:
        return
    bare = unwrap(model)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # A sharded model computes only through its wrapper; that of DDP is left alone, which counts forward passes.
    probed = model if trainer.l2sp_anchor is not None and trainer.l2sp_anchor.backend.late else bare
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluated(probed):
        one = parent(probed, dict(inputs), num_items_in_batch=count)
        two = parent(probed, dict(inputs), num_items_in_batch=count * 2)
    # Under DataParallel there is a count for each device, and so a loss.
    if not bool(torch.isfinite(one).all()) or not bool(one.any()) or not torch.equal(one, two):
        return
    if trainer.is_world_process_zero():
        what = "compute_loss_func" if trainer.compute_loss_func is not None else type(bare).__name__
        cure = (
            "Divide by num_items_in_batch in compute_loss_func"
            if trainer.compute_loss_func is not None
            else "Set `model.accepts_loss_kwargs = False` before the trainer is built"
        )
        logger.warning(
            f"{what} ignores num_items_in_batch, so the task gradient is {windows} times too large with "
            f"gradient_accumulation_steps={trainer.args.gradient_accumulation_steps} on "
            f"{processes} process(es) (transformers issue 47688), and the L2-SP penalty "
            f"weighs {windows} times less against it. {cure}."
        )

"""Launches, models and optimizers under which the penalty would not be exact: refused, never ignored."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DistributedType

from .args import BACKWARD_OPTIMIZERS

_KINDS = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_MLU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def check_launch(trainer: Any) -> None:
    """Raises:
    ValueError: The trainer runs where hf_l2sp cannot add the penalty exactly; says what to do instead.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    if kind not in _KINDS:
        raise _refusal(f"a launch of type {kind.value}", "Use DDP, FSDP or DeepSpeed")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and (accelerator.num_processes == 1 or kind == DistributedType.NO):
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE={started}), but they are not connected: each would train "
            "on its own, in the same folder. On the CPU pass use_cpu=True (--use_cpu), or set ACCELERATE_USE_CPU=true "
            "in the environment of the launch."
        )
    if kind == DistributedType.FSDP:
        _check_fsdp(trainer, accelerator.state.fsdp_plugin)
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(trainer, accelerator.state.deepspeed_plugin)
    name = type(trainer.optimizer).__name__ if trainer.optimizer is not None else ""
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    for value in (name.lower(), optimizer):
        if any(word in value for word in BACKWARD_OPTIMIZERS):
            raise _refusal(f"the optimizer {name or optimizer}, which updates inside backward", "Use adamw_torch")


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    if trainer.args.auto_find_batch_size:
        raise _refusal(
            "auto_find_batch_size under FSDP, which shards a model anew whose weights have moved",
            "Set per_device_train_batch_size",
        )
    if getattr(plugin, "fsdp_version", 1) == 1 and not plugin.use_orig_params:
        raise _refusal(
            "FSDP1 with use_orig_params=false, which hides the parameters in one flat tensor",
            "Set fsdp_use_orig_params: true, or fsdp_version: 2",
        )


def _check_deepspeed(trainer: Any, plugin: Any) -> None:
    config = plugin.deepspeed_config
    stage = plugin.zero_stage
    zero = config.get("zero_optimization", {})
    if any(zero.get(part, {}).get("device") == "nvme" for part in ("offload_optimizer", "offload_param")):
        raise _refusal("DeepSpeed's offload to NVMe", "Offload to the CPU")
    optimizer = config.get("optimizer", {}).get("params", {}).get("weight_decay", 0)
    if (trainer.args.weight_decay if optimizer == "auto" else optimizer) > 0:
        raise _refusal(
            "weight decay of an optimizer from DeepSpeed's config, which would pull anchored weights to zero as well",
            "Take the optimizer out of that config, so that the trainer makes it from its own arguments",
        )
    if stage == 0 and config.get("fp16", {}).get("enabled") in (True, "auto"):
        raise _refusal("DeepSpeed with fp16 and without ZeRO", "Set zero_stage: 1, or bf16")


def _refusal(what: str, instead: str) -> ValueError:
    from . import __version__

    return ValueError(f"L2-SP in hf_l2sp {__version__} does not support {what}. {instead}, or set l2sp_lambda=0.")

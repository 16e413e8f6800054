"""Launches, models and optimizers under which the penalty is not exact yet: refused, never ignored."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from .args import BACKWARD_OPTIMIZERS
from .naming import unwrap

_SINGLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_launch(trainer: Any) -> None:
    """Raises:
    ValueError: The trainer runs where hf_l2sp cannot add the penalty exactly; says what to do instead.
    """
    kind = trainer.accelerator.distributed_type
    processes = trainer.accelerator.num_processes
    if processes > 1 or kind not in _SINGLE:
        raise _refusal(
            f"a distributed launch ({kind.value}, {processes} processes)",
            "Launch one process (accelerate launch --num_processes 1)",
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise _refusal("a model sharded at load time (DistributedConfig)", "Load it without distributed_config")
    if trainer.args.n_gpu > 1:
        raise _refusal(
            f"DataParallel over {trainer.args.n_gpu} GPUs",
            "Show one GPU to the program (CUDA_VISIBLE_DEVICES=0)",
        )
    bare = unwrap(trainer.model)
    if _has_adapters(bare):
        raise _refusal(
            f"PEFT adapters ({type(bare).__name__})",
            "Train the full model, or merge the adapters first (model.merge_and_unload())",
        )
    name = type(trainer.optimizer).__name__ if trainer.optimizer is not None else ""
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    for value in (name.lower(), optimizer):
        if any(word in value for word in BACKWARD_OPTIMIZERS):
            raise _refusal(f"the optimizer {name or optimizer}, which updates inside backward", "Use adamw_torch")


def _has_adapters(bare: nn.Module) -> bool:
    # The second is set by transformers' own add_adapter().
    return hasattr(bare, "peft_config") or bool(getattr(bare, "_hf_peft_config_loaded", False))


def _refusal(what: str, instead: str) -> ValueError:
    from . import __version__

    return ValueError(f"L2-SP in hf_l2sp {__version__} does not support {what}. {instead}, or set l2sp_lambda=0.")

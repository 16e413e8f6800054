"""Where parameter, gradient and θ0 live under every launch: nothing else knows.

One process, DDP and DataParallel hold everything on every rank. FSDP2, tensor parallelism and models sharded while
loading hold blocks (DTensor); FSDP1 and DeepSpeed ZeRO hold ranges of flattened parameters. A backend turns a
`Term` over a model's parameter into the `Term` over what this rank holds of it, and adds the sums up over the ranks.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from .base import NOTHING, WHOLE, Backend, Region
from .fsdp import DTensorBackend, FSDP1Backend, FSDP2Backend
from .whole import DTensor, full_shape, loading_whole, whole_tensor
from .zero import DeepSpeedBackend

__all__ = [
    "NOTHING",
    "WHOLE",
    "Backend",
    "DTensorBackend",
    "DeepSpeedBackend",
    "FSDP1Backend",
    "FSDP2Backend",
    "Region",
    "full_shape",
    "loading_whole",
    "make_backend",
    "whole_tensor",
]


def make_backend(accelerator: Any, model: nn.Module) -> Backend:
    """The backend of a launch.

    Args:
        accelerator: The trainer's.
        model: The bare model as it was handed to the trainer.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return DeepSpeedBackend(accelerator)
    if kind == DistributedType.FSDP:
        version = getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1)
        return FSDP2Backend(accelerator) if version == 2 else FSDP1Backend(accelerator)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return DTensorBackend(accelerator)
    return Backend(accelerator)

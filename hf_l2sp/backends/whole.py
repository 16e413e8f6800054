"""Parameters as a whole, however the launch spreads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor as DTensor
else:  # a PyTorch without distributed has no DTensor
    DTensor = ()  # type: ignore[misc,assignment]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_tensor(parameter: Tensor) -> Tensor:
    """All of a parameter that was sharded while it was loaded; a collective operation where it was."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


@contextmanager
def loading_whole() -> Iterator[None]:
    """Within, `from_pretrained` loads whole weights on every rank, whatever the launch shards or leaves out."""
    from transformers.integrations import deepspeed as hf_deepspeed

    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    if efficient is not None:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient

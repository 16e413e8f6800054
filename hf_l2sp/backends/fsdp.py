"""DTensors (FSDP2, tensor parallelism, models sharded while loading) and the flattened parameters of FSDP1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..naming import unwrap
from .base import NOTHING, WHOLE, Backend, Found, Region, not_differentiable
from .whole import DTensor

if dist.is_available():
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class DTensorBackend(Backend):
    """FSDP2, tensor parallelism, `DistributedConfig`: parameters are DTensors, or plain and the same on all ranks."""

    kind = "DTensor"
    sharded = True

    def local(self, parameter: Tensor) -> Tensor:
        data = parameter.detach()
        return data._local_tensor if isinstance(data, DTensor) else data

    def region(self, parameter: Tensor) -> Region:
        if not isinstance(parameter, DTensor):
            return WHOLE
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if tuple(shape) != tuple(parameter._local_tensor.shape) or any(
            "Strided" in type(p).__name__ for p in parameter.placements
        ):
            raise ValueError(
                f"A parameter of shape {tuple(parameter.shape)} is spread as {parameter.placements}, from which no "
                "contiguous part can be cut: l2sp_anchor, l2sp_anchor_offload='disk', tensors in l2sp_weights, "
                "adapters and enlarged embeddings need FSDP or tensor parallelism alone, not both."
            )
        return Region(block=tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True)))

    def copies(self, parameter: Tensor) -> int:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if not isinstance(parameter, DTensor):
            return world
        mesh = parameter.device_mesh
        parts = math.prod(mesh.size(i) for i, p in enumerate(parameter.placements) if not p.is_replicate())
        return world // parts

    def gradient(self, parameter: Tensor) -> Tensor:
        grad = super().gradient(parameter)
        if not isinstance(grad, DTensor) or not isinstance(parameter, DTensor):
            return grad
        if grad.placements != parameter.placements:  # a tensor-parallel layer may leave it partial
            grad = parameter.grad = grad.redistribute(parameter.device_mesh, parameter.placements)
        return grad._local_tensor

    def differentiable(self, parameter: Tensor) -> Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _PreparedFSDP(Backend):
    """Sharded by accelerate, which may load the weights on the first rank alone."""

    sharded = True
    late = True

    def agree(self, find: Callable[[], Found]) -> Found:
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [find()]
            except ValueError as error:  # raised on all ranks, so that none waits for another
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        found: Found = outcome[0]
        return found


class FSDP2Backend(_PreparedFSDP, DTensorBackend):
    """FSDP2 by accelerate: DTensors."""

    kind = "FSDP2"

    def prepared(self, model: nn.Module) -> bool:
        return any(isinstance(p, DTensor) for p in model.parameters())


class FSDP1Backend(_PreparedFSDP):
    """FullyShardedDataParallel with original parameters: each is the flattened range that this rank holds."""

    kind = "FSDP1"

    def __init__(self, accelerator: Any = None) -> None:
        super().__init__(accelerator)
        self._regions: dict[Tensor, Region] = {}
        self._shapes: dict[Tensor, tuple[int, ...]] = {}
        self._parts = 1

    def prepared(self, model: nn.Module) -> bool:
        return self._root(model) is not None

    def _root(self, model: nn.Module) -> nn.Module | None:
        wrappers = getattr(self.accelerator, "_models", [])
        return next((m for m in wrappers if m is not model and unwrap(m) is model), None)

    def attach(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        self._regions = {}
        root = self._root(model)
        assert root is not None
        for module in FullyShardedDataParallel.fsdp_modules(root):
            handle = module._handle
            if handle is None:
                continue
            self._parts = handle.process_group.size() if handle.uses_sharded_strategy else 1
            flat: Any = handle.flat_param
            for parameter, info, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
                self._shapes[parameter] = tuple(shape)
                if not handle.uses_sharded_strategy:
                    region = WHOLE
                elif info.in_shard:
                    region = Region(flat=slice(info.intra_param_start_idx, info.intra_param_end_idx + 1))
                else:
                    region = NOTHING
                self._regions[parameter] = region

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return self._shapes.get(parameter, tuple(parameter.shape))

    def region(self, parameter: Tensor) -> Region:
        return self._regions.get(parameter, WHOLE)

    def copies(self, parameter: Tensor) -> int:
        held = self._parts if parameter in self._regions else 1
        return dist.get_world_size() // held

    def differentiable(self, parameter: Tensor) -> Tensor:
        raise not_differentiable("FSDP1")

    def gradient(self, parameter: Tensor) -> Tensor:
        # An empty part must keep its missing gradient: FSDP would take an empty one for a lost shard.
        return super().gradient(parameter) if parameter.numel() else parameter.detach()

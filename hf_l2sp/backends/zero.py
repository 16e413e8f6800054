"""DeepSpeed: ZeRO-1, 2 and 3 and the bf16 optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..naming import unwrap
from ..penalty import Term
from .base import NOTHING, WHOLE, Backend, Region, not_differentiable


class DeepSpeedBackend(Backend):
    """ZeRO-1, 2 and 3 and the bf16 optimizer, with and without offload: fp32 fragments and their gradients."""

    kind = "DeepSpeed"
    sharded = True
    late = True
    steps_in_backward = True

    def prepared(self, model: nn.Module) -> bool:
        wrapped = self.accelerator.deepspeed_engine_wrapped
        return wrapped is not None and unwrap(wrapped.engine) is model

    @property
    def _engine(self) -> Any:
        return self.accelerator.deepspeed_engine_wrapped.engine

    def _partitioned(self, parameter: Any) -> bool:
        return hasattr(parameter, "ds_id")  # ZeRO-3

    def _fragment(self, parameter: Any) -> Any:
        """The part of a ZeRO-1/2 parameter on this rank; None if it is elsewhere or not partitioned at all."""
        return getattr(parameter, "_hp_mapping", None)

    def local(self, parameter: Any) -> Tensor:
        found: Tensor
        if self._partitioned(parameter):
            if parameter.requires_grad:
                from deepspeed.utils import safe_get_local_fp32_param

                found = safe_get_local_fp32_param(parameter).detach()
            else:
                found = parameter.ds_tensor.detach().view(-1)
            return found[: self._held(parameter)]  # the last rank's part ends in padding
        found = parameter.detach()
        if hasattr(parameter, "_hp_mapping"):
            fragment = self._fragment(parameter)
            found = found.view(-1)[:0].float() if fragment is None else fragment.hp_fragment.detach()
        return found

    def _held(self, parameter: Any) -> int:
        part: int = parameter.ds_tensor.ds_numel
        rest: int = parameter.ds_numel - part * self._rank_of(parameter)
        return max(0, min(part, rest))

    def _rank_of(self, parameter: Any) -> int:
        return dist.get_rank(group=getattr(parameter, "ds_process_group", None))

    def region(self, parameter: Any) -> Region:
        if self._partitioned(parameter):
            start = parameter.ds_tensor.ds_numel * self._rank_of(parameter)
            return Region(flat=slice(start, start + self._held(parameter)))
        if not hasattr(parameter, "_hp_mapping"):
            return WHOLE
        fragment = self._fragment(parameter)
        if fragment is None:
            return NOTHING
        address = fragment.lp_fragment_address
        return Region(flat=slice(address.start, address.start + address.numel))

    def copies(self, parameter: Any) -> int:
        world = dist.get_world_size()
        if self._partitioned(parameter):
            return world // dist.get_world_size(group=getattr(parameter, "ds_process_group", None))
        if not hasattr(parameter, "_hp_mapping"):
            return world
        return world // dist.get_world_size(group=parameter._dp_group)

    def gradient(self, parameter: Any) -> Tensor:
        grad: Tensor
        if self._partitioned(parameter):
            from deepspeed.utils import safe_get_local_grad

            grad = safe_get_local_grad(parameter)
            return grad[: self._held(parameter)]
        if not hasattr(parameter, "_hp_mapping"):
            return super().gradient(parameter)
        fragment = self._fragment(parameter)
        if fragment is None:
            grad = parameter.detach()
            return grad.view(-1)[:0]
        grad = fragment.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        if grad.numel() != fragment.lp_fragment_address.numel:  # the bf16 optimizer keeps the whole gradient
            return grad[self.region(parameter).flat]
        return grad

    def put_back(self, parts: Sequence[tuple[Any, Term]]) -> None:
        optimizer = self._engine.optimizer
        for parameter, part in parts:
            assert part.grad is not None
            if self._partitioned(parameter):
                from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

                # In low precision the getter returned a copy.
                value = safe_get_local_grad(parameter)
                value[: part.grad.numel()] = part.grad
                safe_set_local_grad(parameter, value)
            elif self._fragment(parameter) is not None and getattr(optimizer, "cpu_offload", False):
                # Clipping trusts norms that were taken before.
                optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = part.grad.double().norm(2)
        flat = getattr(optimizer, "fp32_groups_gradients_flat", None)
        if flat is not None and optimizer.clip_grad > 0:
            self._share_whole_gradients(optimizer, flat)

    def _share_whole_gradients(self, optimizer: Any, flat: Sequence[Tensor]) -> None:
        """The bf16 optimizer takes the norm over whole gradients, of which each rank has changed its own part."""
        for index, gradients in enumerate(flat):
            own = optimizer.fp32_groups_gradient_flat_partition[index].clone()
            gradients.zero_()
            optimizer.fp32_groups_gradient_flat_partition[index].copy_(own)
            dist.all_reduce(gradients, group=optimizer.real_dp_process_group[index])

    def differentiable(self, parameter: Any) -> Tensor:
        raise not_differentiable("DeepSpeed")

    def grad_scale(self) -> Tensor | None:
        optimizer = self._engine.optimizer
        scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
        scale = scaler.get_scale() if scaler is not None else getattr(optimizer, "loss_scale", 1.0)
        return None if scale == 1.0 else torch.tensor(float(scale), device=self.accelerator.device)

    def before_step(self, callback: Callable[[], None]) -> None:
        engine = self._engine
        step = getattr(engine.step, "__wrapped__", engine.step)  # a later training loop brings its own callback

        def step_after_callback(*args: Any, **kwargs: Any) -> Any:
            callback()
            return step(*args, **kwargs)

        step_after_callback.__wrapped__ = step  # type: ignore[attr-defined]
        engine.step = step_after_callback

"""Where parameter, gradient and θ0 live under every launch: the only file that knows.

One process, DDP and DataParallel hold everything on every rank. FSDP2, tensor parallelism and models sharded while
loading hold blocks (DTensor); FSDP1 and DeepSpeed ZeRO hold ranges of flattened parameters. A backend turns a
`Term` over a model's parameter into the `Term` over what this rank holds of it, and adds the sums up over the ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from .naming import unwrap
from .penalty import PenaltySums, Term, penalty_pass

if dist.is_available():
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
else:  # a PyTorch without distributed has no DTensor
    DTensor = ()  # type: ignore[misc,assignment]


_Found = TypeVar("_Found")


class Region(NamedTuple):
    """What a rank holds of a parameter: a block of it, or a range of its flattened elements; both None: all of it."""

    block: tuple[slice, ...] | None = None
    flat: slice | None = None

    def cut(self, full: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape, or of its leading rows."""
        if self.block is not None:
            return full[self.block]
        return full if self.flat is None else full.reshape(-1)[self.flat]

    def leading(self, rows: int, shape: Sequence[int]) -> int:
        """How many of the first rows (of the flattened elements, in a range) belong to the first rows of it all."""
        if self.block is not None:
            start, stop, _ = self.block[0].indices(shape[0])
            return max(0, min(rows, stop) - start)
        if self.flat is None:
            return rows
        start, stop, _ = self.flat.indices(math.prod(shape))
        return max(0, min(rows * math.prod(shape[1:]), stop) - start)


WHOLE = Region()
NOTHING = Region(flat=slice(0, 0))


class Backend:
    """Every rank holds every parameter and gradient: one process, DDP, DataParallel."""

    # As users call it.
    kind = "DDP"
    # Whether ranks hold different parts, so that sums have to be added up.
    sharded = False
    # Whether the parts exist only once `accelerator.prepare` has run.
    late = False
    # Whether the optimizer steps within `accelerator.backward`.
    steps_in_backward = False

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that talks to the user."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def prepared(self, model: nn.Module) -> bool:
        """Whether the bare model has its parts by now."""
        return True

    def attach(self, model: nn.Module) -> None:
        """Learns where the parts of a prepared model are."""

    def local(self, parameter: Tensor) -> Tensor:
        """θ as far as this rank holds it, in the precision that the optimizer updates; shares its memory."""
        return parameter.detach()

    def region(self, parameter: Tensor) -> Region:
        """Which part of the parameter this rank holds."""
        return WHOLE

    def copies(self, parameter: Tensor) -> int:
        """How many ranks hold the same part."""
        return 1

    def differentiable(self, parameter: Tensor) -> Tensor:
        """θ as far as this rank holds it, with a graph that leads to the parameter."""
        return parameter

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return full_shape(parameter)

    def gather(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """All of each parameter, detached, on every rank; meant for small ones."""
        if not self.sharded:
            return [parameter.detach() for parameter in parameters]
        found: list[Tensor] = []
        parts: dict[int, Tensor] = {}
        for index, parameter in enumerate(parameters):
            # What is no parameter (a buffer of PEFT) is never sharded.
            found.append(self.local(parameter) if isinstance(parameter, nn.Parameter) else parameter)
            region = self.region(parameter) if isinstance(parameter, nn.Parameter) else WHOLE
            if region is not WHOLE:
                # In float64, a value of which three ranks give a third each comes back as it was.
                part = torch.zeros(self.shape(parameter), dtype=torch.float64, device=self.accelerator.device)
                region.cut(part).copy_(found[index].double() / self.copies(parameter))
                parts[index] = part
        if parts:
            summed = self.add_up(torch.cat([part.view(-1) for part in parts.values()]))
            pieces = summed.split([part.numel() for part in parts.values()])
            for (index, part), piece in zip(parts.items(), pieces, strict=True):
                found[index] = piece.view(part.shape).to(found[index].dtype)
        return found

    def add_to_gradients(self, pulls: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds this rank's part of whole gradients to those that the optimizer will read.

        Args:
            pulls: Parameter and gradient. Shape: both that of the whole parameter.
        """
        changed = []
        for parameter, pull in pulls:
            grad = self.gradient(parameter)
            grad.add_(self.region(parameter).cut(pull).to(grad).view(grad.shape))
            changed.append((parameter, Term(self.local(parameter), None, grad=grad)))
        self.put_back(changed)

    def grad_scale(self) -> Tensor | None:
        """The factor by which the loss was scaled before backward; stays on the device."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        scaled: Tensor = scaler.scale(torch.ones((), device=self.accelerator.device))
        return scaled

    def apply(self, terms: Sequence[Term], coefficient: float, gradient: bool = True) -> PenaltySums:
        """`penalty_pass` over terms whose parameters are the model's; the sums are those over all ranks.

        Args:
            terms: The summands; anchors, weights and rows are already those of this rank.
            coefficient: λ.
            gradient: Whether to add to the gradients.
        """
        scale = self.grad_scale() if gradient else None
        if not self.sharded:
            return penalty_pass(terms, coefficient, gradient=gradient, grad_scale=scale)
        gradient = gradient and coefficient != 0.0
        parts = [
            term._replace(
                parameter=self.local(term.parameter), grad=self.gradient(term.parameter) if gradient else None
            )
            for term in terms
        ]
        sums = penalty_pass(parts, coefficient, gradient=gradient, grad_scale=scale)
        if gradient:
            self.put_back([(term.parameter, part) for term, part in zip(terms, parts, strict=True)])
        return self.total(sums, [self.copies(term.parameter) for term in terms])

    def gradient(self, parameter: Tensor) -> Tensor:
        """This rank's part of the gradient that the optimizer will read; zeros are put in where there is none."""
        if parameter.grad is None:
            # As autograd would: a parameter that the task does not reach still feels the penalty.
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def put_back(self, parts: Sequence[tuple[Tensor, Term]]) -> None:
        """Tells the engine of gradients that have changed, where it does not look at them itself."""

    def total(self, sums: PenaltySums, copies: Sequence[int]) -> PenaltySums:
        """Sums over all ranks, with what several of them hold counted once."""
        if not self.sharded or not dist.is_initialized():
            return sums
        both = torch.stack([sums.weighted, sums.squared])
        both = self.add_up(both / torch.tensor(copies, dtype=both.dtype, device=both.device))
        return PenaltySums(both[0], both[1])

    def add_up(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if not self.sharded or not dist.is_initialized():
            return values
        moved = values.to(self.accelerator.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def across_ranks(self, total: Tensor) -> Tensor:
        """Sum over all ranks of each rank's own sum; the gradient stays with that."""
        return total + (self.add_up(total.detach()) - total.detach()) if self.sharded else total

    def agree(self, find: Callable[[], _Found]) -> _Found:
        """What `find` returns or raises, the same on all ranks even where only the first one holds weights."""
        return find()

    def writing(self) -> dict[str, Any]:
        """How the ranks share files of θ0: part and rank of this one, whether it writes, how to wait for the rest."""
        if self.processes == 1:
            return {}
        part = (dist.get_rank(), dist.get_world_size()) if self.sharded else (0, 1)
        writes = self.sharded or self.accelerator.is_local_main_process
        return {
            "part": part,
            "rank": dist.get_rank(),
            "writes": writes,
            "wait": self.accelerator.wait_for_everyone,
        }

    def measured(self, loss: Tensor, measure: Callable[[], _Found]) -> _Found:
        """What is found in the gradients of a loss, which carry `grad_scale`; the caller clears them."""
        scale = self.grad_scale()
        (loss if scale is None else loss * scale.to(loss.device)).backward()
        return measure()

    def before_step(self, callback: Callable[[], None]) -> None:
        """Calls back before each optimizer step that the engine takes within backward."""


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

    def agree(self, find: Callable[[], _Found]) -> _Found:
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [find()]
            except ValueError as error:  # raised on all ranks, so that none waits for another
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        found: _Found = outcome[0]
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
        raise _not_differentiable("FSDP1")

    def gradient(self, parameter: Tensor) -> Tensor:
        # An empty part must keep its missing gradient: FSDP would take an empty one for a lost shard.
        return super().gradient(parameter) if parameter.numel() else parameter.detach()


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
        raise _not_differentiable("DeepSpeed")

    def grad_scale(self) -> Tensor | None:
        optimizer = self._engine.optimizer
        scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
        scale = scaler.get_scale() if scaler is not None else getattr(optimizer, "loss_scale", 1.0)
        return None if scale == 1.0 else torch.tensor(float(scale), device=self.accelerator.device)

    def measured(self, loss: Tensor, measure: Callable[[], _Found]) -> _Found:
        # Gradients are put away in many places, by stage, precision and offload. The step clears all of them as this
        # version wants it; without the optimizer inside, and with the loss scale kept, it changes nothing else.
        engine = self._engine
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        engine.backward(loss, scale_wrt_gas=False)
        found = measure()
        with ExitStack() as stack:
            for owner, name in ((engine.optimizer, "_update_scale"), (engine.basic_optimizer, "step")):
                if hasattr(owner, name):
                    stack.enter_context(_without(owner, name))
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        return found

    def before_step(self, callback: Callable[[], None]) -> None:
        engine = self._engine
        step = getattr(engine.step, "__wrapped__", engine.step)  # a later training loop brings its own callback

        def step_after_callback(*args: Any, **kwargs: Any) -> Any:
            callback()
            return step(*args, **kwargs)

        step_after_callback.__wrapped__ = step  # type: ignore[attr-defined]
        engine.step = step_after_callback


@contextmanager
def _without(owner: Any, method: str) -> Iterator[None]:
    """A method of this one object that does nothing meanwhile."""
    before = vars(owner).get(method)
    setattr(owner, method, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


def _not_differentiable(kind: str) -> ValueError:
    return ValueError(
        f"Under {kind} the penalty has no autograd graph outside a training step: the parameters' parts are not what "
        "the model computes with. Let train() run the steps, or use FSDP2 or DDP."
    )


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

"""Which part of a parameter a rank holds, by brute force, and what the parts add up to; no processes are started.

Real launches are in tests/distributed. Here PyTorch's fake process group plays one rank after the other, so that
layouts of more ranks, and uneven ones, can be seen whole. Its collectives do nothing: the test adds up instead.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.integrations import deepspeed as hf_deepspeed

from hf_l2sp import Anchor, l2sp_penalty
from hf_l2sp.backends import (
    NOTHING,
    WHOLE,
    Backend,
    DeepSpeedBackend,
    DTensorBackend,
    FSDP1Backend,
    FSDP2Backend,
    Region,
    fsdp,
    full_shape,
    loading_whole,
    make_backend,
    whole_tensor,
)
from hf_l2sp.penalty import PenaltySums, Term, penalty_pass

CPU = torch.device("cpu")


def accelerator(**values: Any) -> Any:
    return SimpleNamespace(device=CPU, num_processes=1, scaler=None, is_main_process=True, **values)


# --- regions --------------------------------------------------------------------------------------------------------


def random_slice(rng, size: int) -> slice:
    start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
    return slice(start, stop)


def random_regions(rng, count: int) -> Iterator[tuple[tuple[int, ...], Region]]:
    for _ in range(count):
        shape = tuple(rng.integers(1, 6, rng.integers(1, 4)).tolist())
        yield shape, WHOLE
        yield shape, NOTHING
        yield shape, Region(block=tuple(random_slice(rng, size) for size in shape))
        yield shape, Region(flat=random_slice(rng, math.prod(shape)))


def test_parts_of_tensors_and_of_their_leading_rows(rng):
    """By the number that every element has in the whole tensor."""
    seen = 0
    for shape, region in random_regions(rng, 200):
        numbers = torch.arange(math.prod(shape)).view(shape)
        held = region.cut(numbers)
        for rows in (0, 1, shape[0] // 2, shape[0], shape[0] + 2):
            pulled = {int(n) for n in held.reshape(-1) if int(n) < rows * math.prod(shape[1:])}
            leading = held[: region.leading(rows, shape)]
            assert {int(n) for n in leading.reshape(-1)} == pulled
            # What is cut out of the leading rows alone fits onto that.
            assert torch.equal(region.cut(numbers[:rows]).reshape(-1), leading.reshape(-1))
            seen += 0 < len(pulled) < held.numel()
    assert seen > 100


def test_parts_share_memory_so_that_they_can_be_written_to():
    for region in (Region(block=(slice(1, 3), slice(0, 1))), Region(flat=slice(2, 5)), WHOLE):
        full = torch.zeros(4, 2)
        region.cut(full).fill_(1.0)
        assert int(full.sum()) == region.cut(full).numel() > 0


def test_parameter_without_dimensions():
    assert WHOLE.cut(torch.tensor(3.0)) == Region(block=()).cut(torch.tensor(3.0)) == 3.0


# --- one process ----------------------------------------------------------------------------------------------------


def test_plain_backend_holds_everything(net):
    backend = Backend()
    backend.attach(net)
    parameter = net[0].weight
    assert backend.local(parameter).data_ptr() == parameter.data_ptr() and not backend.local(parameter).requires_grad
    assert backend.region(parameter) is WHOLE and backend.copies(parameter) == 1
    assert backend.differentiable(parameter) is parameter and backend.shape(parameter) == (4, 3)
    assert (backend.processes, backend.writing(), backend.prepared(net)) == (1, {}, True)
    assert backend.is_main_process and backend.agree(lambda: 5) == 5
    assert not (backend.sharded or backend.late or backend.steps_in_backward)
    (gathered,) = backend.gather([parameter])
    assert gathered.data_ptr() == parameter.data_ptr() and not gathered.requires_grad
    sums = PenaltySums(torch.ones(2), torch.ones(2))
    assert backend.total(sums, [1, 1]) is sums
    values = torch.ones(3)
    assert backend.add_up(values) is values and backend.across_ranks(values) is values


def test_plain_backend_adds_to_gradients(net):
    parameter, missing = net[0].weight, net[1].weight
    parameter.grad = torch.ones_like(parameter)
    pulls = [(parameter, torch.full((4, 3), 2.0, dtype=torch.float64)), (missing, torch.full((2, 4), 3.0))]
    Backend().add_to_gradients(pulls)
    assert torch.equal(parameter.grad, torch.full((4, 3), 3.0)) and parameter.grad.dtype == torch.float32
    assert torch.equal(missing.grad, torch.full((2, 4), 3.0))


def test_plain_backend_applies_the_pass(net):
    anchors = [torch.randn_like(p) for p in net.parameters()]
    terms = [Term(p, a, weight=2.0) for p, a in zip(net.parameters(), anchors, strict=True)]
    sums = Backend().apply(terms, 0.3)
    for parameter, anchor in zip(net.parameters(), anchors, strict=True):
        assert torch.allclose(parameter.grad, 2 * 0.3 * 2.0 * (parameter.detach() - anchor))
    assert torch.equal(sums.weighted, penalty_pass(terms, 0.0).weighted)
    net.zero_grad()
    for measured in (Backend().apply(terms, 0.3, gradient=False), Backend().apply(terms, 0.0)):
        assert torch.equal(measured.squared, sums.squared)
    assert all(p.grad is None for p in net.parameters())


def test_scale_of_the_loss(net):
    term = Term(net[0].weight, torch.zeros(4, 3))
    enabled, disabled = (torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=on) for on in (True, False))
    for scaler, factor in ((None, 1.0), (disabled, 1.0), (enabled, 1024.0)):
        backend = Backend(
            accelerator() if scaler is None else SimpleNamespace(**{**vars(accelerator()), "scaler": scaler})
        )
        assert (backend.grad_scale() is None) == (factor == 1.0)
        net.zero_grad()
        backend.apply([term], 0.5)
        assert torch.allclose(net[0].weight.grad, factor * net[0].weight.detach())


# --- which backend --------------------------------------------------------------------------------------------------


def launch(kind: DistributedType, version: int | None = None) -> Any:
    plugin = SimpleNamespace(**({} if version is None else {"fsdp_version": version}))
    return accelerator(distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (launch(DistributedType.NO), Backend),
        (launch(DistributedType.MULTI_CPU), Backend),
        (launch(DistributedType.MULTI_GPU), Backend),
        (launch(DistributedType.FSDP), FSDP1Backend),  # before accelerate knew of versions
        (launch(DistributedType.FSDP, 1), FSDP1Backend),
        (launch(DistributedType.FSDP, 2), FSDP2Backend),
        (launch(DistributedType.DEEPSPEED), DeepSpeedBackend),
    ],
)
def test_backend_of_a_launch(found, expected, net):
    backend = make_backend(found, net)
    assert type(backend) is expected and backend.accelerator is found
    assert backend.late == (expected is not Backend) and backend.steps_in_backward == (expected is DeepSpeedBackend)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_model_that_was_sharded_while_loading(kind, net, one_process):
    net[1].weight = nn.Parameter(distribute_tensor(net[1].weight.detach(), one_process, [Shard(0)]))
    backend = make_backend(launch(kind), net)
    assert type(backend) is DTensorBackend and not backend.late and backend.sharded


# --- ranks, one after the other -------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    """Ends whatever process group a test leaves."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def one_process(process_group) -> Any:
    """A mesh of one real process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return mesh_of((1,))


def each_rank(world: int) -> Iterator[int]:
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        yield rank
        dist.destroy_process_group()


_numbers = itertools.count()


def mesh_of(shape: tuple[int, ...]) -> Any:
    """A mesh that equals no earlier one: PyTorch remembers layouts by mesh, and forgets which rank asked."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"d{next(_numbers)}" for _ in shape))


def spread(full: Tensor, mesh: tuple[int, ...], placements: list[Any]) -> nn.Parameter:
    """This rank's part, without communication."""
    return nn.Parameter(distribute_tensor(full.clone(), mesh_of(mesh), placements, src_data_rank=None))


LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows over 4": ((4,), [Shard(0)]),
    "columns over 3": ((3,), [Shard(1)]),
    "copies": ((3,), [Replicate()]),
    "rows over 2, two copies": ((2, 2), [Replicate(), Shard(0)]),
    "three copies of rows over 2": ((3, 2), [Replicate(), Shard(0)]),
    "blocks of 2 by 3": ((2, 3), [Shard(0), Shard(1)]),
    "rows over 2 by 2": ((2, 2), [Shard(0), Shard(0)]),
}
SHAPES = [(5, 3), (8, 4), (2, 3), (1, 1), (3, 2, 2)]
layouts = pytest.mark.parametrize(("mesh", "placements"), LAYOUTS.values(), ids=LAYOUTS)


@layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_distributed_tensors(process_group, mesh, placements, shape):
    """Each rank's part is what it holds, empty ones too, and all of them cover the tensor once."""
    full = torch.arange(float(math.prod(shape))).view(shape)
    covered, gathered = torch.zeros(shape), torch.zeros(shape)
    for _ in each_rank(math.prod(mesh)):
        backend, parameter = DTensorBackend(accelerator()), spread(full, mesh, placements)
        region, local = backend.region(parameter), backend.local(parameter)
        assert torch.equal(region.cut(full), local) and region.cut(full).shape == local.shape
        assert local.data_ptr() == parameter.detach()._local_tensor.data_ptr() and backend.shape(parameter) == shape
        region.cut(covered).add_(1.0 / backend.copies(parameter))
        gathered += backend.gather([parameter])[0]
        for rows in range(shape[0] + 1):
            own = local[: region.leading(rows, shape)]
            assert torch.equal(own, region.cut(full[:rows])) or own.numel() == region.cut(full[:rows]).numel() == 0
    assert torch.allclose(covered, torch.ones(shape)) and torch.allclose(gathered, full)


def test_gathered_copies_are_exact(process_group, monkeypatch):
    """A third of a float32 number, three times over, is another number; of a bfloat16 one even more so."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(3))
    for dtype in (torch.float32, torch.bfloat16):
        full = torch.randn(50, 7).to(dtype)
        assert not torch.equal(full / 3 + full / 3 + full / 3, full)
        for _ in each_rank(3):
            backend, parameter = DTensorBackend(accelerator()), spread(full, (3,), [Replicate()])
            found = backend.gather([parameter, torch.ones(2), parameter])
            assert torch.equal(found[0], full) and torch.equal(found[2], full) and found[0].dtype == dtype
            assert torch.equal(found[1], torch.ones(2))  # no parameter, hence whole on every rank


@layouts
@pytest.mark.parametrize("rows", [None, 3])
def test_parts_of_the_penalty_add_up(process_group, mesh, placements, rows):
    """Gradients are the parts of the whole gradient, sums those of the whole, whatever is held several times."""
    theta, plain = torch.randn(5, 3), torch.randn(4)
    anchor, weight = torch.randn(5, 3), torch.rand(5, 3)
    reference, alone = nn.Parameter(theta.clone()), nn.Parameter(plain.clone())
    expected = Backend().apply([Term(reference, anchor[:rows], weight[:rows], rows), Term(alone, None)], 0.3)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for _ in each_rank(math.prod(mesh)):
        backend, parameter = DTensorBackend(accelerator()), spread(theta, mesh, placements)
        other = nn.Parameter(plain.clone())  # the same on all ranks
        region = backend.region(parameter)
        own = None if rows is None else region.leading(rows, (5, 3))
        term = Term(parameter, region.cut(anchor[:rows]), region.cut(weight[:rows]), own)
        for measured in (backend.apply([term], 0.0), backend.apply([term], 0.3, gradient=False)):
            assert parameter.grad is None and measured.squared.shape == (1,)
        found = backend.apply([term, Term(other, None)], 0.3)
        sums += torch.stack([found.weighted, found.squared])
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == parameter.placements
        assert torch.allclose(parameter.grad._local_tensor, region.cut(reference.grad), atol=1e-6)
        assert torch.allclose(other.grad, alone.grad)
    assert torch.allclose(sums, torch.stack([expected.weighted, expected.squared]), rtol=1e-6)


@layouts
def test_parts_of_whole_gradients(process_group, mesh, placements):
    """As the factors of LoRA get theirs, also where there was no gradient before."""
    theta, before, pull = (torch.randn(5, 3) for _ in range(3))
    for _ in each_rank(math.prod(mesh)):
        backend, parameter = DTensorBackend(accelerator()), spread(theta, mesh, placements)
        fresh = spread(theta, mesh, placements)
        parameter.grad = spread(before, mesh, placements).detach()
        backend.add_to_gradients([(parameter, pull.double()), (fresh, pull)])
        region = backend.region(parameter)
        assert torch.equal(parameter.grad._local_tensor, region.cut(before) + region.cut(pull))
        assert torch.equal(fresh.grad._local_tensor, region.cut(pull))


def test_interleaved_rows_are_refused_only_where_a_part_must_be_cut(process_group):
    for _ in each_rank(4):
        local = torch.ones(2, 3)
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        parameter = nn.Parameter(DTensor.from_local(local, mesh_of((2, 2)), placements, run_check=False))
        backend = DTensorBackend(accelerator())
        assert backend.copies(parameter) == 1 and torch.equal(backend.local(parameter), local)
        with pytest.raises(ValueError, match=r"\(8, 3\) is spread as .*need FSDP or tensor parallelism alone"):
            backend.region(parameter)
        net = nn.Linear(3, 8, bias=False)
        net.weight = parameter
        assert torch.equal(Anchor.from_model(net, backend=backend)["weight"], local)
        with pytest.raises(ValueError, match=r"is spread as"):
            Anchor.from_model(net, backend=backend, weights={"weight": torch.ones(8, 3)})


def test_parts_of_flattened_parameters(process_group):
    """FSDP1 cuts where it pleases: through parameters, and leaves ranks without any of one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(1, 1))
    full = {name: p.detach().clone() for name, p in net.named_parameters()}
    covered = {name: torch.zeros(value.shape) for name, value in full.items()}
    sums, expected, empty = torch.zeros(len(full)), [float(v.square().sum()) for v in full.values()], 0
    for _ in each_rank(3):
        torch.manual_seed(0)
        bare = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(1, 1))
        wrapped = FullyShardedDataParallel(bare, use_orig_params=True, device_id=CPU)
        backend = FSDP1Backend(accelerator(_models=[wrapped]))
        assert backend.prepared(bare) and not backend.prepared(nn.Linear(1, 1))
        backend.attach(bare)
        named = dict(bare.named_parameters())
        for name, parameter in named.items():
            region = backend.region(parameter)
            assert torch.equal(region.cut(full[name]).reshape(-1), backend.local(parameter))
            assert backend.shape(parameter) == tuple(full[name].shape) and backend.copies(parameter) == 1
            region.cut(covered[name]).add_(1.0)
        found = backend.apply([Term(p, None) for p in named.values()], 0.5)
        sums += found.squared.float()
        for parameter in named.values():
            if not parameter.numel():
                empty += 1
                assert parameter.grad is None  # an empty one would be taken for a lost shard
            else:
                assert torch.equal(parameter.grad, parameter.detach())
        with pytest.raises(ValueError, match=r"Under FSDP1 .* no autograd graph outside a training step"):
            backend.differentiable(parameter)
    assert all(bool((value == 1).all()) for value in covered.values()) and empty > 0
    assert sums.tolist() == pytest.approx(expected, rel=1e-6)


def test_total_counts_copies_once(process_group):
    for world, copies in ((4, [4, 2, 1]), (6, [6, 3, 1])):
        total = torch.zeros(3)
        for _ in each_rank(world):
            found = DTensorBackend(accelerator()).total(PenaltySums(torch.full((3,), 2.0), torch.ones(3)), copies)
            assert torch.equal(found.weighted, 2 * found.squared)
            total += found.squared
        assert torch.allclose(total, torch.tensor([world / n for n in copies]))


def test_across_ranks_changes_the_value_and_not_the_gradient(process_group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(5.0))
    for _ in each_rank(2):
        value = torch.tensor(2.0, requires_grad=True)
        total = DTensorBackend(accelerator()).across_ranks(value * 3.0)
        total.backward()
        assert total.item() == 30.0 and float(value.grad) == 3.0


def test_ranks_share_files(process_group):
    """Sharded ranks write files of their own; whole ones write one on each machine."""
    waited: list[int] = []
    found = []
    for rank in each_rank(4):
        machine = {"is_local_main_process": rank % 2 == 0, "wait_for_everyone": lambda: waited.append(1)}
        several = SimpleNamespace(**{**vars(accelerator()), "num_processes": 4, **machine})
        found.append((Backend(several).writing(), FSDP2Backend(several).writing()))
    for rank, (whole, part) in enumerate(found):
        assert (whole["part"], whole["writes"], whole["rank"]) == ((0, 1), rank % 2 == 0, rank)
        assert (part["part"], part["writes"], part["rank"]) == ((rank, 4), True, rank)
        whole["wait"]()
        part["wait"]()
    assert len(waited) == 8


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_first_rank_finds_holds_for_all(fails, monkeypatch):
    """Under FSDP with efficient loading the others have no weights to look at."""
    sent: list[Any] = []

    def broadcast(objects: list[Any]) -> None:
        if objects[0] is None:
            objects[0] = sent[0]
        sent.append(objects[0])

    def find() -> str:
        if fails:
            raise ValueError("not this one")
        return "found"

    def other() -> str:
        raise AssertionError("only the first rank looks")

    monkeypatch.setattr(fsdp, "broadcast_object_list", broadcast)
    for main, look in ((True, find), (False, other)):
        backend = FSDP2Backend(SimpleNamespace(is_main_process=main))
        if fails:
            with pytest.raises(ValueError, match="not this one"):
                backend.agree(look)
        else:
            assert backend.agree(look) == "found"


# --- distributed tensors of one real process ------------------------------------------------------------------------


@pytest.mark.parametrize("before", [Partial(), Replicate(), Shard(1)])
def test_gradients_in_another_layout_come_into_that_of_the_parameter(one_process, before):
    values = torch.randn(4, 3)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 3), one_process, [Shard(0)]))
    parameter.grad = DTensor.from_local(values.clone(), one_process, [before], run_check=False)
    grad = DTensorBackend(accelerator()).gradient(parameter)
    assert parameter.grad.placements == (Shard(0),) and torch.equal(grad, values)
    grad.add_(1.0)
    assert torch.equal(parameter.grad.full_tensor(), values + 1.0)


def test_missing_and_plain_gradients(one_process):
    backend = DTensorBackend(accelerator())
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 3), one_process, [Shard(0)]))
    assert torch.equal(backend.gradient(parameter), torch.zeros(4, 3)) and isinstance(parameter.grad, DTensor)
    plain = nn.Parameter(torch.ones(2))
    assert backend.gradient(plain) is plain.grad and torch.equal(plain.grad, torch.zeros(2))


def test_penalty_for_loops_of_ones_own_over_distributed_tensors(one_process, net):
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin.load_state_dict(net.state_dict())
    for layer in twin:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), one_process, [Shard(0)]))
    models = {Anchor.from_model(net): net, Anchor.from_model(twin, backend=DTensorBackend(accelerator())): twin}
    values = []
    for anchor, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        value = l2sp_penalty(model, anchor)
        value.backward()
        values.append(value.item())
    assert values[0] == pytest.approx(values[1]) and values[0] > 0
    first, second = ([whole_tensor(p.grad) for p in model.parameters()] for model in models.values())
    assert all(torch.allclose(a, b) for a, b in zip(first, second, strict=True))
    assert len({anchor.fingerprint for anchor in models}) == 1


def test_whole_tensors(one_process):
    values = torch.randn(4, 3)
    assert torch.equal(whole_tensor(nn.Parameter(distribute_tensor(values, one_process, [Shard(0)]))), values)
    plain = nn.Parameter(values)
    assert whole_tensor(plain).data_ptr() == values.data_ptr() and not whole_tensor(plain).requires_grad
    assert full_shape(plain) == (4, 3)
    plain.ds_shape = torch.Size([8, 3])  # ZeRO-3 has taken the rest away
    assert full_shape(plain) == (8, 3)


# --- loading whole weights ------------------------------------------------------------------------------------------


class _Config:
    """What transformers keeps of DeepSpeed's configuration while a model is loaded."""

    def is_zero3(self) -> bool:
        return True


def leave(fails: bool) -> None:
    if fails:
        raise OSError("no such model")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("efficient", [None, "true", "1"])
def test_loading_whole_weights_leaves_the_launch_as_it_was(monkeypatch, fails, efficient):
    config: Callable[[], _Config] = _Config
    monkeypatch.setattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", config)
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    if efficient is not None:
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
    assert hf_deepspeed.is_deepspeed_zero3_enabled()
    try:
        with loading_whole():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
            assert os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == (None if efficient is None else "false")
            leave(fails)
    except OSError:
        assert fails
    assert hf_deepspeed._hf_deepspeed_config_weak_ref is config
    assert os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == efficient

"""What L2-SP cannot do exactly is refused before any training, with what to do instead."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_l2sp import __version__
from hf_l2sp.launch import check_launch


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def trainer(
    kind=DistributedType.NO,
    processes=1,
    optim="adamw_torch",
    optimizer=None,
    find_batch_size=False,
    decay=0.0,
    **plugins,
):
    return SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=kind, num_processes=processes, state=SimpleNamespace(**plugins)),
        args=SimpleNamespace(optim=optim, auto_find_batch_size=find_batch_size, weight_decay=decay),
        optimizer=optimizer,
    )


def fsdp(version=2, original=True, **options):
    plugin = SimpleNamespace(fsdp_version=version, use_orig_params=original)
    return {"kind": DistributedType.FSDP, "processes": 2, "fsdp_plugin": plugin, **options}


def deepspeed(stage=2, **config):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return {"kind": DistributedType.DEEPSPEED, "processes": 2, "deepspeed_plugin": plugin}


def offloaded(part, device):
    return deepspeed(3, zero_optimization={part: {"device": device}})


def decaying(decay, of_trainer=0.0):
    return deepspeed(2, optimizer={"params": {"weight_decay": decay}}) | {"decay": of_trainer}


class Lomo:
    """Named like the optimizer."""


REFUSED = {
    "TPU": ({"kind": DistributedType.XLA}, r"a launch of type XLA\. Use DDP, FSDP or DeepSpeed"),
    "Megatron": ({"kind": DistributedType.MEGATRON_LM}, r"a launch of type MEGATRON_LM\. Use DDP, FSDP or DeepSpeed"),
    "FSDP batch size": (
        fsdp(find_batch_size=True),
        r"auto_find_batch_size under FSDP.*Set per_device_train_batch_size",
    ),
    "FSDP1 flat": (fsdp(1, original=False), r"FSDP1 with use_orig_params=false.*fsdp_use_orig_params: true"),
    "NVMe optimizer": (offloaded("offload_optimizer", "nvme"), r"DeepSpeed's offload to NVMe\. Offload to the CPU"),
    "NVMe parameters": (offloaded("offload_param", "nvme"), r"DeepSpeed's offload to NVMe\. Offload to the CPU"),
    "decay of DeepSpeed": (
        decaying(0.1),
        r"weight decay of an optimizer from DeepSpeed's config.*Take the optimizer out",
    ),
    "decay through DeepSpeed": (decaying("auto", 0.1), r"weight decay of an optimizer from DeepSpeed's config.*"),
    "DeepSpeed fp16 alone": (
        deepspeed(0, fp16={"enabled": True}),
        r"DeepSpeed with fp16 and without ZeRO\. .*stage: 1",
    ),
    "optimizer": ({"optimizer": Lomo()}, r"the optimizer Lomo, which updates inside backward\. Use adamw_torch"),
    "optim": ({"optim": SimpleNamespace(value="adalomo")}, r"the optimizer adalomo, which updates inside backward"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, r"the optimizer galore_adamw_layerwise, which updates inside"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal(options, message):
    start = re.escape(f"L2-SP in hf_l2sp {__version__} does not support ")
    with pytest.raises(ValueError, match=rf"^{start}{message}.*, or set l2sp_lambda=0\.$"):
        check_launch(trainer(**options))


SUPPORTED = {
    "one process": {},
    "gloo": {"kind": DistributedType.MULTI_CPU, "processes": 2},
    "one CPU process": {"kind": DistributedType.MULTI_CPU},
    "GPUs": {"kind": DistributedType.MULTI_GPU, "processes": 8},
    "batch size": {"find_batch_size": True},
    "FSDP2": fsdp(),
    "FSDP1": fsdp(1),
    "FSDP2 has no flat form": fsdp(2, original=False),
    "ZeRO-2 fp16": deepspeed(2, fp16={"enabled": True}),
    "DeepSpeed bf16 alone": deepspeed(0, bf16={"enabled": True}),
    "no decay of DeepSpeed": decaying("auto"),
    "decay of the trainer": deepspeed(2) | {"decay": 0.1},
    "offload": offloaded("offload_optimizer", "cpu"),
    "optimizer": {"optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters())},
    "optim": {"optim": SimpleNamespace(value="adafactor")},
}


@pytest.mark.parametrize("options", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_what_is_supported(options):
    check_launch(trainer(**options))


@pytest.mark.parametrize(
    "options", [{}, {"kind": DistributedType.NO, "processes": 2}], ids=["alone", "connected without a type"]
)
def test_processes_that_do_not_train_together(monkeypatch, options):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started \(WORLD_SIZE=2\), but they are not connected"):
        check_launch(trainer(**options))
    check_launch(trainer(DistributedType.MULTI_CPU, 2))

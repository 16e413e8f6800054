"""What L2-SP does not support yet is refused before any training, with what to do instead."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_l2sp import __version__
from hf_l2sp.launch import check_launch


def trainer(kind=DistributedType.NO, processes=1, n_gpu=1, optim="adamw_torch", optimizer=None, model=None, **extra):
    return SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=kind, num_processes=processes),
        args=SimpleNamespace(n_gpu=n_gpu, optim=optim),
        optimizer=optimizer,
        model=nn.Linear(2, 2) if model is None else model,
        **extra,
    )


def adapted(**attributes):
    model = nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Lomo:
    """Named like the optimizer."""


REFUSED = {
    "two processes": (
        {"kind": DistributedType.MULTI_CPU, "processes": 2},
        r"a distributed launch \(MULTI_CPU, 2 processes\)\. Launch one process \(accelerate .*--num_processes 1\)",
    ),
    "two GPUs": (
        {"kind": DistributedType.MULTI_GPU, "processes": 8},
        r"a distributed launch \(MULTI_GPU, 8 processes\)",
    ),
    "FSDP": ({"kind": DistributedType.FSDP}, r"a distributed launch \(FSDP, 1 processes\)"),
    "DeepSpeed": ({"kind": DistributedType.DEEPSPEED}, r"a distributed launch \(DEEPSPEED, 1 processes\)"),
    "TPU": ({"kind": DistributedType.XLA}, r"a distributed launch \(XLA, 1 processes\)"),
    "sharded load": (
        {"is_distributed_loading_by_transformers": True},
        r"a model sharded at load time \(DistributedConfig\)\. Load it without distributed_config",
    ),
    "DataParallel": (
        {"n_gpu": 4},
        r"DataParallel over 4 GPUs\. Show one GPU to the program \(CUDA_VISIBLE_DEVICES=0\)",
    ),
    "PEFT": (
        {"model": adapted(peft_config={})},
        r"PEFT adapters \(Linear\)\. Train the full model, or merge the adapters first \(.*merge_and_unload\(\)\)",
    ),
    "added adapter": ({"model": adapted(_hf_peft_config_loaded=True)}, r"PEFT adapters \(Linear\)"),
    "compiled PEFT": ({"model": torch.compile(adapted(peft_config={}))}, r"PEFT adapters \(Linear\)"),
    "optimizer": ({"optimizer": Lomo()}, r"the optimizer Lomo, which updates inside backward\. Use adamw_torch"),
    "optim": ({"optim": SimpleNamespace(value="adalomo")}, r"the optimizer adalomo, which updates inside backward"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, r"the optimizer galore_adamw_layerwise, which updates inside"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal(options, message):
    start = re.escape(f"L2-SP in hf_l2sp {__version__} does not support ")
    with pytest.raises(ValueError, match=rf"^{start}{message}.*, or set l2sp_lambda=0\.$"):
        check_launch(trainer(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": DistributedType.MULTI_CPU},
        {"kind": DistributedType.MULTI_GPU},
        {"n_gpu": 0},
        {"optimizer": torch.optim.AdamW(nn.Linear(2, 2).parameters())},
        {"optim": SimpleNamespace(value="adafactor")},
        {"model": adapted(_hf_peft_config_loaded=False)},
        {"model": torch.compile(nn.Linear(2, 2))},
        {"is_distributed_loading_by_transformers": False},
    ],
    ids=str,
)
def test_what_is_supported(options):
    check_launch(trainer(**options))

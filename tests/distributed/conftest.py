"""One launch per backend, shared by the tests that look at it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel, set_seed

WORKER = Path(__file__).parent / "worker.py"


@dataclass
class Launch:
    folder: Path
    outcomes: list[dict[str, Any]]
    backend: str

    def weights(self, run: str) -> dict[str, Tensor]:
        # ZeRO-3 loads layer norms under the names of old checkpoints, and saves them so.
        new = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        weights = load_file(self.folder / run / "model.safetensors")
        for old, name in new.items():
            weights = {key.replace(old, name): value for key, value in weights.items()}
        return weights

    @property
    def by_deepspeed(self) -> bool:
        return self.backend.startswith("zero")

    def has(self, run: str) -> bool:
        return (self.folder / run / "model.safetensors").exists()


def make_inputs(folder: Path) -> None:
    """The pretrained model, another one that serves as θ0, and a weight for every number of it."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    set_seed(1)
    model = BertModel(config)
    model.save_pretrained(folder / "pretrained")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "origin")
    classifier = BertForSequenceClassification.from_pretrained(folder / "pretrained", num_labels=3)
    weights = {name: torch.rand(p.shape, generator=generator) for name, p in classifier.named_parameters()}
    save_file(weights, folder / "fisher.safetensors")


def start(backend: str, folder: Path, processes: int) -> Launch:
    make_inputs(folder)
    # A launch must not see that of a test runner around it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    result = subprocess.run(
        [sys.executable, *run, str(WORKER), backend, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=540,
    )
    if result.returncode:
        pytest.fail(f"{backend} ended with {result.returncode}:\n{result.stderr[-6000:]}")
    outcomes = [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(processes)]
    return Launch(folder, outcomes, backend)


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Launch:
    """One process, in a process of its own as well."""
    return start("single", tmp_path_factory.mktemp("single"), 1)


BACKENDS = ["ddp", "fsdp1", "fsdp2", "fsdp2-ram", "sharded-load", "tp", "zero0", "zero1", "zero2", "zero3"]
BACKENDS += ["zero2-offload", "zero3-offload", "zero1-bf16", "zero2-bf16", "zero3-bf16", "zero2-fp16"]


@pytest.fixture(scope="session", params=BACKENDS)
def launch(request, tmp_path_factory) -> Launch:
    backend = request.param
    if backend.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (an extra: pip install 'hf-l2sp[deepspeed]')")
    if backend in ("sharded-load", "tp") and importlib.util.find_spec("transformers.distributed") is None:
        pytest.skip("this version of transformers does not shard models while it loads them")
    return start(backend, tmp_path_factory.mktemp(backend), 2)

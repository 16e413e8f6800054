"""Tiny models with adapters, for the tests of what PEFT does."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft", reason="adapters are those of the peft extra")

from peft import LoraConfig, get_peft_model  # noqa: E402

ATTENTION = ["query", "value"]


def train(model, size=0.05, seed=11):
    """Moves everything that is trainable, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def pristine(model):
    """The present value of every parameter in float64."""
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def needs(*options):
    """Skips where the installed PEFT is too old to have an option of LoRA."""
    missing = set(options) - set(LoraConfig.__dataclass_fields__)
    if missing:
        pytest.skip(f"PEFT {peft.__version__} has no {', '.join(sorted(missing))}")


def adapted(model, **config):
    """The model with LoRA adapters, by default on the queries and values of BERT."""
    needs(*config)
    try:
        return get_peft_model(model, LoraConfig(**{"target_modules": ATTENTION, "r": 8, "lora_alpha": 12, **config}))
    except ValueError as error:
        if "Unknown initialization" not in str(error):
            raise
        pytest.skip(f"PEFT {peft.__version__}: {error}")


def by_transformers(model, *args):
    """`add_adapter` of transformers, where that does not ask for another PEFT than the installed one."""
    try:
        model.add_adapter(*args)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"PEFT {peft.__version__}: {error}")

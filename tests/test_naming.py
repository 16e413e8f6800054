"""Names of parameters, whatever wraps the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.utils import is_accelerate_available

from hf_l2sp.naming import canonical_name, in_training_mode, named_float_parameters, unwrap


class Compiled(nn.Module):
    """What `torch.compile(module)` looks like from outside, for one submodule."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def small_model():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer.0.weight", "layer.0.weight"),
        ("_orig_mod.layer.0.weight", "layer.0.weight"),
        ("layer.0._orig_mod.weight", "layer.0.weight"),
        ("layer._checkpoint_wrapped_module.0.weight", "layer.0.weight"),
        ("_fsdp_wrapped_module.layer._fsdp_wrapped_module.weight", "layer.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("weight", "weight"),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model)),
        pytest.param(
            lambda model: nn.DataParallel(torch.compile(model)),
            marks=pytest.mark.skipif(
                not is_accelerate_available("1.13"), reason="accelerate before 1.13 cannot unwrap it, nor can Trainer"
            ),
        ),
    ],
    ids=["compile", "parallel", "compile of parallel", "parallel of compile"],
)
def test_wrapped_model_has_the_names_of_the_bare_one(wrap):
    model = small_model()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert dict(named_float_parameters(wrapped)) == dict(model.named_parameters())


def test_wrapped_submodule_has_the_names_of_the_bare_one():
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    model[1] = Compiled(model[1])
    assert [name for name, _ in named_float_parameters(model)] == names


def test_tied_and_integer_parameters():
    model = small_model()
    model.again = model[0]
    model.counter = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    names = [name for name, _ in named_float_parameters(model)]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_tied_gpt2_counts_the_embedding_once(gpt2):
    names = [name for name, _ in named_float_parameters(gpt2)]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_mode_is_that_of_the_bare_model():
    """Also where a wrapper says that it trains while the model does not, as DeepSpeed's engine does."""
    model = small_model()
    wrapper = nn.DataParallel(model)
    model.eval()
    assert wrapper.training and not in_training_mode(wrapper) and not in_training_mode(model)
    model.train()
    wrapper.training = False
    assert in_training_mode(wrapper) and in_training_mode(model)

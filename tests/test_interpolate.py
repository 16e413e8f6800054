"""θ0 + α(θ − θ0), in place, for anchored parameters only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_l2sp import Anchor, interpolate


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0, 1.5, -0.5, 1])
def test_against_arithmetic_written_out(classifier, move, alpha):
    classifier.bert.embeddings.requires_grad_(False)
    anchor = Anchor.from_model(classifier, exclude=["pooler"])
    theta = values(move(classifier))
    parameters = dict(classifier.named_parameters())
    assert interpolate(classifier, anchor, alpha) is classifier
    for name, after in values(classifier).items():
        assert classifier.get_parameter(name) is parameters[name]
        if name in anchor:
            expected = anchor[name].double() + alpha * (theta[name].double() - anchor[name].double())
            assert torch.allclose(after.double(), expected, rtol=1e-6, atol=1e-7)
        else:  # head, frozen embeddings, excluded pooler
            assert torch.equal(after, theta[name])
    assert any("classifier" in n for n in theta) and not any("classifier" in n for n in anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ends_are_exact(net, move, dtype):
    net.to(dtype)
    anchor = Anchor.from_model(net)
    theta = values(move(net))
    interpolate(net, anchor, 1.0)
    assert all(torch.equal(p, theta[name]) for name, p in net.named_parameters())
    interpolate(net, anchor, 0.0)
    assert all(torch.equal(p, anchor[name]) for name, p in net.named_parameters())


def test_halfway_of_bfloat16_is_rounded_once():
    layer = nn.Linear(50, 50, bias=False).to(torch.bfloat16)
    anchor = Anchor.from_model(layer)
    layer.weight.data += 0.3 * torch.randn_like(layer.weight)
    expected = torch.lerp(anchor["weight"].float(), layer.weight.detach().float(), 0.5).to(torch.bfloat16)
    interpolate(layer, anchor, 0.5)
    assert torch.equal(layer.weight, expected)


def test_anchor_in_bfloat16(net, move):
    anchor = Anchor.from_model(net, dtype="bfloat16", offload="cpu")
    theta = values(move(net))
    interpolate(net, anchor, 0.5)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.allclose(parameter, (anchor[name].float() + theta[name]) / 2)


def test_added_rows_stay(gpt2, move):
    gpt2.resize_token_embeddings(97)
    anchor = Anchor.from_model(gpt2)
    theta = values(move(gpt2))["transformer.wte.weight"]
    interpolate(gpt2, anchor, 0.0)
    after = gpt2.transformer.wte.weight
    assert torch.equal(after[:90], anchor["transformer.wte.weight"])
    assert torch.equal(after[90:], theta[90:])
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_another_model_of_the_same_kind(net, move):
    anchor = Anchor.from_model(net)
    other = move(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    before = values(net)
    interpolate(other, anchor, 0.0)
    assert all(torch.equal(p, anchor[name]) for name, p in other.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_no_graph_and_no_change_of_gradients(net, move):
    anchor = Anchor.from_model(net)
    move(net)
    net[0].weight.grad = torch.ones(4, 3)
    interpolate(net, anchor, 0.5)
    assert net[0].weight.requires_grad and net[0].weight.is_leaf
    assert bool((net[0].weight.grad == 1).all())


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_that_is_no_number(net, alpha):
    anchor = Anchor.from_model(net)
    before = values(net)
    with pytest.raises(ValueError, match=rf"alpha={alpha} must be a finite number, usually between 0 and 1"):
        interpolate(net, anchor, alpha)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_wrong_model(net, alpha):
    with pytest.raises(ValueError, match="which the model lacks"):
        interpolate(nn.Linear(3, 4), Anchor.from_model(net), alpha)


def test_wrong_model_with_alpha_one(net):
    with pytest.raises(ValueError, match="which the model lacks"):
        interpolate(nn.Linear(3, 4), Anchor.from_model(net), 1.0)


def test_way_back_from_a_diverged_model(net):
    anchor = Anchor.from_model(net)
    net[0].weight.data[0, 0] = math.nan
    interpolate(net, anchor, 0.0)
    assert torch.equal(net[0].weight, anchor["0.weight"])


def test_model_frozen_for_evaluation_is_refused_or_moved(net, move):
    anchor = Anchor.from_model(net)
    move(net).requires_grad_(False)
    try:
        interpolate(net, anchor, 0.0)
    except ValueError:
        return
    assert torch.equal(net[0].weight, anchor["0.weight"])

"""The differentiable penalty: its gradient, its agreement with the one-pass form, and what it leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_l2sp import Anchor, l2sp_penalty
from hf_l2sp import penalty as penalty_module
from hf_l2sp.penalty import penalty_pass

# Relative error of a sum of squares whose differences are exact, and of one gradient stored in that dtype.
VALUE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
STORED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(VALUE)


def total(anchor, model, weight=lambda name: 1.0):
    """Σ w‖θ − θ0‖² in float64, with a weight per name."""
    values = []
    for name, origin in anchor.items():
        difference = model.get_parameter(name).detach().double() - origin.double()
        values.append(float((weight(name) * difference**2).sum()))
    return math.fsum(values)


def test_gradcheck(net, move):
    net.double()
    weights = {name: torch.rand(p.shape, dtype=torch.float64) for name, p in net.named_parameters()}
    anchor = Anchor.from_model(net)
    move(net, 0.5)

    def value(*parameters):
        return sum(
            penalty_module._SquaredDistance.apply(p, anchor[name], weights[name], 2 if name == "0.weight" else None)
            for name, p in zip(anchor, parameters, strict=True)
        )

    anchor._values["0.weight"] = anchor["0.weight"][:2]
    weights["0.weight"] = weights["0.weight"][:2]
    parameters = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)


def test_gradcheck_of_the_pull_to_zero():
    theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: penalty_module._SquaredDistance.apply(t, None, 1.0, None), theta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_those_of_the_pass(net, move, dtype):
    net.to(dtype)
    anchor = Anchor.from_model(net)
    move(net)
    value = l2sp_penalty(net, anchor)
    assert value.dim() == 0 and value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(total(anchor, net), rel=VALUE[dtype])
    (0.3 * value).backward()
    graph = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    penalty_pass(anchor.terms(), 0.3)
    for name, parameter in net.named_parameters():
        assert torch.allclose(graph[name].double(), parameter.grad.double(), rtol=2 * STORED[dtype], atol=0)


@pytest.mark.parametrize("rows", [False, True])
def test_embedding_with_new_rows(gpt2, move, rows):
    if rows:
        gpt2.resize_token_embeddings(97)
    anchor = Anchor.from_model(gpt2)
    move(gpt2)
    l2sp_penalty(gpt2, anchor).backward()
    table = gpt2.transformer.wte.weight
    assert torch.allclose(table.grad[:90], 2 * (table.detach()[:90] - anchor["transformer.wte.weight"]))
    assert bool((table.grad[90:] == 0).all())


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_it(net, move, autocast):
    anchor = Anchor.from_model(net)
    move(net)
    plain = l2sp_penalty(net, anchor)
    plain.backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with torch.autocast("cpu", dtype=autocast):
        value = l2sp_penalty(net, anchor)
        value.backward()
    assert value.dtype == torch.float32 and torch.equal(value, plain)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_a_loop_of_ones_own_stays_near_the_start():
    net = nn.Linear(3, 2)
    anchor = Anchor.from_model(net)
    inputs, targets = torch.randn(16, 3), 5 + torch.randn(16, 2)

    def trained(strength):
        model = nn.Linear(3, 2)
        model.load_state_dict({name: value.clone() for name, value in anchor.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            (loss + strength * l2sp_penalty(model, anchor)).backward()
            optimizer.step()
        return l2sp_penalty(model, anchor).item()

    distances = [trained(strength) for strength in (0.0, 0.1, 1.0, 5.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * distances[-1] > 0


def test_new_parameters_feel_beta_and_nothing_else(classifier, move):
    anchor = Anchor.from_model(classifier)
    move(classifier)
    squares = sum(float(p.detach().double().square().sum()) for p in classifier.classifier.parameters())
    without = l2sp_penalty(classifier, anchor)
    assert without.item() == pytest.approx(total(anchor, classifier), rel=1e-6)
    without.backward()
    assert classifier.classifier.weight.grad is None
    classifier.zero_grad()
    value = l2sp_penalty(classifier, anchor, beta=0.5)
    assert value.item() == pytest.approx(without.item() + 0.5 * squares, rel=1e-6)
    value.backward()
    assert torch.allclose(classifier.classifier.weight.grad, classifier.classifier.weight)


def test_weights_of_the_plan_and_weights_instead(net, move):
    anchor = Anchor.from_model(net, weights={"bias": 3.0})
    move(net)
    assert l2sp_penalty(net, anchor).item() == pytest.approx(
        total(anchor, net, lambda name: 3.0 if "bias" in name else 1.0), rel=1e-6
    )
    assert l2sp_penalty(net, anchor, {"^0": 2.0}).item() == pytest.approx(
        total(anchor, net, lambda name: 2.0 if name[0] == "0" else 1.0), rel=1e-6
    )
    tensors = {name: torch.rand(p.shape) for name, p in net.named_parameters()}
    assert l2sp_penalty(net, anchor, tensors).item() == pytest.approx(total(anchor, net, tensors.get), rel=1e-6)
    assert l2sp_penalty(net, anchor, {"bias": 0.0}).item() == pytest.approx(
        total(anchor, net, lambda name: float("bias" not in name)), rel=1e-6
    )
    # Of that call alone.
    assert anchor.plan.entries["1.bias"].weight == 3.0 and not anchor.plan.entries["1.bias"].excluded
    with pytest.raises(ValueError, match="l2sp_weights: 'nowhere' matches no parameter"):
        l2sp_penalty(net, anchor, {"nowhere": 1.0})


def test_excluded_and_frozen_parameters_stay_out(net, move):
    anchor = Anchor.from_model(net)
    move(net)
    net[0].requires_grad_(False)
    value = l2sp_penalty(net, anchor)
    assert value.item() == pytest.approx(total(anchor, net, lambda name: float(name[0] == "1")), rel=1e-6)
    value.backward()
    assert net[0].weight.grad is None
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="found no trainable parameter with an anchor"):
        l2sp_penalty(net, anchor)


def test_exclusions_hold_with_other_weights(classifier, move):
    anchor = Anchor.from_model(classifier, exclude=["pooler"])
    move(classifier)
    assert torch.equal(l2sp_penalty(classifier, anchor, {".": 1.0}), l2sp_penalty(classifier, anchor))


def test_what_is_unfrozen_in_a_loop_of_ones_own_is_pulled(net, move):
    net[0].requires_grad_(False)
    anchor = Anchor.from_model(net)
    net[0].requires_grad_(True)
    l2sp_penalty(net, anchor)
    move(net)
    l2sp_penalty(net, anchor).backward()
    assert net[0].weight.grad is not None


def test_wrapped_model_and_bare_one_give_the_same(net, move):
    anchor = Anchor.from_model(torch.compile(net))
    move(net)
    assert torch.equal(l2sp_penalty(nn.DataParallel(net), anchor), l2sp_penalty(net, anchor))


def test_wrong_model(net):
    anchor = Anchor.from_model(net)
    with pytest.raises(ValueError, match="which the model lacks; they belong to different models"):
        l2sp_penalty(nn.Linear(3, 4), anchor)
    with pytest.raises(ValueError, match=r"0\.weight has shape"):
        l2sp_penalty(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), anchor)


def test_shared_module_counts_once(move):
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    anchor = Anchor.from_model(net)
    move(net)
    assert list(anchor) == ["0.weight", "0.bias"]
    assert l2sp_penalty(net, anchor).item() == pytest.approx(total(anchor, net), rel=1e-6)

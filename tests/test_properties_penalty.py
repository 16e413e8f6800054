"""The penalty on random models, against float64 arithmetic written out: any tree, dtypes, layouts and ties."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from hf_l2sp import Anchor, l2sp_penalty
from hf_l2sp import penalty as penalty_module
from hf_l2sp.provenance import Provenance

from .module_trees import PATTERNS, Leaf, Tree, assert_gradients, build, by_the_book, move, snapshot, trees

steady = settings(deadline=None, derandomize=True, max_examples=100)
SEEDS = st.integers(0, 2**16)
EXCLUDE = st.lists(st.sampled_from(PATTERNS), max_size=2, unique=True)
WEIGHTS = st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from((0, 0.25, 1, 3.0)), max_size=3)
STRENGTHS = st.sampled_from((0.01, 0.5, 1.0, 3.7))
# A tied weight under four names, in a layout of its own; and next to it one that is empty.
TIED = Tree(
    leaves=[Leaf("weight", (3, 4), torch.float32, False, "transposed"), Leaf("b0", (0,), torch.float64, False, "")],
    children=[("head", Tree([Leaf("weight", (), torch.float32, False, "", shared=0)], again=True))],
)


def anchored(
    tree: Tree, seed: int, exclude: list[str], weights: dict[str, float]
) -> tuple[nn.Module, Anchor, dict[str, torch.Tensor], dict[str, float]]:
    """A moved model, its anchor, the values before it moved, and the weights that match one of its names."""
    model = build(tree, seed)
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    weights = {pattern: w for pattern, w in weights.items() if any(re.search(pattern, name) for name in names)}
    origin = snapshot(model)
    assume(by_the_book(model, origin, exclude, weights).gradients)
    anchor = Anchor.from_model(model, exclude=exclude, weights=weights or None)
    move(model, seed + 1)
    return model, anchor, origin, weights


@steady
@given(trees(), SEEDS, EXCLUDE, WEIGHTS)
@example(TIED, 0, [], {"weight": 3.0})
def test_differentiable_penalty_is_the_one_of_the_book(tree, seed, exclude, weights):
    model, anchor, origin, weights = anchored(tree, seed, exclude, weights)
    before = snapshot(model)
    expected = by_the_book(model, origin, exclude, weights)
    value = l2sp_penalty(model, anchor)
    assert value.shape == () and value.dtype in (torch.float32, torch.float64)
    assert value.item() == pytest.approx(expected.value, rel=1e-5, abs=1e-30)
    value.backward()
    assert_gradients(model, expected.gradients)
    assert set(anchor) == set(expected.gradients)
    # Nothing but gradients was touched: no parameter, no buffer, no θ0.
    assert all(torch.equal(now, before[name]) for name, now in snapshot(model).items())
    assert all(torch.equal(anchor[name], origin[name]) for name in anchor)


@steady
@given(trees(), SEEDS, EXCLUDE, WEIGHTS, STRENGTHS, st.sampled_from((1, 2, 5, 64, 1 << 18)))
@example(TIED, 0, [], {}, 0.5, 5)
def test_chunked_pass_is_the_one_of_the_book_for_any_chunk(tree, seed, exclude, weights, strength, chunk):
    model, anchor, origin, weights = anchored(tree, seed, exclude, weights)
    before = snapshot(model)
    expected = by_the_book(model, origin, exclude, weights)
    with mock.patch.object(penalty_module, "CHUNK", chunk):
        measured = anchor.apply(strength, gradient=False)
        assert_gradients(model, {})
        sums = anchor.apply(strength)
    for found in (measured, sums):
        assert float(found.total) == pytest.approx(expected.value, rel=1e-5, abs=1e-30)
    assert_gradients(model, expected.gradients, strength)
    assert len(sums.squared) == len(anchor.active_names()) == len(expected.gradients)
    assert all(torch.equal(now, before[name]) for name, now in snapshot(model).items())


@steady
@given(trees(), SEEDS, EXCLUDE, WEIGHTS, st.integers(1, 4))
@example(TIED, 0, [], {}, 3)
def test_the_pass_adds_to_the_gradients_of_the_task(tree, seed, exclude, weights, times):
    """As often as it is called, and on top of what is there; parameters that are not pulled keep theirs to the bit."""
    model, anchor, origin, weights = anchored(tree, seed, exclude, weights)
    generator = torch.Generator().manual_seed(seed)
    tasks = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            tasks[name] = parameter.grad.clone()
    for _ in range(times):
        anchor.apply(0.5)
    expected = by_the_book(model, origin, exclude, weights).gradients
    for name, task in tasks.items():
        grad = model.get_parameter(name).grad
        if name not in expected:
            assert torch.equal(grad, task)
            continue
        wanted = task.double() + times * 0.5 * expected[name]
        size = task.double().abs() + times * 0.5 * expected[name].abs()
        assert bool(((grad.double() - wanted).abs() <= 2 * times * torch.finfo(grad.dtype).eps * size + 1e-6).all())


@steady
@given(trees(), SEEDS, EXCLUDE, WEIGHTS, st.integers(-8, 8))
def test_penalty_and_gradient_are_linear_in_the_strength(tree, seed, exclude, weights, power):
    """Exactly, where the factor is a power of two: no number but the exponent changes."""
    model, anchor, _, _ = anchored(tree, seed, exclude, weights)
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.float16}  # whose exponents are few
    gradients = []
    for strength in (1.0, 2.0**power):
        model.zero_grad()
        total = anchor.apply(strength).total
        gradients.append({n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None})
        assert float(total) == float(anchor.apply(0.0).total)  # there is no λ in the sums
    for name, grad in gradients[0].items():
        if name not in narrow:
            assert torch.equal(gradients[1][name], grad * 2.0**power)


@steady
@given(trees(), SEEDS, st.sampled_from((0.0, 0.3, 2.0)), st.data())
def test_new_parameters_are_pulled_to_zero_by_beta_alone(tree, seed, beta, data):
    model = build(tree, seed)
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    new = frozenset(data.draw(st.lists(st.sampled_from(names), unique=True)) if names else [])
    origin = snapshot(model)
    assume(by_the_book(model, origin, [], {}, new).gradients)
    anchor = Anchor.from_model(model, provenance=Provenance(True, new))
    move(model, seed + 1)
    expected = by_the_book(model, origin, [], {}, new, beta)
    value = l2sp_penalty(model, anchor, beta=beta)
    assert value.item() == pytest.approx(expected.value, rel=1e-5, abs=1e-30)
    value.backward()
    assert_gradients(model, expected.gradients)


@steady
@given(trees(), SEEDS, st.data())
def test_weights_of_a_tensor_each_weigh_every_number(tree, seed, data):
    model = build(tree, seed)
    origin = snapshot(model)
    pulled = by_the_book(model, origin, [], {}).gradients
    assume(pulled)
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
    weights = {name: 3 * torch.rand(value.shape, generator=generator).to(dtype) for name, value in pulled.items()}
    anchor = Anchor.from_model(model, weights=weights)
    move(model, seed + 1)
    differences = {name: gradient / 2 for name, gradient in by_the_book(model, origin, [], {}).gradients.items()}
    expected = {name: 2 * weights[name].double() * difference for name, difference in differences.items()}
    value = sum(float((weights[name].double() * d**2).sum()) for name, d in differences.items())
    penalty = l2sp_penalty(model, anchor)
    assert penalty.item() == pytest.approx(value, rel=1e-5, abs=1e-30)
    penalty.backward()
    assert_gradients(model, expected)
    model.zero_grad()
    assert float(anchor.apply(1.0).total) == pytest.approx(value, rel=1e-5, abs=1e-30)
    assert_gradients(model, expected)


@steady
@given(trees(), SEEDS)
@example(TIED, 0)
def test_at_the_anchor_there_is_no_penalty_and_no_gradient(tree, seed):
    model = build(tree, seed)
    assume(by_the_book(model, snapshot(model), [], {}).gradients)
    anchor = Anchor.from_model(model)
    value = l2sp_penalty(model, anchor)
    assert value.item() == 0.0
    value.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@steady
@given(trees(), SEEDS, st.data())
def test_what_is_frozen_or_unfrozen_later_counts_as_it_is_now(tree, seed, data):
    model = build(tree, seed)
    origin = snapshot(model)
    assume(by_the_book(model, origin, [], {}).gradients)
    anchor = Anchor.from_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in data.draw(st.lists(st.sampled_from(trained), unique_by=id)):
        parameter.requires_grad_(False)
    # What was frozen from the beginning has not moved when it is unfrozen.
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad and data.draw(st.booleans()):
            parameter.requires_grad_(True)
    anchor.join_trainable()
    move(model, seed + 1)
    expected = by_the_book(model, origin, [], {})
    assume(expected.gradients)
    value = l2sp_penalty(model, anchor)
    assert value.item() == pytest.approx(expected.value, rel=1e-5, abs=1e-30)
    value.backward()
    assert_gradients(model, expected.gradients)


@steady
@given(trees(), SEEDS, st.sampled_from((float("nan"), float("inf"))), st.data())
def test_a_broken_value_is_not_pulled_and_spoils_nothing_else(tree, seed, value, data):
    model = build(tree, seed)
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.numel()]
    assume(names)
    broken = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    with torch.no_grad():
        for name in broken:
            parameter = model.get_parameter(name)
            parameter[(-1,) * parameter.dim()] = value
    origin = snapshot(model)
    anchor = Anchor.from_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1.5)
    assert {entry.name for entry in anchor.plan.having("excluded")} == set(broken)
    expected = by_the_book(model, origin, [f"^{re.escape(name)}$" for name in broken], {})
    assert float(anchor.apply(1.0).total) == pytest.approx(expected.value, rel=1e-5, abs=1e-30)
    assert_gradients(model, expected.gradients)

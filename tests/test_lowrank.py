"""The low-rank distance and its gradients against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_l2sp.lowrank import LowRank, Product, lowrank_pass, lowrank_squared

# Relative error of the value, and of a gradient as a whole, for factors in float32 or rounded to less: a hundredth of
# what is asked for. float64 factors lose nothing but the rounding of sums.
TOLERANCE = 1e-7


def product(out=48, into=40, rank=8, scale=1.5, dtype=torch.float32, size=1.0, up=None, down=None):
    up = torch.randn(up or (out, rank)) * size
    down = torch.randn(down or (rank, into)) * size
    return Product(up.to(dtype).requires_grad_(), down.to(dtype).requires_grad_(), scale)


def start_of(now, size=0.1, scale=None):
    """A start at some distance from where the product is now."""
    up, down = (x.detach() + size * torch.randn(x.shape).to(x.dtype) for x in now[:2])
    return Product(up, down, now.scale if scale is None else scale)


def dense(term):
    """The distance, and its gradients by every B and A in a flat list, from whole products in float64."""
    leaves = [
        (p.up.detach().double().requires_grad_(), p.down.detach().double().requires_grad_()) for p in term.products
    ]
    change = 0
    for (up, down), now in zip(leaves, term.products, strict=True):
        change = change + now.scale * up.flatten(1) @ down.flatten(1)
    for start in (*term.starts, *term.gone):
        if start is not None:
            change = change - start.scale * start.up.double().flatten(1) @ start.down.double().flatten(1)
    squared = change[: term.rows, : term.columns].square().sum()
    if leaves:
        squared.backward()
    return float(squared.detach()), [factor.grad for pair in leaves for factor in pair]


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def check(term, coefficient=0.7, tolerance=TOLERANCE):
    expected, gradients = dense(term)
    result = lowrank_pass(term, coefficient)
    assert result.squared.dtype == torch.float64 and result.squared.dim() == 0
    assert float(result.squared) == pytest.approx(expected, rel=tolerance)
    assert lowrank_squared(term).item() == pytest.approx(expected, rel=tolerance)
    factors = [factor for now in term.products for factor in now[:2]]
    returned = [gradient for pair in result.gradients for gradient in pair]
    for factor, found, wanted in zip(factors, returned, gradients, strict=True):
        assert found.shape == factor.shape
        assert found.dtype == torch.promote_types(factor.dtype, torch.float32)
        assert relative(found, coefficient * wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_one_adapter(dtype, rank):
    check(LowRank((product(rank=rank, dtype=dtype),)))


@pytest.mark.parametrize("scale", [2.0, 0.25, -1.0, 0.0])
def test_scale(scale):
    term = LowRank((product(), product(rank=3, scale=scale)))
    expected, gradients = dense(term)
    result = lowrank_pass(term)
    assert float(result.squared) == pytest.approx(expected, rel=TOLERANCE)
    for found, wanted in zip(result.gradients[1], gradients[2:], strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-12)


def test_several_adapters_have_cross_terms():
    first = product()
    second = Product(first.up.detach() + 0.1, first.down.detach() + 0.1, 3.0)
    check(LowRank((first, second)))
    check(LowRank((first, second, product(rank=64, scale=-0.2))))
    alone = sum(float(lowrank_squared(LowRank((now,)))) for now in (first, second))
    assert alone < 0.7 * dense(LowRank((first, second)))[0]


def test_adapters_that_cancel():
    now = product()
    opposite = Product(-now.up.detach(), now.down.detach() * (1 + 2**-12), now.scale)
    check(LowRank((now, opposite)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("rank", [8, 64])
def test_start_that_belongs_to_the_anchor(dtype, size, rank):
    now = product(rank=rank, dtype=dtype, size=10.0)
    start = start_of(now, size)
    if dtype == torch.bfloat16:  # kept in more digits than the adapter has
        start = start_of(Product(now.up.detach().float(), now.down.detach().float(), now.scale), size)
    check(LowRank((now,), (start,)))


def test_at_its_start_a_product_has_no_distance():
    now = product()
    start = Product(now.up.detach().clone(), now.down.detach().clone(), now.scale)
    result = lowrank_pass(LowRank((now,), (start,)))
    assert float(result.squared) == 0.0
    assert not any(bool(gradient.any()) for gradient in result.gradients[0])


@pytest.mark.parametrize("scale", [2.0, 0.0, 1.5 + 1e-6])
def test_scale_that_was_another_at_the_start(scale):
    now = product()
    check(LowRank((now,), (start_of(now, 0.0, scale),)))
    check(LowRank((now,), (start_of(now, 0.3, scale),)))


def test_adapters_of_all_kinds_together():
    now = [
        product(),
        product(rank=64, dtype=torch.bfloat16),
        product(rank=3, scale=-0.3),
        product(dtype=torch.float64),
    ]
    starts = (start_of(now[0]), None, start_of(now[2], scale=0.7), None)
    gone = (start_of(product(rank=5)), start_of(product(rank=2)))
    check(LowRank(tuple(now), starts, gone))
    check(LowRank(tuple(now), starts))
    check(LowRank(tuple(now), (), gone))


def test_starts_alone():
    gone = (start_of(product()), start_of(product(rank=3)))
    result = lowrank_pass(LowRank((), (), gone))
    assert float(result.squared) == pytest.approx(dense(LowRank((), (), gone))[0], rel=TOLERANCE)
    assert result.gradients == ()


def test_nothing_at_all():
    assert float(lowrank_pass(LowRank(())).squared) == 0.0
    assert float(lowrank_squared(LowRank(()))) == 0.0


@pytest.mark.parametrize("rows, columns", [(30, None), (None, 25), (30, 25), (48, 40)])
def test_leading_rows_and_columns(rows, columns):
    now = (product(), product(rank=3))
    term = LowRank(now, (start_of(now[0]), None), (start_of(product(rank=2)),), rows, columns)
    check(term)
    up, down = lowrank_pass(term).gradients[1]
    assert not up[rows or 48 :].any() and not down[:, columns or 40 :].any()


def test_convolution():
    term = LowRank((product(up=(12, 8, 1, 1), down=(8, 5, 3, 2)), product(up=(12, 3, 1, 1), down=(3, 5, 3, 2))))
    check(term)
    check(term._replace(starts=(start_of(term.products[0]), None)))
    weights = [
        now.scale * torch.nn.functional.conv2d(now.down.double().transpose(0, 1), now.up.double()).transpose(0, 1)
        for now in term.products
    ]
    assert float(lowrank_squared(term)) == pytest.approx(float(sum(weights).square().sum()), rel=TOLERANCE)


def test_bias():
    biases = [torch.randn(12, requires_grad=True) for _ in range(2)]
    term = LowRank(tuple(Product(b, torch.ones(1), scale) for b, scale in zip(biases, (2.0, -0.5), strict=True)))
    change = 2.0 * biases[0].double() - 0.5 * biases[1].double()
    result = lowrank_pass(term, 0.7)
    assert float(result.squared) == pytest.approx(float(change.square().sum()), rel=TOLERANCE)
    assert result.gradients[0][0].shape == (12,)
    assert relative(result.gradients[0][0], 0.7 * 2 * 2.0 * change) < TOLERANCE
    assert relative(result.gradients[1][0], 0.7 * 2 * -0.5 * change) < TOLERANCE


def test_factors_that_are_not_contiguous():
    up, down = torch.randn(8, 48).t().requires_grad_(), torch.randn(40, 8).t().requires_grad_()
    check(LowRank((Product(up, down, 2.0),)))
    conv = torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    check(LowRank((Product(torch.randn(12, 8, 1, 1).requires_grad_(), conv, 2.0),)))


def test_coefficient_on_the_device():
    term = LowRank((product(), product(rank=3)))
    scaled = lowrank_pass(term, torch.tensor(512.0))
    plain = lowrank_pass(term, 512.0)
    assert torch.equal(scaled.squared, plain.squared)
    for pair, other in zip(scaled.gradients, plain.gradients, strict=True):
        assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])


def test_autocast_changes_nothing():
    now = product()
    term = LowRank((now,), (start_of(now),))
    with torch.autocast("cpu", torch.bfloat16):
        check(term)
        lowrank_squared(term).backward()
    assert relative(now.up.grad, dense(term)[1][0]) < TOLERANCE


def test_the_pass_changes_none_of_its_tensors():
    now = (product(), product(dtype=torch.float64))
    term = LowRank(now, (start_of(now[0]), start_of(now[1])), (start_of(product(rank=2)),))
    tensors = [x for p in (*term.products, *term.starts, *term.gone) for x in p[:2]]
    before = [x.detach().clone() for x in tensors]
    lowrank_pass(term)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert all(x.grad is None for x in tensors)


@pytest.mark.parametrize("started", [False, True])
def test_gradcheck(started):
    now = (product(5, 4, 2, dtype=torch.float64), product(5, 4, 3, scale=-0.5, dtype=torch.float64))
    starts = (start_of(now[0], scale=0.7), None) if started else ()
    gone = (start_of(product(5, 4, 2, dtype=torch.float64)),) if started else ()

    def value(up, down, up_, down_):
        products = (Product(up, down, now[0].scale), Product(up_, down_, now[1].scale))
        return lowrank_squared(LowRank(products, starts, gone, 4, 3)).sqrt()

    factors = tuple(factor for p in now for factor in p[:2])
    assert torch.autograd.gradcheck(value, factors)
    assert torch.autograd.gradgradcheck(value, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differentiable_form_gives_the_gradients_of_the_pass(dtype):
    now = (product(dtype=dtype), product(rank=3, dtype=dtype))
    term = LowRank(now, (start_of(now[0]), None))
    (0.3 * lowrank_squared(term)).backward()
    for p, pair in zip(now, lowrank_pass(term, 0.3).gradients, strict=True):
        for factor, gradient in zip(p[:2], pair, strict=True):
            assert factor.grad.dtype == dtype
            assert torch.equal(factor.grad, gradient.to(dtype))


def test_frozen_factors_count_and_get_no_gradient():
    free, frozen = product(), product(rank=3)
    frozen.up.requires_grad_(False)
    frozen.down.requires_grad_(False)
    term = LowRank((free, frozen))
    value = lowrank_squared(term)
    value.backward()
    expected, gradients = dense(term)
    assert float(value) == pytest.approx(expected, rel=TOLERANCE)
    assert frozen.up.grad is None and frozen.down.grad is None
    assert relative(free.up.grad, gradients[0]) < TOLERANCE
    assert not lowrank_squared(LowRank((frozen,))).requires_grad


class _Largest(TorchDispatchMode):
    """The most elements in a tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("out, into", [(512, 512), (512, 64), (64, 512)])
def test_no_tensor_larger_than_the_factors(out, into, differentiable):
    now = (product(out, into, 4), product(out, into, 2))
    term = LowRank(now, (start_of(now[0]), None), (start_of(product(out, into, 2)),))
    with _Largest() as watch:
        if differentiable:
            lowrank_squared(term).backward()
        else:
            lowrank_pass(term)
    columns = 4 + 4 + 2 + 2
    assert watch.largest == columns * max(out, into) < out * into / 5


def test_the_watch_sees_a_product():
    now = product(512, 512, 4)
    with _Largest() as watch:
        now.up @ now.down
    assert watch.largest == 512 * 512

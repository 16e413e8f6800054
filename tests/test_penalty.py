"""The one-pass penalty against float64 arithmetic written out, and the differentiable form against the pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_l2sp import penalty as penalty_module
from hf_l2sp.penalty import Term, penalty_pass

# Relative error of a sum of squares whose differences are exact, and of one gradient stored in that dtype.
VALUE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
STORED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(VALUE)


def naive(theta, anchor=None, weight=1.0, rows=None):
    """w‖θ − θ0‖², ‖θ − θ0‖² and 2w(θ − θ0) in float64."""
    theta = theta.detach().double()
    pulled = theta if rows is None else theta[:rows]
    difference = pulled - (0 if anchor is None else anchor.double())
    weight = weight.double() if torch.is_tensor(weight) else weight
    gradient = torch.zeros_like(theta)
    gradient[... if rows is None else slice(rows)] = 2 * weight * difference
    return float((weight * difference**2).sum()), float((difference**2).sum()), gradient


def term_of(shape=(40, 25), dtype=torch.float32, weight=1.0, rows=None, anchored=True, anchor_dtype=None):
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    anchor = None
    if anchored:
        near = parameter.detach() + 0.1 * torch.randn(shape).to(dtype)
        anchor = (near if rows is None else near[:rows]).to(anchor_dtype or dtype, copy=True)
    return Term(parameter, anchor, weight, rows)


def weights_for(term):
    shape = term.parameter.shape if term.rows is None else (term.rows, *term.parameter.shape[1:])
    return term._replace(weight=torch.rand(shape) * 3)


def check(terms, coefficient=0.7, scale=None):
    """One pass over the terms against the naive sums, with gradients that were there before."""
    tasks = []
    for term in terms:
        term.parameter.grad = torch.randn_like(term.parameter)
        tasks.append(term.parameter.grad.double().clone())
    sums = penalty_pass(terms, coefficient, grad_scale=None if scale is None else torch.tensor(float(scale)))
    expected = [naive(*term[:4]) for term in terms]
    loosest = max(VALUE[term.parameter.dtype] for term in terms)
    assert sums.weighted.dtype == sums.squared.dtype == torch.float64
    assert float(sums.total) == pytest.approx(math.fsum(w for w, _, _ in expected), rel=loosest)
    assert sums.squared.tolist() == pytest.approx([s for _, s, _ in expected], rel=loosest)
    for term, task, (_, _, gradient) in zip(terms, tasks, expected, strict=True):
        wanted = task + coefficient * (scale or 1.0) * gradient
        tolerance = STORED[term.parameter.dtype] * (wanted.abs() + task.abs())
        assert term.parameter.grad.dtype == term.parameter.dtype
        assert bool(((term.parameter.grad.double() - wanted).abs() <= tolerance).all())


@pytest.fixture(params=[None, 64], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(penalty_module, "CHUNK", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1.0, 2.5, "tensor"])
def test_against_float64(dtype, weight, chunks):
    term = term_of(dtype=dtype, weight=1.0 if weight == "tensor" else weight)
    check([weights_for(term) if weight == "tensor" else term])


@pytest.mark.parametrize("anchor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_anchor_of_another_dtype(dtype, anchor_dtype, chunks):
    term = term_of(dtype=dtype, anchor_dtype=anchor_dtype)
    if anchor_dtype == torch.float64 and dtype != torch.float64:
        # The pass rounds such an anchor to float32 first.
        term = term._replace(anchor=term.anchor.float().double())
    check([term])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_leading_rows(dtype, weighted, chunks):
    term = term_of(dtype=dtype, rows=30)
    check([weights_for(term) if weighted else term._replace(weight=1.5)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pull_to_zero(dtype, chunks):
    check([term_of(dtype=dtype, anchored=False)])


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (1000,), (7, 11), (3, 4, 5, 6), (1, 300), (300, 1)])
def test_shapes(shape, chunks):
    check([term_of(shape), weights_for(term_of(shape))])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_parameters(shape):
    check([term_of(shape), term_of((3, 2))])


def test_no_terms():
    sums = penalty_pass([], 1.0)
    assert float(sums.total) == 0.0 and sums.squared.shape == (0,)


def test_many_terms_of_every_kind(chunks):
    terms = [term_of(dtype=dtype, weight=w, rows=r) for dtype in DTYPES for w in (1.0, 0.3) for r in (None, 11)]
    check([*terms, weights_for(term_of()), term_of(()), term_of(anchored=False)])


def strided(kind):
    if kind == "transposed":
        return torch.randn(25, 40).t()
    if kind == "channels last":
        return torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last)
    if kind == "every other column":
        return torch.randn(40, 50)[:, ::2]
    return torch.randn(1, 5, 40).transpose(1, 2)


@pytest.mark.parametrize("kind", ["transposed", "channels last", "every other column"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [None, 4])
def test_strided_parameters(kind, weighted, rows, chunks):
    parameter = nn.Parameter(strided(kind))
    assert not parameter.is_contiguous()
    anchor = (parameter.detach() + 0.1).contiguous()[:rows]
    term = Term(parameter, anchor, 1.0, rows)
    check([weights_for(term) if weighted else term])


@pytest.mark.parametrize("shape", [(1, 5, 40), (4, 5, 40)])
def test_strided_parameter_with_rows_longer_than_a_chunk(shape, monkeypatch):
    monkeypatch.setattr(penalty_module, "CHUNK", 64)
    parameter = nn.Parameter(torch.randn(shape).transpose(1, 2))
    check([Term(parameter, torch.zeros(parameter.shape))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_gradient_is_made(dtype):
    term = term_of(dtype=dtype, rows=30)
    penalty_pass([term], 0.5)
    wanted = 0.5 * naive(*term[:4])[2]
    assert torch.allclose(term.parameter.grad.double(), wanted, rtol=STORED[dtype], atol=0)
    assert bool((term.parameter.grad[30:] == 0).all())


def test_sparse_gradient_becomes_dense():
    table = nn.Embedding(20, 4, sparse=True)
    anchor = table.weight.detach() + 1.0
    table(torch.tensor([3, 3, 7])).sum().backward()
    assert table.weight.grad.is_sparse
    task = table.weight.grad.to_dense()
    penalty_pass([Term(table.weight, anchor[:15], 1.0, 15)], 0.5)
    wanted = task.clone()
    wanted[:15] -= 1.0
    assert torch.allclose(table.weight.grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1024.0, 0.5])
def test_scaled_gradients(dtype, scale, chunks):
    check([term_of(dtype=dtype), weights_for(term_of(dtype=dtype)), term_of(dtype=dtype, weight=0.3)], 0.01, scale)


@pytest.mark.parametrize("options", [{"coefficient": 0.0}, {"coefficient": 1.0, "gradient": False}], ids=str)
def test_measuring_leaves_gradients_alone_though_the_distance_is_infinite(options):
    term = term_of((3,))
    term.parameter.data[1] = math.inf
    sums = penalty_pass([term], **options)
    assert term.parameter.grad is None and float(sums.total) == math.inf
    term.parameter.grad = torch.ones(3)
    penalty_pass([term], **options)
    assert term.parameter.grad.tolist() == [1.0, 1.0, 1.0]


def test_nothing_but_the_gradients_is_changed():
    terms = [weights_for(term_of()), term_of(rows=7), term_of(dtype=torch.bfloat16), term_of(anchored=False)]
    before = [[x.detach().clone() for x in term if torch.is_tensor(x)] for term in terms]
    penalty_pass(terms, 3.0, grad_scale=torch.tensor(8.0))
    after = [[x.detach() for x in term if torch.is_tensor(x)] for term in terms]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


def test_tiny_differences_do_not_cancel():
    parameter = nn.Parameter(torch.full((1000,), 1000.0))
    anchor = torch.full((1000,), 1000.0).nextafter(torch.tensor(math.inf))
    step = float(anchor[0]) - 1000.0
    sums = penalty_pass([Term(parameter, anchor)], 1.0)
    assert float(sums.total) == pytest.approx(1000 * step**2, rel=1e-6)
    assert bool((parameter.grad == -2 * step).all())


class _Largest(TorchDispatchMode):
    """The most elements in a tensor that an operation made in memory of its own."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.kept = []  # else freed memory is handed out again under a known address
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.kept.append(tensor)
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_a_parameters_size(dtype, monkeypatch):
    monkeypatch.setattr(penalty_module, "CHUNK", 64)
    terms = [
        term_of(dtype=dtype),
        weights_for(term_of(dtype=dtype)),
        term_of(dtype=dtype, rows=30),
        term_of(dtype=dtype, anchored=False),
        term_of(dtype=dtype, anchor_dtype=torch.bfloat16),
        Term(nn.Parameter(strided("transposed").to(dtype)), torch.zeros(40, 25, dtype=dtype)),
    ]
    for term in terms:
        term.parameter.grad = torch.zeros_like(term.parameter)
    known = [x for term in terms for x in (*term, term.parameter.grad) if torch.is_tensor(x)]
    with _Largest(known) as watch:
        penalty_pass(terms, 1.0)
    # The sums of all chunks are stacked in the end: here chunks are so small that this is the larger part.
    chunks = sum(-(-term.parameter.numel() // 64) + 40 for term in terms)
    assert 64 <= watch.largest <= max(64, chunks) < 1000


def test_the_watch_sees_a_temporary():
    tensor = torch.zeros(500)
    with _Largest([tensor]) as watch:
        tensor.view(50, 10).add_(1)
        assert watch.largest == 0
        tensor + 1
    assert watch.largest == 500

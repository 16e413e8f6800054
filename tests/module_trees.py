"""Random models for property tests, and the penalty on them written out in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Relative error of one rounding to the dtype.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Names on which patterns overlap.
NAMES = ("layer", "layers", "norm", "bias", "weight", "head", "a", "b0")
PATTERNS = ("bias", "^layer", r"layers?\.", "norm$", "weight|head", r"\.a$", "a", r"^[^.]*$", r"\d", "(?i)LAYER", ".")
SHAPES = ((), (1,), (7,), (3, 4), (4, 1), (2, 3, 2), (33, 5), (0,), (0, 4), (5, 0, 2))


@dataclass
class Leaf:
    """A parameter of a drawn tree.

    Attributes:
        shared: Which of the parameters before it, counted around, this one is; None: a new one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    frozen: bool
    layout: str
    shared: int | None = None


@dataclass
class Tree:
    """A module of a drawn tree; `again`: it also hangs under a second name, so that all of its weights are tied."""

    leaves: list[Leaf] = field(default_factory=list)
    children: list[tuple[str, Tree]] = field(default_factory=list)
    buffers: bool = False
    again: bool = False


def leaves() -> st.SearchStrategy[Leaf]:
    return st.builds(
        Leaf,
        name=st.sampled_from(NAMES),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from((*DTYPES, torch.int64)),
        frozen=st.integers(0, 4).map(lambda number: number == 0),
        layout=st.sampled_from(("contiguous", "contiguous", "transposed", "strided")),
        shared=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    )


def trees() -> st.SearchStrategy[Tree]:
    def tree(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Tree]:
        return st.builds(
            Tree,
            leaves=st.lists(leaves(), max_size=4),
            children=st.lists(st.tuples(st.sampled_from(NAMES), children), max_size=3),
            buffers=st.booleans(),
            again=st.integers(0, 5).map(lambda number: number == 0),
        )

    return st.recursive(st.builds(Tree, leaves=st.lists(leaves(), min_size=1, max_size=4)), tree, max_leaves=5)


def _values(leaf: Leaf, generator: torch.Generator) -> Tensor:
    values = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
    if leaf.layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1) if values.dim() > 1 else values
    if leaf.layout == "strided" and values.dim():
        wider = values.repeat_interleave(2, dim=-1)
        return wider[..., ::2]
    return values


def build(tree: Tree, seed: int) -> nn.Module:
    """The model of a tree, with random values."""
    generator = torch.Generator().manual_seed(seed)
    made: list[nn.Parameter] = []

    def module_of(tree: Tree) -> nn.Module:
        module = nn.Module()
        for leaf in tree.leaves:
            if leaf.shared is not None and made:
                parameter = made[leaf.shared % len(made)]
            else:
                trained = leaf.dtype.is_floating_point and not leaf.frozen
                parameter = nn.Parameter(_values(leaf, generator), requires_grad=trained)
                made.append(parameter)
            _add(module, leaf.name, parameter)
        if tree.buffers:
            module.register_buffer("running_mean", torch.randn(3, generator=generator))
            module.register_buffer("steps", torch.tensor(3))
        for name, child in tree.children:
            built = module_of(child)
            _add(module, name, built)
            if child.again:
                _add(module, f"{name}_again", built)
        return module

    return module_of(tree)


def _add(module: nn.Module, name: str, value: Any) -> None:
    free = next(n for n in (name, *(f"{name}{number}" for number in range(99))) if not hasattr(module, n))
    setattr(module, free, value)


def move(model: nn.Module, seed: int) -> None:
    """Adds noise to all floating-point parameters, frozen ones included, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@dataclass
class Expected:
    """The penalty by the book: value, size of its rounding error, and gradients by name; without those not pulled."""

    value: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def by_the_book(
    model: nn.Module,
    origin: dict[str, Tensor],
    exclude: list[str],
    weights: dict[str, float],
    new: frozenset[str] = frozenset(),
    beta: float = 0.0,
) -> Expected:
    """Σ w‖θ − θ0‖² + β‖θ_new‖² over trainable floating-point parameters, each once, in float64."""
    expected = Expected()
    for name, parameter in model.named_parameters():  # tied ones under their first name
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        theta = parameter.detach().double()
        if name in new:
            if beta:
                expected.value += beta * float((theta**2).sum())
                expected.gradients[name] = 2 * beta * theta
            continue
        weight = next((w for pattern, w in weights.items() if re.search(pattern, name)), 1.0)
        if weight == 0 or any(re.search(pattern, name) for pattern in exclude):
            continue
        difference = theta - origin[name].double()
        expected.value += weight * float((difference**2).sum())
        expected.gradients[name] = 2 * weight * difference
    return expected


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], factor: float = 1.0) -> None:
    """Those expected are there, up to the rounding of their dtype; all other parameters have none."""
    for name, parameter in model.named_parameters():
        if name not in expected:
            assert parameter.grad is None, name
            continue
        wanted = factor * expected[name]
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.shape == parameter.shape
        smallest = torch.finfo(parameter.dtype).tiny
        allowed = 2 * ROUNDING[parameter.dtype] * wanted.abs() + smallest
        assert bool(((parameter.grad.double() - wanted).abs() <= allowed).all()), name

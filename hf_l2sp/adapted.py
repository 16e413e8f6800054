"""The low-rank part of a plan: weights that LoRA changes, and how their distance gets its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .adapters import AdaptedWeight, SavedCopy, base_name, has_adapters, lora_layers, saved_copies
from .backends import Backend, full_shape
from .identity import tensor_sums
from .lowrank import LowRank, Product, lowrank_pass, lowrank_squared
from .naming import named_float_parameters
from .penalty import PenaltySums

logger = logging.get_logger(__name__)

# Parts of the names of what PEFT makes anew: factors of adapters and copies that it trains.
_MADE = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", "trainable_tokens_delta"}
)


@dataclass
class LowRankEntry:
    """One weight of the base model that adapters change; its distance is ‖Σ s·BA‖².

    Attributes:
        name: Name of the base weight in the model without adapters.
        adapted: The weight and its live factors.
        shape: Shape of the base weight.
        pretrained: Whether the base weight has a pretrained value.
        excluded: Whether the user took it out.
        weight: w.
        rows: Leading rows of the base weight that have a pretrained value; `None`: all.
        starts: What θ0 has besides the base weight (PiSSA and its like), whole, by adapter.
    """

    name: str
    adapted: AdaptedWeight
    shape: tuple[int, ...]
    pretrained: bool = True
    excluded: bool = False
    weight: float = 1.0
    rows: int | None = None
    starts: dict[str, Product] = field(default_factory=dict)

    @property
    def trainable(self) -> bool:
        """Whether one of the factors that act now is trained."""
        return any(factor.requires_grad for product in self.adapted.active().values() for factor in product[:2])

    @property
    def role(self) -> str:
        """What happens now, in the words of `PlanEntry.role`."""
        if not self.trainable:
            return "frozen"
        if not self.pretrained:
            return "new"
        return "excluded" if self.excluded else "anchored"

    def pulled_factors(self) -> list[Tensor]:
        """The factors of all adapters, acting or not, that are pulled as soon as they are trained."""
        if self.excluded or not self.pretrained:
            return []
        return [factor for product in self.adapted.products().values() for factor in product[:2]]

    @property
    def elements(self) -> int:
        """Numbers in the weight, or in its pretrained rows."""
        shape = self.shape if self.rows is None else (self.rows, *self.shape[1:])
        return torch.Size(shape).numel()

    def term(self, backend: Backend) -> LowRank:
        """The distance now, over whole factors."""
        live = self.adapted.term(self.starts, self.rows)
        whole = backend.gather([factor for product in live.products for factor in product[:2]])
        products = [
            product._replace(up=up, down=down)
            for product, up, down in zip(live.products, whole[::2], whole[1::2], strict=True)
        ]
        return live._replace(products=tuple(products))

    def take_starts(self, backend: Backend) -> None:
        """Copies what θ0 has besides the base weight; before training."""
        for name in self.adapted.starts():
            product = self.adapted.products()[name]
            up, down = backend.gather([product.up, product.down])
            self.starts[name] = Product(up.detach().clone(), down.detach().clone(), product.scale)


@dataclass
class AdaptedModel:
    """What a plan needs to know of a model, with or without adapters.

    Attributes:
        parameters: Parameters by the names that they have without adapters. The factors of adapters and the weights
            that they change are not among them; of a trained copy and its original, the copy is.
        copies: Trained copies by name.
        weights: Weights that adapters change.
    """

    parameters: dict[str, nn.Parameter]
    copies: dict[str, SavedCopy]
    weights: list[AdaptedWeight]


def look_at(model: nn.Module) -> AdaptedModel:
    """Sorts a model's parameters.

    Raises:
        ValueError: An adapter has no exact distance.
    """
    weights = lora_layers(model)
    copies = {copy.name: copy for copy in saved_copies(model)}
    adapted = {id(weight.base) for weight in weights}
    own = base_parameters(model).items()
    parameters = {name: p for name, p in own if id(p) not in adapted and name not in copies}
    parameters |= {name: copy.parameter for name, copy in copies.items()}
    return AdaptedModel(parameters, copies, weights)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own floating-point parameters by the names that they have without adapters.

    What PEFT added is left out: factors, and trained copies beside their originals.
    """
    if not has_adapters(model):
        return dict(named_float_parameters(model))
    return {base_name(name): p for name, p in named_float_parameters(model) if _MADE.isdisjoint(name.split("."))}


def new_in_base(model: AdaptedModel, new: frozenset[str]) -> frozenset[str]:
    """The names, without adapters, of what has no pretrained value; what PEFT made is no part of the base model.

    Args:
        model: The model.
        new: Names in the adapted model of parameters that were not loaded.
    """
    if not model.copies and not model.weights:
        return new
    return frozenset(base_name(name) for name in new if _MADE.isdisjoint(name.split(".")))


def apply_low_rank(
    entries: Sequence[LowRankEntry], backend: Backend, coefficient: float, gradient: bool = True
) -> PenaltySums:
    """Adds the gradients of coefficient · Σ w‖Σ s·BA‖² to the factors' and returns the sums, as `penalty_pass` does.

    Every rank computes all of it, from whole factors: they are small. It keeps what belongs to its part.
    """
    gradient = gradient and coefficient != 0.0
    scale = backend.grad_scale() if gradient else None
    squared: list[Tensor] = []
    pulls: list[tuple[Tensor, Tensor]] = []
    for entry in entries:
        term = entry.term(backend)
        factor = coefficient * entry.weight
        found = lowrank_pass(term, factor if scale is None else scale.double() * factor)
        squared.append(found.squared)
        for live, gradients in zip(entry.adapted.active().values(), found.gradients, strict=True):
            pulls += [pair for pair in zip(live[:2], gradients, strict=True) if pair[0].requires_grad]
    if gradient:
        backend.add_to_gradients(pulls)
    sums = torch.stack([value.to(squared[0]) for value in squared]) if squared else torch.zeros(0, dtype=torch.float64)
    weights = torch.tensor([entry.weight for entry in entries], dtype=sums.dtype, device=sums.device)
    return PenaltySums(sums * weights, sums)


def warn_if_moved(entries: Sequence[LowRankEntry], backend: Backend) -> None:
    """Tells of adapters that are away from θ0 where it is taken, before any training; all ranks must take part."""
    moved: list[str] = []
    total = 0.0
    for entry in entries:
        term = entry.term(backend)
        squared = float(lowrank_squared(term))
        # Starts with orthogonal B and A are at distance 0 but for the rounding of their numbers.
        rounding = sum(
            4.0 * torch.finfo(p.up.dtype).eps * abs(p.scale) * float(p.up.double().norm() * p.down.double().norm())
            for p in term.products
        )
        if squared > rounding**2:
            moved.append(entry.name)
            total += squared
    if not moved or not backend.is_main_process:
        return
    logger.warning(
        f"The adapters of {len(moved)} weights (first {moved[0]}) are away from θ0 before training begins: distance "
        f"{math.sqrt(total):.4g}. θ0 is the base model's own weight. That is right if they were trained before, or "
        "start at random. It is wrong if the base weights are what a decomposition has left over (PiSSA, OLoRA, "
        "LoftQ) and the adapter that belongs to them was saved with init_lora_weights=True, or "
        "replace_lora_weights_loftq was called: then merge first (merge_and_unload) and add new adapters."
    )


def low_rank_penalty(entry: LowRankEntry, weight: float, backend: Backend) -> Tensor:
    """The differentiable w‖Σ s·BA‖². Shape: [].

    Raises:
        ValueError: The model is sharded.
    """
    if backend.sharded:
        raise ValueError(
            "Where the model is sharded, the penalty of adapters has no autograd graph outside a training step. Let "
            "train() run the steps."
        )
    return lowrank_squared(entry.adapted.term(entry.starts, entry.rows)) * weight


def base_shape(weight: AdaptedWeight) -> tuple[int, ...]:
    """Shape of the base weight, which quantization may have packed."""
    base = weight.base
    if base is None or not base.is_floating_point():
        out = (weight.layer.out_features,)
        return out if weight.part == "bias" else (*out, weight.layer.in_features)
    return full_shape(base)


def base_sums(weight: AdaptedWeight, backend: Backend) -> Tensor:
    """This rank's share of Σ x and Σ x² over the base weight, as it counts in computations. Shape: [2]."""
    base = weight.base
    if base is None:
        return torch.zeros(2, dtype=torch.float64)
    if base.is_floating_point():
        return tensor_sums(backend.local(base)) / backend.copies(base)
    from peft.utils.integrations import dequantize_module_weight

    whole = dequantize_module_weight(weight.layer.get_base_layer())
    return tensor_sums(whole) / backend.copies(whole)

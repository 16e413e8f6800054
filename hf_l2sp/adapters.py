"""What PEFT put into a model: which weights adapters change and by what, and which parameters are trained copies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .adapter_checks import (
    adapted_modules,
    check_adapters,
    has_adapters,
    merged_error,
    peft_class,
    takes_start_out,
)
from .lowrank import LowRank, Product
from .naming import canonical_name, unwrap

__all__ = [
    "AdaptedWeight",
    "SavedCopy",
    "base_name",
    "check_adapters",
    "has_adapters",
    "lora_layers",
    "saved_copies",
]

# What PEFT inserts into names. A module of the model itself may be called base_layer; PEFT's hold the parameter.
_INSERTED = re.compile(
    r"(?:^|(?<=\.))base_model\.model\."
    r"|\.token_adapter(?=\.base_layer\.)"
    r"|\.base_layer(?=\.[^.]+$)"
    r"|\.original_module(?=\.)"
    r"|\.modules_to_save\.[^.]+(?=\.)"
)


def base_name(name: str) -> str:
    """The name that a parameter of an adapted model has in the model without adapters.

    A trained copy of `modules_to_save` and its frozen original get the same name.
    """
    return _INSERTED.sub("", name)


@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen weight (or bias) of the base model and what LoRA adapters add to it, always read anew.

    Attributes:
        name: Name of the base weight in the model without adapters.
        layer: PEFT's layer around it.
        part: `weight`, or `bias` for what `lora_bias=True` adds to the bias.
        configs: PEFT's configurations, by adapter.
    """

    name: str
    layer: Any
    part: Literal["weight", "bias"]
    configs: Mapping[str, Any]

    @property
    def base(self) -> Tensor | None:
        """The base weight, maybe quantized; None where the layer has none by that name."""
        base: Tensor | None = getattr(self.layer.get_base_layer(), self.part, None)
        return base

    @property
    def transposed(self) -> bool:
        """Whether the base weight is stored as [in, out], so that its rows are columns of A."""
        return self.part == "weight" and (self._embedding or bool(getattr(self.layer, "fan_in_fan_out", False)))

    @property
    def _embedding(self) -> bool:
        return isinstance(self.layer.get_base_layer(), nn.Embedding)

    def products(self) -> dict[str, Product]:
        """The live factors and present scales of all adapters, whether they act or not, by adapter."""
        layer = self.layer
        if self._embedding:
            factors = {name: (up, layer.lora_embedding_A[name]) for name, up in layer.lora_embedding_B.items()}
        elif self.part == "weight":
            factors = {name: (up.weight, layer.lora_A[name].weight) for name, up in layer.lora_B.items()}
        else:
            biases = {name: up.bias for name, up in layer.lora_B.items() if up.bias is not None}
            factors = {name: (bias, torch.ones(1, device=bias.device)) for name, bias in biases.items()}
        return {name: Product(*pair, float(layer.scaling[name])) for name, pair in factors.items()}

    def active(self) -> dict[str, Product]:
        """The live products that the forward pass adds now, trainable or frozen, by adapter.

        Raises:
            ValueError: The adapters are merged into the base weight.
        """
        if self.layer.merged:
            raise merged_error(self.name)
        acting = [] if self.layer.disable_adapters else _active_adapters(self.layer)
        return {name: product for name, product in self.products().items() if name in acting}

    def starts(self) -> dict[str, Product]:
        """Copies of what θ0 has besides the base weight: the starts that PEFT took out of it (PiSSA, OLoRA, ...).

        To be called before training. If such an adapter was trained before, its start is lost, and θ0 is the adapted
        weight as it is now. All other adapters have θ0 = the base weight, whatever their start.
        """
        return {
            name: Product(product.up.detach().clone(), product.down.detach().clone(), product.scale)
            for name, product in self.products().items()
            if self._starts_in_anchor(name)
        }

    def _starts_in_anchor(self, adapter: str) -> bool:
        # Embeddings and convolutions ignore these initializations.
        down = None if self._embedding or self.part == "bias" else unwrap(self.layer.lora_A[adapter])
        return isinstance(down, nn.Linear) and takes_start_out(self.configs[adapter])

    def term(self, starts: Mapping[str, Product] | None = None, rows: int | None = None) -> LowRank:
        """The distance from θ0 of the weight as it is now.

        Args:
            starts: What `starts()` returned before training.
            rows: Leading rows of the base weight that have a pretrained value, where an embedding was enlarged; None:
                all.

        Raises:
            ValueError: The adapters are merged, or one of them changed the base weight after θ0 was taken.
        """
        starts = starts or {}
        for name in self.products():
            if name not in starts and self._starts_in_anchor(name):
                raise ValueError(
                    f"Adapter {name!r} was added after θ0 was taken, and its init_lora_weights="
                    f"{self.configs[name].init_lora_weights!r} changed the base weight {self.name}. Add adapters of "
                    "this kind before the trainer is made."
                )
        active = self.active()
        return LowRank(
            products=tuple(active.values()),
            starts=tuple(starts.get(name) for name in active),
            gone=tuple(start for name, start in starts.items() if name not in active),
            rows=None if self.transposed else rows,
            columns=rows if self.transposed else None,
        )


def lora_layers(model: nn.Module) -> list[AdaptedWeight]:
    """The weights and biases of the base model that LoRA adapters change.

    A layer that occurs several times in the model is one. Tied layers with adapters of their own are several: their
    weights differ.

    Args:
        model: The model, wrapped or not, from `get_peft_model` or with `add_adapter` of transformers.

    Raises:
        ValueError: An adapter has no exact distance (see `check_adapters`).
    """
    check_adapters(model)
    if not has_adapters(model):
        return []
    lora_layer = peft_class("tuners.lora", "LoraLayer")
    found = []
    for path, layer, configs in adapted_modules(model):
        if isinstance(layer, lora_layer):
            found.append(AdaptedWeight(base_name(f"{path}.weight"), layer, "weight", configs))
            if any(up.bias is not None for up in layer.lora_B.values()):
                found.append(AdaptedWeight(base_name(f"{path}.bias"), layer, "bias", configs))
    return found


class SavedCopy(NamedTuple):
    """A parameter that PEFT trains in place of one of the base model, or of rows of it.

    Attributes:
        name: Name of the base model's parameter.
        parameter: The trained copy.
        original: Its pretrained value, in the copy's shape; frozen, so that it need not be copied.
        rows: The rows of the base model's parameter that it replaces (`trainable_token_indices`); None: all.
    """

    name: str
    parameter: nn.Parameter
    original: Tensor
    rows: tuple[int, ...] | None = None


def saved_copies(model: nn.Module) -> list[SavedCopy]:
    """The copies from `modules_to_save` and `trainable_token_indices` that the forward pass uses now.

    Whether an original is pretrained (a new head in `modules_to_save` is not) must be asked of the original. Tied
    copies come once.

    Args:
        model: The model, wrapped or not, from `get_peft_model` or with `add_adapter` of transformers.
    """
    if not has_adapters(model):
        return []
    found: dict[int, SavedCopy] = {}
    for path, module, _ in adapted_modules(model):
        kind = type(module).__name__
        if kind == "ModulesToSaveWrapper":
            copies = _whole_copies(path, module)
        elif kind == "TrainableTokensLayer":
            copies = _token_copies(path, module)
        else:
            continue
        for copy in copies:
            found.setdefault(id(copy.parameter), copy)
    return list(found.values())


def _whole_copies(path: str, wrapper: Any) -> list[SavedCopy]:
    active = _active_adapters(wrapper)
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return []
    # FSDP may have wrapped modules inside of one of them.
    named = wrapper.original_module.named_parameters(remove_duplicate=False)
    originals = {canonical_name(name): parameter for name, parameter in named}
    return [
        SavedCopy(base_name(f"{path}.{canonical_name(name)}"), parameter, originals[canonical_name(name)])
        for name, parameter in wrapper.modules_to_save[active[0]].named_parameters()
        if parameter.is_floating_point()
    ]


def _token_copies(path: str, layer: Any) -> list[SavedCopy]:
    if layer.disable_adapters:
        return []
    name = base_name(f"{path}.base_layer.weight")
    return [
        SavedCopy(
            name,
            layer.trainable_tokens_delta[adapter],
            layer.trainable_tokens_original[adapter],
            tuple(layer.token_indices[adapter]),
        )
        for adapter in _active_adapters(layer)
        if adapter in layer.trainable_tokens_delta
    ]


def _active_adapters(module: Any) -> Sequence[str]:
    active = module.active_adapter
    return [active] if isinstance(active, str) else active
